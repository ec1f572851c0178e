// The C border misused: every mistake is a status, and the model goes on.
#include <cmath>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>

#include "expect.hpp"
#include "hosts.hpp"

namespace fs = std::filesystem;

TEST(Api, null_is_an_argument_error) {
  Host host(2);
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_model_open(nullptr, nullptr, &host.model));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_model_open(bundle_folder.c_str(), nullptr, nullptr));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_model_query(host.model, nullptr));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_joint(host.model, 0, 0, nullptr));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_bank_find(host.model, nullptr, nullptr));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_bank_text(host.model, 0, nullptr));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_character_defaults(host.model, nullptr));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_character_create(host.model, nullptr, nullptr));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_frame_floats(host.model, 0, nullptr));
  const kt_character c = host.create();
  uint32_t read = 7;
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_character_query(c, nullptr));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_prompt(c, nullptr));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_read_frames(c, 0, nullptr, 0, 1, &read));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_read_frames(c, 0, nullptr, 0, 0, nullptr));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_read_tokens(c, nullptr, 1, &read));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_fork(c, 0, 0, nullptr));
  EXPECT_EQ(read, 7);
}

TEST(Api, stale_and_invented_handles_are_recognised) {
  kt_model gone = 0;
  kt_character orphan = 0;
  {
    Host host(2);
    gone = host.model;
    orphan = host.create();
    EXPECT_STATUS(KT_OK, kt_character_destroy(orphan));
    EXPECT_STATUS(KT_ERROR_HANDLE, kt_character_destroy(orphan));
    const kt_character again = host.create();  // in the same place
    EXPECT_NE(again, orphan);
    EXPECT_STATUS(KT_ERROR_HANDLE, kt_cancel(orphan));
    EXPECT_STATUS(KT_ERROR_HANDLE, kt_step(again, 0, nullptr));  // a character is no model
    EXPECT_STATUS(KT_ERROR_HANDLE, kt_cancel(host.model));       // nor a model a character
    for (const uint64_t invented : {uint64_t{0}, uint64_t{1}, ~uint64_t{0}, gone ^ 1, gone ^ 0x100, again ^ (uint64_t{1} << 24), again ^ (uint64_t{1} << 63)}) {
      EXPECT_STATUS(KT_ERROR_HANDLE, kt_cancel(invented));
      EXPECT_STATUS(KT_ERROR_HANDLE, kt_step(invented, 0, nullptr));
    }
  }
  EXPECT_STATUS(KT_ERROR_HANDLE, kt_step(gone, 0, nullptr));
  EXPECT_STATUS(KT_ERROR_HANDLE, kt_model_close(gone));
  EXPECT_STATUS(KT_ERROR_HANDLE, kt_cancel(orphan));
}

TEST(Api, another_thread_is_refused_until_it_adopts) {
  Host host(1);
  const kt_character c = host.create();
  kt_status step = KT_OK, cancel = KT_OK, close = KT_OK, adopted = KT_ERROR_INTERNAL, after = KT_ERROR_INTERNAL;
  std::thread other([&] {
    step = kt_step(host.model, 0, nullptr), cancel = kt_cancel(c), close = kt_model_close(host.model);
    adopted = kt_model_adopt(host.model), after = kt_step(host.model, 0, nullptr);
  });
  other.join();
  EXPECT_EQ(step, KT_ERROR_THREAD);
  EXPECT_EQ(cancel, KT_ERROR_THREAD);
  EXPECT_EQ(close, KT_ERROR_THREAD);
  EXPECT_EQ(adopted, KT_OK);
  EXPECT_EQ(after, KT_OK);
  EXPECT_STATUS(KT_ERROR_THREAD, kt_step(host.model, 0, nullptr));
  EXPECT_STATUS(KT_OK, kt_model_adopt(host.model));
  EXPECT_STATUS(KT_OK, kt_step(host.model, 0, nullptr));
}

