#include "check.hpp"

#include <cstring>

std::string bundle_folder, scratch_folder;

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

void fail_check(const char* file, int line, const char* what) {
  throw Failure(std::string(file) + ":" + std::to_string(line) + ": " + what);
}

void check_status(const char* file, int line, const char* call, kt_status expected, kt_status got) {
  const std::string said = got ? kt_last_error() : "";
  if (got != expected)
    fail_check(file, line, (std::string(call) + ": expected " + kt_status_name(expected) + ", got " + kt_status_name(got) + ": " + said).c_str());
  if (got != KT_OK && (said.size() < 10 || said.find('\n') != std::string::npos)) fail_check(file, line, ("not one line: " + said).c_str());
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
