#include "expect.hpp"

std::string bundle_folder, scratch_folder;

testing::AssertionResult same_status(const char*, const char* call_text, kt_status expected, kt_status got) {
  const std::string said = got ? kt_last_error() : "";
  if (got != expected)
    return testing::AssertionFailure() << call_text << ": expected " << kt_status_name(expected) << ", got " << kt_status_name(got) << ": " << said;
  if (got != KT_OK && (said.size() < 10 || said.find('\n') != std::string::npos)) return testing::AssertionFailure() << "not one line: " << said;
  return testing::AssertionSuccess();
}

namespace {

// What follows a failure would only use what is not there.
struct FirstFailureEnds : testing::EmptyTestEventListener {
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (result.failed()) throw testing::AssertionException(result);
  }
};

}  // namespace

int main(int count, char** words) {
  testing::InitGoogleTest(&count, words);  // takes its own flags out
  if (count != 3) {
    std::fprintf(stderr, "usage: %s BUNDLE SCRATCH [--gtest_filter=*PART OF A NAME*]\n", words[0]);
    return 2;
  }
  bundle_folder = words[1];
  scratch_folder = words[2];
  testing::UnitTest::GetInstance()->listeners().Append(new FirstFailureEnds);  // GoogleTest deletes it
  const int failed = RUN_ALL_TESTS();
  return failed || testing::UnitTest::GetInstance()->test_to_run_count() == 0;
}