TEST(Api, another_abi_is_refused) {
  Host host(1);
  auto info = sized<kt_model_info>();
  info.abi = 2;
  EXPECT_STATUS(KT_ERROR_VERSION, kt_model_query(host.model, &info));
  info = sized<kt_model_info>();
  for (const uint32_t size : {0u, 7u, static_cast<uint32_t>(sizeof info) + 4}) {
    info.size = size;
    EXPECT_STATUS(KT_ERROR_VERSION, kt_model_query(host.model, &info));
  }
  // No header ends within an address: half of one would be followed.
  auto source = sized<kt_prompt_source>();
  source.text = "text";
  source.size = 12;
  EXPECT_STATUS(KT_ERROR_VERSION, kt_prompt(host.create(), &source));
  info = sized<kt_model_info>();
  info.size = 16;  // an older header's: what it does not know stays untouched
  info.frame_rate = 12345;
  EXPECT_STATUS(KT_OK, kt_model_query(host.model, &info));
  EXPECT_EQ(info.joints, 22);
  EXPECT_EQ(info.features, 272);
  EXPECT_EQ(info.frame_rate, 12345);
  auto options = sized<kt_model_options>();
  kt_model model = 0;
  options.provider = "cpu";
  options.size = offsetof(kt_model_options, provider) + 4;
  EXPECT_STATUS(KT_ERROR_VERSION, kt_model_open(bundle_folder.c_str(), &options, &model));
  options = sized<kt_model_options>();
  options.abi = 0;
  EXPECT_STATUS(KT_ERROR_VERSION, kt_model_open(bundle_folder.c_str(), &options, &model));
  EXPECT_EQ(kt_version(), 100);
  EXPECT_EQ(model, 0);
}

TEST(Api, impossible_options_are_refused) {
  const auto refused = [](auto change) {
    auto options = sized<kt_model_options>();
    change(options);
    kt_model model = 0;
    const kt_status status = kt_model_open(bundle_folder.c_str(), &options, &model);
    EXPECT_EQ(model, 0);
    return status;
  };
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.characters = UINT32_MAX; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.positions = UINT32_MAX; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.ahead_frames = 1; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.threads = 100000; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.flags = 1u << 20; }));
  EXPECT_STATUS(KT_ERROR_RUNTIME, refused([](auto& o) { o.provider = "NoSuchProvider"; }));
  EXPECT_STATUS(KT_ERROR_RUNTIME, refused([](auto& o) { o.onnxruntime = "/nowhere/libonnxruntime.so"; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.allocate = [](void*, size_t, size_t) -> void* { return nullptr; }; }));
  EXPECT_STATUS(KT_ERROR_MEMORY, refused([](auto& o) {
          o.allocate = [](void*, size_t, size_t) -> void* { return nullptr; };
          o.release = [](void*, void*, size_t) {};
        }));
}

// Counts what is out, and is called from inside kt_model_open and kt_model_close.
struct Allocator {
  explicit Allocator(uint32_t pieces, kt_model other_ = 0) : left(pieces), other(other_) {
    options.characters = 1;
    options.flags = KT_OPEN_NO_TEXT | KT_OPEN_NO_HASHES;
    options.context = this;
    options.allocate = [](void* context, size_t bytes, size_t alignment) -> void* {
      auto* const self = static_cast<Allocator*>(context);
      if (self->other && kt_step(self->other, 0, nullptr) != KT_OK) ++self->refused;
      if (!self->left) return nullptr;
      --self->left, ++self->out;
      return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
    };
    options.release = [](void* context, void* memory, size_t) {
      auto* const self = static_cast<Allocator*>(context);
      if (self->own && (kt_step(self->own, 0, nullptr) != KT_ERROR_HANDLE || kt_model_close(self->own) != KT_ERROR_HANDLE)) ++self->refused;
      --self->out;
      std::free(memory);
    };
  }
  kt_model_options options = sized<kt_model_options>();
  uint32_t left, out = 0, refused = 0;
  kt_model other, own = 0;
};

TEST(Api, memory_that_runs_out_is_given_back) {
  for (const uint32_t pieces : {0u, 1u, 4u, 9u, 16u}) {
    Allocator few(pieces);
    EXPECT_STATUS(KT_ERROR_MEMORY, kt_model_open(bundle_folder.c_str(), &few.options, &few.own));
    EXPECT_EQ(few.out, 0);
    EXPECT_EQ(few.own, 0);
  }
}

