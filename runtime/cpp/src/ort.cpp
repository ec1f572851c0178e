#include "ort.hpp"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <memory>

#include "error.hpp"
#include "platform.hpp"

#if defined(KINETOK_LINKED_ONNXRUNTIME)
extern "C" const kinetok::ort::abi::Base* OrtGetApiBase();
#endif

namespace kinetok::ort {

thread_local int inside = 1;

namespace {

struct Inside {
  Inside() { ++inside; }
  ~Inside() { --inside; }
};

// How releases too old for a graph refuse it, in a part of their words, and what to do. They are out, so the words stay.
struct Refusal {
  const char *words, *remedy;
};
constexpr char NEWER_OR_OPSET_18[] =
    "use a newer one, or export the bundle with --opset 18 (1.18 runs that in fp32 and fp16, 1.23 in int8 and int4)";
constexpr Refusal TOO_OLD[] = {
    {"Unsupported model IR version", NEWER_OR_OPSET_18},
    {"is under development and support for this is limited", NEWER_OR_OPSET_18},  // an opset
    {"Only 4b quantization is supported", "use a newer one (1.23 runs int8 and int4), or export the bundle with --dtype fp32 or fp16"},
};

const abi::Base* base_of(const std::string& library) {
  using Get = const abi::Base*(KT_ORT_CALL*)();
  const std::string named = library.empty() ? platform::environment("KINETOK_ONNXRUNTIME") : library;
#if defined(KINETOK_LINKED_ONNXRUNTIME)
  if (named.empty()) return OrtGetApiBase();
#endif
  std::string why;
  const auto from = [&](const std::string& path) {
    auto get = reinterpret_cast<Get>(platform::symbol(path, "OrtGetApiBase", why));
    return get ? get() : nullptr;
  };
  if (!named.empty()) {
    if (const abi::Base* base = from(named)) return base;
    throw Error(KT_ERROR_RUNTIME, "cannot load ONNX Runtime from %.100s: %.150s", named.c_str(), why.c_str());
  }
  for (const char* name : platform::ONNXRUNTIME_NAMES)
    if (const abi::Base* base = from(name)) return base;
  throw Error(KT_ERROR_RUNTIME,
              "ONNX Runtime is not on the system's search path: name its library in kt_model_options.onnxruntime or in "
              "KINETOK_ONNXRUNTIME (the Python package onnxruntime carries one)");
}

}  // namespace

Runtime::Runtime(const std::string& library) {
  const Inside scope;
  const abi::Base* base = base_of(library);
  version = base->version();
  const void* const* table = base->get_api(abi::API_VERSION);
  if (!table)
    throw Error(KT_ERROR_RUNTIME, "ONNX Runtime %.20s is too old: expected 1.%u or later", version.c_str(), abi::API_VERSION);
#define KT_ORT_TAKE(name, place, theirs, result, arguments) \
  api.name = reinterpret_cast<decltype(api.name)>(const_cast<void*>(table[place]));
  KT_ORT_FUNCTIONS(KT_ORT_TAKE)
#undef KT_ORT_TAKE
  check(api.create_env(abi::LOG_ERROR, "kinetok", &env), "starting");
  // Official builds from 1.29 on report sessions and models over the network unless they are told not to.
  check(api.disable_telemetry(env), "starting");
  check(api.create_cpu_memory(abi::ARENA_ALLOCATOR, abi::DEFAULT_MEMORY, &memory), "starting");
}

Runtime::~Runtime() {
  if (memory) api.release_memory(memory);
  if (env) api.release_env(env);
}

void Runtime::check(abi::Status* status, const char* doing) const {
  if (!status) return;
  char text[256];
  std::snprintf(text, sizeof text, "%s", api.error_message(status));
  api.release_status(status);
  std::replace(text, text + sizeof text, '\n', ' ');
  throw Error(KT_ERROR_RUNTIME, "ONNX Runtime %.20s, %.100s: %s", version.c_str(), doing, text);
}

Provider::Provider(const Runtime& runtime, const std::string& wanted) : runtime_(runtime) {
  const Inside scope;
  const size_t colon = std::min(wanted.find(':'), wanted.size());
  given_ = wanted.substr(0, colon);
  for (size_t at = colon + 1; at < wanted.size();) {
    const size_t end = std::min(wanted.find(',', at), wanted.size()), equals = wanted.find('=', at);
    if (equals >= end || equals == at)
      throw Error(KT_ERROR_ARGUMENT, "provider: expected NAME or NAME:key=value,key=value, got %.100s", wanted.c_str());
    keys_.push_back(wanted.substr(at, equals - at));
    values_.push_back(wanted.substr(equals + 1, end - equals - 1));
    at = end + 1;
  }
  const auto lower = [](std::string text) {
    std::transform(text.begin(), text.end(), text.begin(), [](char c) { return c >= 'A' && c <= 'Z' ? static_cast<char>(c + 32) : c; });
    return text;
  };
  char** names = nullptr;
  int count = 0;
  runtime.check(runtime.api.available(&names, &count), "listing its providers");
  const std::string suffix = "ExecutionProvider";
  std::string all;
  for (int i = 0; i < count; ++i) {
    const std::string listed = names[i];
    const std::string plain = listed.substr(0, listed.size() - std::min(listed.size(), suffix.size()));
    if (lower(plain) == lower(given_) || listed == given_) name = listed;
    all += (i ? ", " : "") + lower(plain);
  }
  runtime.check(runtime.api.release_available(names, count), "listing its providers");
  if (name.empty())
    throw Error(KT_ERROR_RUNTIME, "provider: expected one that ONNX Runtime %.20s has (%.150s), got %.60s: choose one of them, or name another library in onnxruntime",
                runtime.version.c_str(), all.c_str(), given_.c_str());
  if (is("CPU") && !keys_.empty()) throw Error(KT_ERROR_ARGUMENT, "provider: cpu takes no options, got %.100s", wanted.c_str());
}

void Provider::append(abi::SessionOptions* options) const {
  const auto pointers = [](const std::vector<std::string>& texts) {
    std::vector<const char*> out;
    for (const std::string& text : texts) out.push_back(text.c_str());
    return out;
  };
  const auto keys = pointers(keys_), values = pointers(values_);
  const abi::Api& api = runtime_.api;
  const auto check = [&](abi::Status* status) { runtime_.check(status, name.c_str()); };
  // Two providers take options of a type of their own, the others come by name.
  if (is("CUDA")) {
    abi::CudaOptions* own = nullptr;
    check(api.create_cuda(&own));
    const std::unique_ptr<abi::CudaOptions, decltype(api.release_cuda)> held(own, api.release_cuda);
    check(api.update_cuda(own, keys.data(), values.data(), keys.size()));
    check(api.append_cuda(options, own));
  } else if (is("Tensorrt")) {
    abi::TensorRtOptions* own = nullptr;
    check(api.create_tensorrt(&own));
    const std::unique_ptr<abi::TensorRtOptions, decltype(api.release_tensorrt)> held(own, api.release_tensorrt);
    check(api.update_tensorrt(own, keys.data(), values.data(), keys.size()));
    check(api.append_tensorrt(options, own));
  } else if (!is("CPU")) {
    check(api.append_provider(options, given_.c_str(), keys.data(), values.data(), keys.size()));
  }
}

Session::Session(const Runtime& owner, const std::string& path, const Provider& provider, int threads) : runtime(owner) {
  const Inside scope;
  abi::SessionOptions* options = nullptr;
  runtime.check(runtime.api.create_options(&options), "starting");
  const std::unique_ptr<abi::SessionOptions, void(KT_ORT_CALL*)(abi::SessionOptions*)> held(options,
                                                                                          runtime.api.release_options);
  runtime.check(runtime.api.set_log_level(options, abi::LOG_ERROR), "starting");
  runtime.check(runtime.api.set_intra_threads(options, threads), "starting");
  runtime.check(runtime.api.set_inter_threads(options, 1), "starting");
  // Threads of a session that is done would wait for its next call in a loop, on a core that another session or the game needs.
  runtime.check(runtime.api.set_entry(options, "session.force_spinning_stop", "1"), "starting");
  provider.append(options);
  // native() is what the operating system calls a path: wide characters on Windows.
  const std::filesystem::path file = std::filesystem::u8path(path);
  abi::Status* status = runtime.api.create_session(runtime.env, file.c_str(), options, &handle);
  for (const Refusal& refusal : TOO_OLD)
    if (status && std::strstr(runtime.api.error_message(status), refusal.words)) {
      runtime.api.release_status(status);
      throw Error(KT_ERROR_RUNTIME, "ONNX Runtime %.20s is too old for %.150s: %s", runtime.version.c_str(), path.c_str(), refusal.remedy);
    }
  runtime.check(status, path.c_str());
}

Session::~Session() {
  if (handle) runtime.api.release_session(handle);
}

Value::Value(const Runtime& runtime, const Tensor& t) : runtime_(&runtime) {
  const Inside scope;
  runtime.check(runtime.api.create_tensor(runtime.memory, t.data, t.bytes, t.shape.data(), t.axes, t.element, &handle),
                "binding a tensor");
}

Value::~Value() {
  if (handle) runtime_->api.release_value(handle);
}

void Call::input(const char* name, const Value& value) {
  in_names_.push_back(name);
  in_.push_back(value.handle);
}

void Call::output(const char* name, const Value& value) {
  out_names_.push_back(name);
  out_.push_back(value.handle);
}

void Call::reserve_input(const char* name) {
  in_names_.push_back(name);
  in_.push_back(nullptr);
}

void Call::reserve_output(const char* name) {
  out_names_.push_back(name);
  out_.push_back(nullptr);
}

void Call::run(const char* doing) {
  const Inside scope;
  const Runtime& runtime = session_->runtime;
  // Outputs that are given are written in place; Run leaves the pointers as they are.
  runtime.check(runtime.api.run(session_->handle, nullptr, in_names_.data(), in_.data(), in_.size(), out_names_.data(),
                                out_names_.size(), out_.data()),
                doing);
}

}  // namespace kinetok::ort
