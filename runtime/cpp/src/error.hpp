// The one exception of this library; api.cpp turns it into a status and a line.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <exception>

#include "kinetok.h"

namespace kinetok {

class Error : public std::exception {
 public:
#if defined(__MINGW32__)  // where plain printf means an older one, without %zu
  __attribute__((format(gnu_printf, 3, 4)))
#elif defined(__GNUC__)
  __attribute__((format(printf, 3, 4)))
#endif
  Error(kt_status code, const char* format, ...) noexcept : status(code) {
    std::va_list values;
    va_start(values, format);
    std::vsnprintf(text_, sizeof text_, format, values);
    va_end(values);
  }
  const char* what() const noexcept override { return text_; }
  const kt_status status;

 private:
  char text_[400];
};

}  // namespace kinetok