TEST(Api, an_allocator_may_call_the_library) {
  const Host host(1);
  Allocator calling(UINT32_MAX, host.model);
  EXPECT_STATUS(KT_OK, kt_model_open(bundle_folder.c_str(), &calling.options, &calling.own));
  EXPECT_STATUS(KT_OK, kt_model_close(calling.own));
  EXPECT_EQ(calling.refused, 0);
  EXPECT_EQ(calling.out, 0);
}

TEST(Api, buffers_too_small_are_refused) {
  const Host host(1);
  const kt_character c = host.create();
  host.prompt(c, 1);
  host.run();
  float small[90] = {};
  uint32_t read = 7;
  for (const uint32_t frames : {1u, 1000u, UINT32_MAX}) EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_read_frames(c, KT_LAYOUT_GLTF, small, 90, frames, &read));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_read_frames(c, KT_LAYOUT_FEATURES, small, 90, 1, &read));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_read_frames(c, 4, small, 90, 0, &read));
  EXPECT_EQ(read, 7);
  EXPECT_EQ(host.query(c).unread_frames, 16);
  EXPECT_STATUS(KT_OK, kt_read_frames(c, KT_LAYOUT_GLTF, nullptr, 0, 0, &read));
  EXPECT_EQ(read, 0);
  int32_t two[2] = {};
  EXPECT_STATUS(KT_OK, kt_read_tokens(c, two, 2, &read));  // the newest
  EXPECT_EQ(read, 2);
  EXPECT_EQ(two[0], host.tokens(c)[6]);
  EXPECT_EQ(two[1], host.tokens(c)[7]);
}

TEST(Api, a_character_that_fails_says_why_and_may_start_anew) {
  for (const uint32_t flags : {0u, uint32_t{KT_OPEN_INLINE}}) {
    const Host host(2, KT_OPEN_NO_TEXT | flags);
    const kt_character c = host.create(), other = host.create();
    const std::vector<float> loud(384, 3e38f);  // finite, but not what is computed of it
    auto source = sized<kt_prompt_source>();
    source.features = loud.data();
    source.rows = 1;
    EXPECT_STATUS(KT_OK, kt_prompt(c, &source));
    host.prompt(other, 1);
    host.run();
    EXPECT_EQ(host.query(c).state, KT_FAILED);
    EXPECT_EQ(host.query(other).state, KT_RUNNING);
    EXPECT_NE(std::string(host.query(c).error).find("finite logits"), std::string::npos);
    float pose[91];
    uint32_t read = 7;
    EXPECT_STATUS(KT_ERROR_STATE, kt_read_frames(c, KT_LAYOUT_GLTF, pose, 91, 1, &read));
    EXPECT_EQ(read, 7);
    EXPECT_NE(std::string(kt_last_error()).find("finite logits"), std::string::npos);
    source = sized<kt_prompt_source>();
    source.banked = 2;
    EXPECT_STATUS(KT_ERROR_STATE, kt_prompt(c, &source));
    EXPECT_STATUS(KT_OK, kt_cancel(c));
    EXPECT_STATUS(KT_OK, kt_prompt(c, &source));
    host.run();
    EXPECT_EQ(host.tokens(c), host.tokens(other));
    EXPECT_EQ(host.tokens(c).size(), 8);  // nothing of it is left
  }
}

