#include "check.hpp"

#include <cstring>

std::string bundle_folder, scratch_folder;

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

int main(int count, char** words) {
  if (count < 3) {
    std::fprintf(stderr, "usage: kinetok_tests BUNDLE SCRATCH [PART OF A NAME]\n");
    return 2;
  }
  bundle_folder = words[1];
  scratch_folder = words[2];
  int failed = 0, run = 0;
  for (const Test& test : tests()) {
    if (count > 3 && !std::strstr(test.name, words[3])) continue;
    ++run;
    try {
      test.run();
      std::printf("passed %s\n", test.name);
    } catch (const std::exception& error) {
      ++failed;
      std::printf("FAILED %s: %s\n", test.name, error.what());
    }
    std::fflush(stdout);
  }
  std::printf("%d tests, %d failed\n", run, failed);
  return failed || !run;
}
