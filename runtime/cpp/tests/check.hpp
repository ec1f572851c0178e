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

// Out of line: thousands of these are compiled.
[[noreturn]] void fail_check(const char* file, int line, const char* what);
void check_status(const char* file, int line, const char* call, kt_status expected, kt_status got);

#define CHECK(condition)                                         \
  do {                                                           \
    if (!(condition)) fail_check(__FILE__, __LINE__, #condition); \
  } while (false)

// The call gives this status, and where it is an error a line that says something.
#define CHECK_STATUS(expected, call) check_status(__FILE__, __LINE__, #call, expected, call)

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
