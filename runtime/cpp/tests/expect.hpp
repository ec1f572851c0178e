// GoogleTest, and what these tests expect beside it. main.cpp ends a test at its first failure, also inside a function.
#pragma once

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "error.hpp"
#include "kinetok.h"

extern std::string bundle_folder, scratch_folder;

// The call gives this status, and where it is an error a line that says something.
#define EXPECT_STATUS(expected, call) EXPECT_PRED_FORMAT2(same_status, expected, call)
testing::AssertionResult same_status(const char* expected_text, const char* call_text, kt_status expected, kt_status got);

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
