#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif
// Compiles only if src/ort_abi.hpp says what ONNX Runtime's header says.
#include <onnxruntime_c_api.h>

#include <type_traits>

#include "ort_abi.hpp"

namespace abi = kinetok::ort::abi;

#define KT_SAME_PLACE(name, place, theirs, result, arguments) \
  static_assert(offsetof(OrtApi, theirs) == abi::place_of_##name * sizeof(void*), #theirs " is elsewhere");
KT_ORT_FUNCTIONS(KT_SAME_PLACE)

// Handles are other types there, but as many arguments of the same sizes and kinds go in.
template <typename T>
struct Shape;
template <typename R, typename... A>
struct Shape<R (*)(A...)> {
  static constexpr size_t count = sizeof...(A);
  static constexpr size_t bytes = (sizeof(A) + ... + 0);
  static constexpr size_t pointers = (size_t{std::is_pointer_v<A>} + ... + 0);
};
template <typename R, typename... A>
struct Shape<R (*)(A...) noexcept> : Shape<R (*)(A...)> {};

#define KT_SAME_SHAPE(name, place, theirs, result, arguments)                                              \
  static_assert(Shape<decltype(OrtApi::theirs)>::count == Shape<decltype(abi::Api::name)>::count &&       \
                    Shape<decltype(OrtApi::theirs)>::bytes == Shape<decltype(abi::Api::name)>::bytes &&   \
                    Shape<decltype(OrtApi::theirs)>::pointers == Shape<decltype(abi::Api::name)>::pointers, \
                #theirs " takes something else");
KT_ORT_FUNCTIONS(KT_SAME_SHAPE)

static_assert(ORT_LOGGING_LEVEL_ERROR == abi::LOG_ERROR && OrtArenaAllocator == abi::ARENA_ALLOCATOR && OrtMemTypeDefault == abi::DEFAULT_MEMORY);
static_assert(int{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT} == abi::FLOAT && int{ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64} == abi::INT64 &&
              int{ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16} == abi::FLOAT16);
static_assert(ORT_API_VERSION >= abi::API_VERSION);
static_assert(offsetof(OrtApiBase, GetApi) == offsetof(abi::Base, get_api) && offsetof(OrtApiBase, GetVersionString) == offsetof(abi::Base, version));
