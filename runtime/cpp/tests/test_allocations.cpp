// Characters move on without taking memory. A program of its own, as it replaces operator new.
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <new>

#include "check.hpp"
#include "hosts.hpp"
#include "ort.hpp"

namespace {

std::atomic<bool> counting{false};
std::atomic<long> ours{0}, onnxruntimes{0};

void* counted(size_t bytes, size_t alignment) {
  if (counting) ++(kinetok::ort::inside ? onnxruntimes : ours);
  void* memory = alignment ? std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment) : std::malloc(bytes ? bytes : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}

}  // namespace

void* operator new(size_t bytes) { return counted(bytes, 0); }
void* operator new(size_t bytes, std::align_val_t alignment) { return counted(bytes, static_cast<size_t>(alignment)); }
void* operator new(size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  try {
    return counted(bytes, static_cast<size_t>(alignment));
  } catch (...) {
    return nullptr;
  }
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }

TEST(no_memory_is_taken_in_passing) {
  kinetok::ort::inside = 0;
  for (const uint32_t flags : {0u, uint32_t{KT_OPEN_INLINE}}) {
    const Host host(4, KT_OPEN_NO_TEXT | flags);
    kt_character_options how = host.defaults();
    how.seconds = INFINITY;
    std::vector<kt_character> all;
    for (uint32_t i = 0; i < 4; ++i) {
      all.push_back(host.create(&how));
      host.prompt(all.back(), i);
    }
    std::vector<float> pose(91 * 16);
    uint32_t read = 0, tokens = 0;
    auto report = sized<kt_step_report>();
    auto source = sized<kt_prompt_source>();
    ours = onnxruntimes = 0;
    counting = true;
    for (int frame = 0; frame < 20; ++frame) {
      if (frame == 3 || frame == 10) {
        source.banked = 5;
        CHECK(kt_prompt(all[1], &source) == KT_OK);
      }
      CHECK(kt_step(host.model, KT_UNLIMITED, &report) == KT_OK);
      tokens += report.tokens;
      for (const kt_character c : all) CHECK(kt_read_frames(c, KT_LAYOUT_UNREAL, pose.data(), pose.size(), 16, &read) == KT_OK);
    }
    counting = false;
    std::printf("  %u tokens: %ld of our allocations, %ld of ONNX Runtime's\n", tokens, ours.load(), onnxruntimes.load());
    CHECK(tokens > 600);
    CHECK(ours == 0);
  }
}
