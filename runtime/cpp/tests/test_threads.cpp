// Several threads at the border. Under ThreadSanitizer (tests/tsan.sh) a race anywhere below ends the program.
#include <atomic>
#include <cmath>
#include <cstring>
#include <thread>

#include "expect.hpp"
#include "hosts.hpp"

namespace {

// A test's threads note failures: what main.cpp throws at one would end the process there.
struct Notes {
  std::atomic<int> wrong{0};
  void expect(bool fine) { wrong += !fine; }
};

template <typename Body>
void together(int count, Body body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

kt_prompt_source bank(uint32_t id) {
  auto source = sized<kt_prompt_source>();
  source.banked = id + 1;
  return source;
}

}  // namespace

TEST(Threads, models_of_several_threads_are_independent) {
  Notes notes;
  std::vector<std::vector<int32_t>> tokens(3);
  together(3, [&](int thread) {
    for (int again = 0; again < 2; ++again) {
      auto options = sized<kt_model_options>();
      options.characters = 2;
      options.flags = KT_OPEN_NO_TEXT | KT_OPEN_NO_HASHES | (thread == 2 ? KT_OPEN_INLINE : 0);
      kt_model model = 0;
      kt_character c = 0;
      const auto source = bank(1);
      notes.expect(kt_model_open(bundle_folder.c_str(), &options, &model) == KT_OK);
      notes.expect(kt_character_create(model, nullptr, &c) == KT_OK && kt_prompt(c, &source) == KT_OK);
      notes.expect(kt_step(model, KT_UNLIMITED, nullptr) == KT_OK);
      uint32_t count = 0;
      tokens[static_cast<size_t>(thread)].resize(100);
      notes.expect(kt_read_tokens(c, tokens[static_cast<size_t>(thread)].data(), 100, &count) == KT_OK);
      tokens[static_cast<size_t>(thread)].resize(count);
      notes.expect(kt_prompt(c, &source) == KT_OK && kt_model_close(model) == KT_OK);  // while the worker prepares
    }
  });
  EXPECT_EQ(notes.wrong.load(), 0);
  EXPECT_FALSE(tokens[0].empty());
  EXPECT_EQ(tokens[0], tokens[1]);
  EXPECT_EQ(tokens[0], tokens[2]);
}

TEST(Threads, a_model_is_handed_round) {
  const Host host(2);
  kt_character_options how = host.defaults();
  how.seconds = INFINITY;
  const kt_character c = host.create(&how);
  Notes notes;
  std::atomic<int> turns{0};
  together(3, [&](int thread) {
    std::vector<float> frames(272 * 16);
    for (int i = 0; i < 150; ++i) {
      const kt_status status = kt_model_adopt(host.model);
      notes.expect(status == KT_OK || status == KT_ERROR_THREAD);  // somebody is in a call
      const auto source = bank(static_cast<uint32_t>(i % 5));
      uint32_t read = 0;
      // Another thread may adopt it in between: then these are refused, and nothing else happens.
      for (const kt_status got : {i % 10 ? KT_OK : kt_prompt(c, &source), kt_step(host.model, 500, nullptr),
                                  kt_read_frames(c, KT_LAYOUT_FEATURES, frames.data(), frames.size(), 16, &read)}) {
        notes.expect(got == KT_OK || got == KT_ERROR_THREAD);
        turns += got == KT_OK;
      }
      notes.expect(kt_cancel(static_cast<uint64_t>(thread) << 40) == KT_ERROR_HANDLE);
      notes.expect(std::strstr(kt_last_error(), "no handle") != nullptr);  // this thread's own
    }
  });
  EXPECT_EQ(notes.wrong.load(), 0);
  EXPECT_GT(turns.load(), 100);
  EXPECT_STATUS(KT_OK, kt_model_adopt(host.model));
  host.prompt(c, 1);
  host.run();
  EXPECT_EQ(host.query(c).state, KT_RUNNING);
}

TEST(Threads, a_model_closes_whatever_its_worker_is_doing) {
  for (int pause = 0; pause < 12; ++pause) {
    Host host(4);
    for (uint32_t i = 0; i < 4; ++i) host.prompt(host.create(), i);
    for (int i = 0; i < pause; ++i) EXPECT_STATUS(KT_OK, kt_step(host.model, 500, nullptr));
    kt_status closed = KT_ERROR_INTERNAL;
    std::thread other([&] {
      if (kt_model_adopt(host.model) == KT_OK) closed = kt_model_close(host.model);
    });
    other.join();
    EXPECT_EQ(closed, KT_OK);
  }
}
