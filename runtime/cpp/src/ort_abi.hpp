// The part of ONNX Runtime's C interface that is used here, so that building needs none of its headers.
//
// OrtApi is a table of function pointers that only ever grows at its end; a function's place in it is part of ONNX Runtime's
// stable interface. Where the headers are found, tests/test_ort_abi.cpp compares every place and constant with them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace kinetok::ort::abi {

#if defined(_WIN32)
using PathChar = wchar_t;
#define KT_ORT_CALL __stdcall
#else
using PathChar = char;
#define KT_ORT_CALL
#endif

struct Status;
struct Env;
struct Session;
struct SessionOptions;
struct Value;
struct MemoryInfo;
struct RunOptions;
struct CudaOptions;
struct TensorRtOptions;

inline constexpr uint32_t API_VERSION = 18;  // of ONNX Runtime 1.18, the first that reads a bundle; every later one answers it
inline constexpr int LOG_ERROR = 3, ARENA_ALLOCATOR = 1, DEFAULT_MEMORY = 0;
enum Element : int { FLOAT = 1, INT64 = 7, FLOAT16 = 10 };

struct Base {
  const void* const*(KT_ORT_CALL* get_api)(uint32_t version);
  const char*(KT_ORT_CALL* version)();
};

// X(name, place in OrtApi, name there, result, arguments)
#define KT_ORT_FUNCTIONS(X)                                                                                              \
  X(error_message, 2, GetErrorMessage, const char*, (const Status*))                                                     \
  X(create_env, 3, CreateEnv, Status*, (int level, const char* id, Env**))                                               \
  X(disable_telemetry, 6, DisableTelemetryEvents, Status*, (const Env*))                                                 \
  X(create_session, 7, CreateSession, Status*, (const Env*, const PathChar*, const SessionOptions*, Session**))          \
  X(run, 9, Run, Status*,                                                                                                \
    (Session*, const RunOptions*, const char* const* names, const Value* const* inputs, size_t, const char* const*,      \
     size_t, Value** outputs))                                                                                           \
  X(create_options, 10, CreateSessionOptions, Status*, (SessionOptions**))                                               \
  X(set_log_level, 22, SetSessionLogSeverityLevel, Status*, (SessionOptions*, int))                                      \
  X(set_intra_threads, 24, SetIntraOpNumThreads, Status*, (SessionOptions*, int))                                        \
  X(set_inter_threads, 25, SetInterOpNumThreads, Status*, (SessionOptions*, int))                                        \
  X(create_tensor, 49, CreateTensorWithDataAsOrtValue, Status*,                                                          \
    (const MemoryInfo*, void* data, size_t bytes, const int64_t* shape, size_t axes, int element, Value**))              \
  X(create_cpu_memory, 69, CreateCpuMemoryInfo, Status*, (int allocator, int memory, MemoryInfo**))                      \
  X(release_env, 92, ReleaseEnv, void, (Env*))                                                                           \
  X(release_status, 93, ReleaseStatus, void, (Status*))                                                                  \
  X(release_memory, 94, ReleaseMemoryInfo, void, (MemoryInfo*))                                                          \
  X(release_session, 95, ReleaseSession, void, (Session*))                                                               \
  X(release_value, 96, ReleaseValue, void, (Value*))                                                                     \
  X(release_options, 100, ReleaseSessionOptions, void, (SessionOptions*))                                                \
  X(available, 125, GetAvailableProviders, Status*, (char*** names, int* count))                                         \
  X(release_available, 126, ReleaseAvailableProviders, Status*, (char** names, int count))                               \
  X(set_entry, 130, AddSessionConfigEntry, Status*, (SessionOptions*, const char* key, const char* value))               \
  X(append_tensorrt, 170, SessionOptionsAppendExecutionProvider_TensorRT_V2, Status*,                                    \
    (SessionOptions*, const TensorRtOptions*))                                                                           \
  X(create_tensorrt, 171, CreateTensorRTProviderOptions, Status*, (TensorRtOptions**))                                   \
  X(update_tensorrt, 172, UpdateTensorRTProviderOptions, Status*,                                                        \
    (TensorRtOptions*, const char* const* keys, const char* const* values, size_t))                                      \
  X(release_tensorrt, 174, ReleaseTensorRTProviderOptions, void, (TensorRtOptions*))                                     \
  X(append_cuda, 204, SessionOptionsAppendExecutionProvider_CUDA_V2, Status*, (SessionOptions*, const CudaOptions*))     \
  X(create_cuda, 205, CreateCUDAProviderOptions, Status*, (CudaOptions**))                                               \
  X(update_cuda, 206, UpdateCUDAProviderOptions, Status*,                                                                \
    (CudaOptions*, const char* const* keys, const char* const* values, size_t))                                          \
  X(release_cuda, 208, ReleaseCUDAProviderOptions, void, (CudaOptions*))                                                 \
  X(append_provider, 216, SessionOptionsAppendExecutionProvider, Status*,                                                \
    (SessionOptions*, const char* name, const char* const* keys, const char* const* values, size_t))

#define KT_ORT_PLACE(name, place, theirs, result, arguments) inline constexpr size_t place_of_##name = place;
KT_ORT_FUNCTIONS(KT_ORT_PLACE)
#undef KT_ORT_PLACE

struct Api {
#define KT_ORT_MEMBER(name, place, theirs, result, arguments) result(KT_ORT_CALL* name) arguments;
  KT_ORT_FUNCTIONS(KT_ORT_MEMBER)
#undef KT_ORT_MEMBER
};

}  // namespace kinetok::ort::abi
