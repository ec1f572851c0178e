// ONNX Runtime: its library, sessions, and calls whose inputs and outputs lie in memory of ours.
#pragma once

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "ort_abi.hpp"

namespace kinetok::ort {

// Not 0 while this thread is in a call into ONNX Runtime, so that a test can tell its allocations from ours. ONNX Runtime has
// threads of its own, so it begins at 1; threads of ours set it to 0.
extern thread_local int inside;

class Runtime {
 public:
  // library "": $KINETOK_ONNXRUNTIME, what the build linked, then the system's search path. Throws Error(KT_ERROR_RUNTIME).
  explicit Runtime(const std::string& library);
  ~Runtime();
  Runtime(const Runtime&) = delete;
  void check(abi::Status* status, const char* doing) const;  // throws where status says so, and releases it

  abi::Api api{};
  std::string version;
  abi::Env* env = nullptr;
  abi::MemoryInfo* memory = nullptr;
};

// An execution provider, from "NAME" or "NAME:key=value,key=value"; capitals do not matter.
class Provider {
 public:
  // Throws Error(KT_ERROR_ARGUMENT) for what is no such string, Error(KT_ERROR_RUNTIME) where this ONNX Runtime lacks it.
  Provider(const Runtime& runtime, const std::string& wanted);
  void append(abi::SessionOptions* options) const;
  std::string name;  // as ONNX Runtime lists it: "CPUExecutionProvider"

 private:
  bool is(const char* known) const { return name == std::string(known) + "ExecutionProvider"; }
  const Runtime& runtime_;
  std::string given_;  // the name as the host spelt it
  std::vector<std::string> keys_, values_;
};

class Session {
 public:
  Session(const Runtime& runtime, const std::string& path, const Provider& provider, int threads);
  ~Session();
  Session(const Session&) = delete;
  const Runtime& runtime;
  abi::Session* handle = nullptr;
};

struct Tensor {  // somebody else's memory
  void* data;
  size_t bytes;
  std::array<int64_t, 4> shape;
  size_t axes;
  abi::Element element;
};

// A tensor as ONNX Runtime knows it.
class Value {
 public:
  Value(const Runtime& runtime, const Tensor& tensor);
  Value(Value&& other) noexcept : handle(std::exchange(other.handle, nullptr)), runtime_(other.runtime_) {}
  ~Value();
  abi::Value* handle = nullptr;

 private:
  const Runtime* runtime_;
};

// Names and tensors of one call; made once, run often. Owners of the values outlive it.
class Call {
 public:
  explicit Call(Session& session) : session_(&session) {}
  void input(const char* name, const Value& value);
  void output(const char* name, const Value& value);
  // A place for a value that changes from run to run; set it before each.
  void reserve_input(const char* name);
  void reserve_output(const char* name);
  void set_input(size_t place, const Value& value) { in_[place] = value.handle; }
  void set_output(size_t place, const Value& value) { out_[place] = value.handle; }
  void run(const char* doing);

 private:
  Session* session_;
  std::vector<const char*> in_names_, out_names_;
  std::vector<const abi::Value*> in_;
  std::vector<abi::Value*> out_;
};

}  // namespace kinetok::ort
