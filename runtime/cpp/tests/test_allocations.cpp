// Characters move on without taking memory. A program of its own, as it replaces operator new.
#include <atomic>
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <new>

#include "expect.hpp"
#include "hosts.hpp"
#include "ort.hpp"

namespace {

std::atomic<bool> counting{false};
std::atomic<long> ours{0}, onnxruntimes{0};
std::atomic<long long> held{0};  // bytes of ours that were not given back

// In front of what is handed out: its size, where it really begins, and whose it is.
struct Head {
  void* begin;
  size_t bytes;
  bool ours;
};

void* counted(size_t bytes, size_t alignment) {
  const bool mine = !kinetok::ort::inside;
  if (counting) ++(mine ? ours : onnxruntimes);
  const size_t room = (sizeof(Head) + alignment - 1) / alignment * alignment;
  void* begin = std::aligned_alloc(alignment, (room + bytes + alignment - 1) / alignment * alignment);
  if (!begin) throw std::bad_alloc();
  void* memory = static_cast<char*>(begin) + room;
  const Head head{begin, bytes, mine};
  std::memcpy(static_cast<char*>(memory) - sizeof head, &head, sizeof head);
  if (mine) held += static_cast<long long>(bytes);
  return memory;
}

void give_back(void* memory) {
  if (!memory) return;
  Head head;
  std::memcpy(&head, static_cast<char*>(memory) - sizeof head, sizeof head);
  if (head.ours) held -= static_cast<long long>(head.bytes);
  std::free(head.begin);
}

constexpr size_t USUAL = alignof(std::max_align_t);

}  // namespace

void* operator new(size_t bytes) { return counted(bytes, USUAL); }
void* operator new(size_t bytes, std::align_val_t alignment) { return counted(bytes, static_cast<size_t>(alignment)); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept {
  try {
    return counted(bytes, USUAL);
  } catch (...) {
    return nullptr;
  }
}
void* operator new(size_t bytes, std::align_val_t alignment, const std::nothrow_t&) noexcept {
  try {
    return counted(bytes, static_cast<size_t>(alignment));
  } catch (...) {
    return nullptr;
  }
}
void operator delete(void* memory) noexcept { give_back(memory); }
void operator delete(void* memory, size_t) noexcept { give_back(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { give_back(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { give_back(memory); }

TEST(Allocations, no_memory_is_taken_in_passing) {
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
    bool fine = true;  // while it counts, nothing of GoogleTest's runs
    ours = onnxruntimes = 0;
    counting = true;
    for (int frame = 0; frame < 20; ++frame) {
      if (frame == 3 || frame == 10) {
        source.banked = 5;
        fine &= kt_prompt(all[1], &source) == KT_OK;
      }
      fine &= kt_step(host.model, KT_UNLIMITED, &report) == KT_OK;
      tokens += report.tokens;
      for (const kt_character c : all) fine &= kt_read_frames(c, KT_LAYOUT_UNREAL, pose.data(), pose.size(), 16, &read) == KT_OK;
    }
    counting = false;
    std::printf("  %u tokens: %ld of our allocations, %ld of ONNX Runtime's\n", tokens, ours.load(), onnxruntimes.load());
    EXPECT_TRUE(fine) << kt_last_error();
    EXPECT_GT(tokens, 600);
    EXPECT_EQ(ours.load(), 0);
  }
}

// The host's allocator gets what is large: of the C++ heap a model keeps its names and its tables of calls.
TEST(Allocations, little_is_kept_on_the_heap) {
  kinetok::ort::inside = 0;
  static std::atomic<long long> hosts;
  hosts = 0;
  auto options = sized<kt_model_options>();
  options.characters = 2;
  options.flags = KT_OPEN_NO_HASHES;
  options.allocate = [](void*, size_t bytes, size_t alignment) -> void* {
    hosts += static_cast<long long>(bytes);
    return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  };
  options.release = [](void*, void* memory, size_t bytes) {
    hosts -= static_cast<long long>(bytes);
    std::free(memory);
  };
  kt_model model = 0;
  long long before = held;
  const kt_status opened = kt_model_open(bundle_folder.c_str(), &options, &model);
  const long long kept = held - before;
  EXPECT_STATUS(KT_OK, opened);
  std::printf("  the host's allocator: %lld bytes, the heap: %lld\n", hosts.load(), kept);
  EXPECT_LT(kept, 200000);
  EXPECT_GT(hosts.load(), 50 * kept);
  before = held;
  const kt_status closed = kt_model_close(model);
  const long long given_back = before - held;
  EXPECT_STATUS(KT_OK, closed);
  EXPECT_EQ(given_back, kept);
  EXPECT_EQ(hosts.load(), 0);
}