TEST(Api, damaged_bundles_are_refused) {
  const fs::path copy = fs::path(scratch_folder) / "damaged";
  const auto open = [&](uint32_t flags = KT_OPEN_NO_TEXT) {
    auto options = sized<kt_model_options>();
    options.flags = flags;
    kt_model model = 0;
    const kt_status status = kt_model_open(copy.string().c_str(), &options, &model);
    if (status == KT_OK) kt_model_close(model);
    return status;
  };
  const auto fresh = [&] {
    fs::remove_all(copy);
    fs::create_directories(copy);
    for (const auto& entry : fs::directory_iterator(bundle_folder))
      if (entry.path().filename() != "text_encoder.bin") fs::copy_file(entry.path(), copy / entry.path().filename());
  };
  fs::remove_all(copy);
  EXPECT_STATUS(KT_ERROR_BUNDLE, open());  // no folder
  fresh();
  EXPECT_STATUS(KT_OK, open());
  EXPECT_STATUS(KT_ERROR_BUNDLE, open(0));  // without the text encoder's weights
  for (const char* file : {"prefill.onnx", "decode.onnx", "detokenize_stream.onnx", "weights.bin", "detokenizer.bin", "bank.bin"}) {
    fs::rename(copy / file, copy / "away");
    EXPECT_STATUS(KT_ERROR_BUNDLE, open(KT_OPEN_NO_TEXT | KT_OPEN_NO_HASHES));
    EXPECT_NE(std::string(kt_last_error()).find(file), std::string::npos);
    fs::rename(copy / "away", copy / file);
  }
  fs::resize_file(copy / "weights.bin", fs::file_size(copy / "weights.bin") - 1);
  EXPECT_STATUS(KT_ERROR_BUNDLE, open());
  fresh();
  {
    std::fstream file(copy / "weights.bin", std::ios::in | std::ios::out | std::ios::binary);
    file.seekp(100000);
    file.put(static_cast<char>(0x5a));
  }
  EXPECT_STATUS(KT_ERROR_HASH, open());
  EXPECT_STATUS(KT_OK, open(KT_OPEN_NO_TEXT | KT_OPEN_NO_HASHES));
  fresh();
  {  // the same length, but no graph
    std::ofstream file(copy / "decode.onnx", std::ios::binary);
    file << std::string(fs::file_size(fs::path(bundle_folder) / "decode.onnx"), 'x');
  }
  EXPECT_STATUS(KT_ERROR_HASH, open());
  EXPECT_STATUS(KT_ERROR_RUNTIME, open(KT_OPEN_NO_TEXT | KT_OPEN_NO_HASHES));
  fs::resize_file(copy / "kinetok_bundle.json", 1000);
  EXPECT_STATUS(KT_ERROR_BUNDLE, open());
  fs::remove_all(copy);
}

TEST(Api, impossible_characters_and_prompts_are_refused) {
  Host host(2);
  kt_character_options how = host.defaults();
  const auto refused = [&](auto change) {
    kt_character_options changed = host.defaults();
    change(changed);
    kt_character c = 0;
    return kt_character_create(host.model, &changed, &c);
  };
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.temperature = NAN; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.temperature = 1e-9; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.top_p = 5e-5; }));
  EXPECT_TRUE(std::strstr(kt_last_error(), "0.0001 to 1")) << kt_last_error();
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.guidance = -1; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.seconds = -1; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, refused([](auto& o) { o.seconds = 1e9; }));
  how.seconds = INFINITY;
  const kt_character c = host.create(&how);
  const auto prompt = [&](auto change) {
    auto source = sized<kt_prompt_source>();
    change(source);
    return kt_prompt(c, &source);
  };
  float numbers[400] = {};
  EXPECT_STATUS(KT_ERROR_ARGUMENT, prompt([](auto&) {}));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, prompt([](auto& p) { p.banked = 1, p.text = "a"; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, prompt([](auto& p) { p.banked = 100000; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, prompt([&](auto& p) { p.features = numbers; }));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, prompt([&](auto& p) { p.features = numbers, p.rows = UINT32_MAX; }));
  numbers[383] = NAN;
  EXPECT_STATUS(KT_ERROR_ARGUMENT, prompt([&](auto& p) { p.features = numbers, p.rows = 1; }));
  EXPECT_STATUS(KT_ERROR_STATE, prompt([](auto& p) { p.text = "no encoder here"; }));
  uint32_t id = 0;
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_bank_find(host.model, "nobody says this", &id));
  auto joint = sized<kt_joint_info>();
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_joint(host.model, 22, 0, &joint));
  EXPECT_STATUS(KT_ERROR_ARGUMENT, kt_joint(host.model, 0, KT_LAYOUT_FEATURES, &joint));
  kt_character twin = 0;
  EXPECT_STATUS(KT_ERROR_STATE, kt_fork(c, 1, 1, &twin));
  const kt_character second = host.create();
  kt_character third = 0;
  EXPECT_STATUS(KT_ERROR_FULL, kt_character_create(host.model, nullptr, &third));
  EXPECT_STATUS(KT_OK, kt_character_destroy(second));
  EXPECT_STATUS(KT_OK, kt_character_create(host.model, nullptr, &third));
}
