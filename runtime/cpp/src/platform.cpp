#include "platform.hpp"

#include <cstdlib>

#if defined(_WIN32)
#include <windows.h>
#else
#include <dlfcn.h>
#endif

namespace kinetok::platform {

#if defined(_WIN32)

const char* const ONNXRUNTIME_NAMES[2] = {"onnxruntime.dll", "onnxruntime.dll"};

void* symbol(const std::string& library, const char* name, std::string& why) {
  HMODULE module = LoadLibraryA(library.c_str());
  void* found = module ? reinterpret_cast<void*>(GetProcAddress(module, name)) : nullptr;
  if (!found) why = "Windows error " + std::to_string(GetLastError());
  return found;
}

#else

#if defined(__APPLE__)
const char* const ONNXRUNTIME_NAMES[2] = {"libonnxruntime.dylib", "libonnxruntime.1.dylib"};
#else
const char* const ONNXRUNTIME_NAMES[2] = {"libonnxruntime.so.1", "libonnxruntime.so"};
#endif

void* symbol(const std::string& library, const char* name, std::string& why) {
  void* module = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  void* found = module ? dlsym(module, name) : nullptr;
  if (!found) {
    const char* reason = dlerror();
    why = reason ? reason : "no such symbol";
  }
  return found;
}

#endif

std::string environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

}  // namespace kinetok::platform
