// Memory from the host's allocator: all that grows with characters, positions, the bank, the vocabulary and the classes. It is
// taken while a model opens. Names, tables of calls and the manifest stay on the C++ heap.
#pragma once

#include <algorithm>
#include <cstring>
#include <memory_resource>
#include <new>
#include <utility>
#include <vector>

#include "error.hpp"

namespace kinetok {

class Memory final : public std::pmr::memory_resource {
 public:
  static constexpr size_t ALIGNMENT = 64;
  static constexpr uint64_t MOST = uint64_t{1} << 42;  // beyond any machine: a mistake in a size, not a wish

  explicit Memory(const kt_model_options& options) : options_(options) {}
  Memory(const Memory&) = delete;
  ~Memory() override {
    for (const auto& [piece, bytes] : pieces_) release(piece, bytes);
  }

  // `count` numbers of type T in the product of sizes given; zeroed.
  template <typename T, typename... Sizes>
  T* take(Sizes... sizes) {
    uint64_t bytes = sizeof(T);
    for (const uint64_t size : {static_cast<uint64_t>(sizes)...}) {
      if (size && bytes > MOST / size) throw Error(KT_ERROR_MEMORY, "sizes beyond any memory: ask for fewer characters or positions");
      bytes *= size;
    }
    return static_cast<T*>(std::memset(take_bytes(bytes ? bytes : 1), 0, static_cast<size_t>(bytes)));
  }
  uint64_t total() const { return total_; }

 private:
  void* take_bytes(uint64_t bytes) {
    pieces_.reserve(pieces_.size() + 1);
    void* piece = options_.allocate ? options_.allocate(options_.context, static_cast<size_t>(bytes), ALIGNMENT)
                                    : ::operator new(static_cast<size_t>(bytes), std::align_val_t{ALIGNMENT}, std::nothrow);
    if (!piece)
      throw Error(KT_ERROR_MEMORY, "the allocator has no %llu bytes: ask for fewer characters or positions",
                  static_cast<unsigned long long>(bytes));
    pieces_.emplace_back(piece, static_cast<size_t>(bytes));
    total_ += bytes;
    return piece;
  }
  void release(void* piece, size_t bytes) {
    if (options_.release)
      options_.release(options_.context, piece, bytes);
    else
      ::operator delete(piece, std::align_val_t{ALIGNMENT});
  }

  // For containers; none asks for more than ALIGNMENT.
  void* do_allocate(size_t bytes, size_t) override { return take_bytes(bytes); }
  void do_deallocate(void* piece, size_t bytes, size_t) override {
    pieces_.erase(std::find(pieces_.begin(), pieces_.end(), std::pair<void*, size_t>(piece, bytes)));
    total_ -= bytes;
    release(piece, bytes);
  }
  bool do_is_equal(const std::pmr::memory_resource& other) const noexcept override { return this == &other; }

  const kt_model_options options_;
  std::vector<std::pair<void*, size_t>> pieces_;
  uint64_t total_ = 0;
};

}  // namespace kinetok
