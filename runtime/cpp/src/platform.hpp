// What depends on the operating system; nothing else in this library does.
#pragma once

#include <cstdint>
#include <string>

namespace kinetok::platform {

// A symbol of a shared library, which stays loaded; nullptr with the reason in `why`. An empty path means this process.
void* symbol(const std::string& library, const char* name, std::string& why);
extern const char* const ONNXRUNTIME_NAMES[2];  // tried in this order where the host names no library
std::string environment(const char* name);      // "" where it is not set

}  // namespace kinetok::platform
