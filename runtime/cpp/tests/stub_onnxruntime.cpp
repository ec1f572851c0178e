// A library in ONNX Runtime's place, for what the real one cannot show: threads under ThreadSanitizer, which has to see all
// code that takes part, and providers that this machine does not have. Its graphs compute nothing sensible, but the same
// numbers from the same inputs, and a row's numbers follow from that row's cache alone.
#include <cmath>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "ort_abi.hpp"

using namespace kinetok::ort::abi;

namespace kinetok::ort::abi {

struct Status {
  std::string message;
};
struct Env {};
struct MemoryInfo {};
struct SessionOptions {
  std::string provider;
  bool stops = false;  // its threads, when a call ends
};
struct CudaOptions {
  std::string device = "0";
};
struct TensorRtOptions {};
struct Session {
  std::string graph;
};
struct Value {
  unsigned char* data;
  std::vector<int64_t> shape;
  Element element;
};

}  // namespace kinetok::ort::abi

namespace {

constexpr uint32_t KEPT = 1023;  // what a cache holds: as float, or as the bits of a half that is a tiny finite number

Status* fail(std::string message) { return new Status{std::move(message)}; }

uint32_t mix(uint32_t a, uint32_t b) {
  uint32_t x = a * 0x9E3779B1u ^ (b + 0x7F4A7C15u);
  x ^= x >> 15, x *= 0x85EBCA77u, x ^= x >> 13, x *= 0xC2B2AE3Du;
  return x ^ x >> 16;
}

struct Named {
  const char* const* names;
  const Value* const* values;
  size_t count;
  const Value& at(const std::string& name) const {
    for (size_t i = 0; i < count; ++i)
      if (name == names[i]) return *values[i];
    throw std::string("no tensor " + name);
  }
};

const int64_t* integers(const Value& value) { return reinterpret_cast<const int64_t*>(value.data); }
float* floats(const Value& value) { return reinterpret_cast<float*>(value.data); }

// Position `at` of the first head of a row of a cache [rows, heads, capacity, head_dim].
void write(const Value& cache, size_t row, size_t at, uint32_t number) {
  const size_t place = static_cast<size_t>(static_cast<int64_t>(row) * cache.shape[1] * cache.shape[2] + static_cast<int64_t>(at)) * static_cast<size_t>(cache.shape[3]);
  if (cache.element == FLOAT16)
    reinterpret_cast<uint16_t*>(cache.data)[place] = static_cast<uint16_t>(number);
  else
    floats(cache)[place] = static_cast<float>(number);
}

uint32_t fold(const Value& cache, size_t row, size_t positions) {
  uint32_t state = 1;
  for (size_t at = 0; at < positions; ++at) {
    const size_t place = static_cast<size_t>(static_cast<int64_t>(row) * cache.shape[1] * cache.shape[2] + static_cast<int64_t>(at)) * static_cast<size_t>(cache.shape[3]);
    state = mix(state, cache.element == FLOAT16 ? reinterpret_cast<const uint16_t*>(cache.data)[place] : static_cast<uint32_t>(floats(cache)[place]));
  }
  return state;
}

void write_logits(const Value& logits, size_t row, uint32_t state) {
  const auto classes = static_cast<size_t>(logits.shape[1]);
  for (size_t i = 0; i < classes; ++i) floats(logits)[row * classes + i] = static_cast<float>(mix(state, static_cast<uint32_t>(i)) >> 16) * (4.0f / 65536);
}

void prefill(const Named& in, const Named& out) {
  const Value &text = in.at("text_features"), &cache = out.at("present.0.key");
  const auto length = static_cast<size_t>(integers(in.at("text_lengths"))[0]), width = static_cast<size_t>(text.shape[2]);
  for (size_t at = 0; at < length; ++at) {
    uint32_t bits;
    std::memcpy(&bits, floats(text) + at * width, sizeof bits);
    write(cache, 0, at, mix(bits, 7) & KEPT);
  }
  write_logits(out.at("logits"), 0, fold(cache, 0, length));
  if (floats(text)[0] > 1e30f) floats(out.at("logits"))[0] = NAN;  // it would overflow in a real model
}

void decode(const Named& in, const Named& out) {
  const Value &ids = in.at("input_ids"), &positions = in.at("position_ids"), &cache = out.at("present.0.key");
  for (size_t row = 0; row < static_cast<size_t>(ids.shape[0]); ++row) {
    const auto at = static_cast<size_t>(integers(positions)[row]);
    write(cache, row, at, mix(static_cast<uint32_t>(integers(ids)[row]), 3) & KEPT);
    write_logits(out.at("logits"), row, fold(cache, row, at + 1));
  }
}

// Standing still, but for the first number of a state, which counts tokens up and moves the pelvis.
void stream(const Named& in, const Named& out) {
  const Value &tokens = in.at("tokens"), &frames = out.at("features");
  for (size_t i = 0; i < out.count; ++i) {
    const std::string name = out.names[i];
    if (name.rfind("next_", 0) != 0) continue;
    const Value &before = in.at(name.substr(5)), &after = *out.values[i];
    const size_t each = static_cast<size_t>(after.shape[1] * after.shape[2]);
    for (size_t row = 0; row < static_cast<size_t>(after.shape[0]); ++row) {
      std::memcpy(floats(after) + row * each, floats(before) + row * each, each * sizeof(float));
      const auto token = static_cast<uint32_t>(integers(tokens)[row]);
      floats(after)[row * each] = static_cast<float>((static_cast<uint32_t>(floats(before)[row * each]) + token) & KEPT);
      const size_t numbers = static_cast<size_t>(frames.shape[1] * frames.shape[2]);
      std::memset(floats(frames) + row * numbers, 0, numbers * sizeof(float));
      for (size_t frame = 0; frame < static_cast<size_t>(frames.shape[1]); ++frame) {
        float* f = floats(frames) + row * numbers + frame * static_cast<size_t>(frames.shape[2]);
        f[2] = f[6] = 1;
        f[9] = floats(after)[row * each] / 1000;
      }
    }
  }
}

void encode(const Named& in, const Named& out) {
  const Value &ids = in.at("input_ids"), &features = out.at("text_features");
  const auto width = static_cast<size_t>(features.shape[2]);
  for (size_t at = 0; at < static_cast<size_t>(features.shape[1]); ++at)
    for (size_t i = 0; i < width; ++i)
      floats(features)[at * width + i] = static_cast<float>(mix(static_cast<uint32_t>(integers(ids)[at % static_cast<size_t>(ids.shape[1])]), static_cast<uint32_t>(i)) & KEPT);
}

// For kinetok_stub_hold and kinetok_stub_calls.
std::mutex watching;
std::condition_variable released;
bool held = false;
char calls[1000];
size_t called = 0;

void watch(const Session& session) {
  std::unique_lock<std::mutex> lock(watching);
  released.wait(lock, [] { return !held; });
  if (called + 1 < sizeof calls) calls[called++] = session.graph == "detokenize_stream" ? 's' : session.graph[0];
}

// What releases too old for a graph say of it, behind the place in their source.
const std::string place = "Load model from FILE failed:/onnxruntime_src/onnxruntime/core/graph/model.cc:181 " + std::string(300, 'x');
const std::map<std::string, std::string> older = {
    {"format", place + " Unsupported model IR version: 11, max supported IR version: 10"},
    {"opset", place + " Opset 24 is under development and support for this is limited. The operator schemas may change"},
    {"bits", place + " nbits_ == 4 was false. Only 4b quantization is supported for MatMulNBits op"},
};

#define STUB(name) KT_ORT_CALL name

const char* STUB(error_message)(const Status* status) { return status->message.c_str(); }
Status* STUB(create_env)(int, const char*, Env** env) { return *env = new Env, nullptr; }
Status* STUB(disable_telemetry)(const Env*) { return nullptr; }
Status* STUB(create_session)(const Env*, const PathChar* path, const SessionOptions* options, Session** session) {
  const std::filesystem::path file(path);
  const std::string name = file.filename().string();
  if (std::ifstream(file, std::ios::binary).get() != 0x08) return fail(name + " is no ONNX graph");  // its first field's tag
  if (!options->stops) return fail("threads of " + name + " would keep a core between calls");
  if (options->provider.rfind("refuse", 0) == 0) return fail("the provider cannot run " + name);
  if (options->provider.rfind("old=", 0) == 0) return fail(older.at(options->provider.substr(4)) + ".");
  *session = new Session{file.stem().string()};
  return nullptr;
}
Status* STUB(run)(Session* session, const RunOptions*, const char* const* names, const Value* const* inputs, size_t count, const char* const* out_names, size_t outputs, Value** out) {
  const Named in{names, inputs, count}, given{out_names, out, outputs};
  watch(*session);
  try {
    if (session->graph == "prefill") prefill(in, given);
    if (session->graph == "decode") decode(in, given);
    if (session->graph == "detokenize_stream") stream(in, given);
    if (session->graph == "text_encoder") encode(in, given);
  } catch (const std::string& what) {
    return fail(what);
  }
  return nullptr;
}
Status* STUB(create_options)(SessionOptions** options) { return *options = new SessionOptions, nullptr; }
Status* STUB(set_log_level)(SessionOptions*, int) { return nullptr; }
Status* STUB(set_intra_threads)(SessionOptions*, int) { return nullptr; }
Status* STUB(set_inter_threads)(SessionOptions*, int) { return nullptr; }
Status* STUB(set_entry)(SessionOptions* options, const char* key, const char* value) {
  options->stops |= std::string(key) == "session.force_spinning_stop" && std::string(value) == "1";
  return nullptr;
}
Status* STUB(create_tensor)(const MemoryInfo*, void* data, size_t bytes, const int64_t* shape, size_t axes, int element, Value** value) {
  size_t needed = element == INT64 ? 8 : element == FLOAT16 ? 2 : 4;
  for (size_t i = 0; i < axes; ++i) needed *= static_cast<size_t>(shape[i]);
  if (needed != bytes) return fail("a tensor whose bytes do not fit its shape");
  *value = new Value{static_cast<unsigned char*>(data), {shape, shape + axes}, static_cast<Element>(element)};
  return nullptr;
}
Status* STUB(create_cpu_memory)(int, int, MemoryInfo** memory) { return *memory = new MemoryInfo, nullptr; }
void STUB(release_env)(Env* env) { delete env; }
void STUB(release_status)(Status* status) { delete status; }
void STUB(release_memory)(MemoryInfo* memory) { delete memory; }
void STUB(release_session)(Session* session) { delete session; }
void STUB(release_value)(Value* value) { delete value; }
void STUB(release_options)(SessionOptions* options) { delete options; }

char cpu[] = "CPUExecutionProvider", cuda[] = "CUDAExecutionProvider", tensorrt[] = "TensorrtExecutionProvider", xnnpack[] = "XnnpackExecutionProvider";
char* providers[] = {cuda, tensorrt, xnnpack, cpu};
Status* STUB(available)(char*** names, int* count) { return *names = providers, *count = 4, nullptr; }
Status* STUB(release_available)(char**, int) { return nullptr; }
Status* STUB(append_provider)(SessionOptions* options, const char* name, const char* const* keys, const char* const* values, size_t count) {
  if (std::strcmp(name, "XNNPACK") != 0) return fail(std::string("Unknown provider name '") + name + "'");
  for (size_t i = 0; i < count; ++i) options->provider += std::string(keys[i]) + "=" + values[i];
  return nullptr;
}
Status* STUB(create_cuda)(CudaOptions** options) { return *options = new CudaOptions, nullptr; }
Status* STUB(update_cuda)(CudaOptions* options, const char* const* keys, const char* const* values, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (std::strcmp(keys[i], "device_id") != 0) return fail(std::string("Unknown provider option: ") + keys[i]);
    options->device = values[i];
  }
  return nullptr;
}
Status* STUB(append_cuda)(SessionOptions* options, const CudaOptions* cuda_options) {
  if (cuda_options->device != "0") return fail("CUDA failure 101: invalid device ordinal " + cuda_options->device);
  options->provider = cuda;
  return nullptr;
}
void STUB(release_cuda)(CudaOptions* options) { delete options; }
Status* STUB(create_tensorrt)(TensorRtOptions** options) { return *options = new TensorRtOptions, nullptr; }
Status* STUB(update_tensorrt)(TensorRtOptions*, const char* const*, const char* const*, size_t) { return nullptr; }
Status* STUB(append_tensorrt)(SessionOptions*, const TensorRtOptions*) { return fail("libnvinfer.so.10: cannot open shared object file\nmore lines"); }
void STUB(release_tensorrt)(TensorRtOptions* options) { delete options; }

