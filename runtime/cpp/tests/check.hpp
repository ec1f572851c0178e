// A test framework of one page: TEST registers, CHECK stops the test, main.cpp runs.
#pragma once

#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "error.hpp"
#include "kinetok.h"

struct Failure : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Test {
  const char* name;
  void (*run)();
};

std::vector<Test>& tests();
extern std::string bundle_folder, scratch_folder;

struct Registration {
  Registration(const char* name, void (*run)()) { tests().push_back({name, run}); }
};

#define TEST(name)                                      \
  static void test_##name();                            \
  static const Registration registered_##name(#name, test_##name); \
  static void test_##name()

#define CHECK(condition)                                                                                         \
  do {                                                                                                           \
    if (!(condition)) throw Failure(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " + #condition); \
  } while (false)

// The call gives this status, and where it is an error a line that says something.
#define CHECK_STATUS(expected, call)                                                                                      \
  do {                                                                                                                    \
    const kt_status got = (call);                                                                                         \
    if (got != (expected))                                                                                                \
      throw Failure(std::string(__FILE__) + ":" + std::to_string(__LINE__) + ": " + #call + ": expected " +              \
                    kt_status_name(expected) + ", got " + kt_status_name(got) + ": " + (got ? kt_last_error() : ""));    \
    if (got != KT_OK) {                                                                                                   \
      const std::string line = kt_last_error();                                                                           \
      if (line.size() < 10 || line.find('\n') != std::string::npos) throw Failure("not one line: \"" + line + "\"");      \
    }                                                                                                                     \
  } while (false)

template <typename Body>
kt_status thrown(Body body) {
  try {
    body();
  } catch (const kinetok::Error& error) {
    return error.status;
  }
  return KT_OK;
}

template <typename T>
T sized() {
  T value{};
  value.size = sizeof value;
  value.abi = KT_ABI_VERSION;
  return value;
}