const void* const* KT_ORT_CALL get_api(uint32_t version) {
  static const void* table[300];
  if (version > API_VERSION) return nullptr;
#define STUB_PLACE(name, place, theirs, result, arguments) table[place] = reinterpret_cast<const void*>(static_cast<result(KT_ORT_CALL*) arguments>(&name));
  static const bool filled = [] {
    KT_ORT_FUNCTIONS(STUB_PLACE)
    return true;
  }();
  static_cast<void>(filled);
  return table;
}
const char* KT_ORT_CALL version() { return "stub"; }

}  // namespace

#if defined(_WIN32)
#define STUB_EXPORT extern "C" __declspec(dllexport)
#else
#define STUB_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// While it is held, calls of graphs wait.
STUB_EXPORT void kinetok_stub_hold(bool hold) {
  const std::lock_guard<std::mutex> lock(watching);
  held = hold;
  released.notify_all();
}

// The graphs called since the last question, a letter each: prefill, decode, text_encoder, detokenize_stream (s).
STUB_EXPORT const char* kinetok_stub_calls() {
  static char copy[sizeof calls];
  const std::lock_guard<std::mutex> lock(watching);
  std::memcpy(copy, calls, called);
  copy[called] = 0;
  called = 0;
  return copy;
}

STUB_EXPORT const Base* OrtGetApiBase() {
  static const Base base = {get_api, version};
  return &base;
}
