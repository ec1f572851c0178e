// Characters under way: the same motion however it is computed; twins, cancelled ones, crowds.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <random>

#include "expect.hpp"
#include "hosts.hpp"

namespace {

struct Clip {
  std::vector<int32_t> tokens;
  std::vector<float> frames;
  bool operator==(const Clip& other) const { return tokens == other.tokens && frames == other.frames; }
};

// The clip of one character among `crowd`, read in pieces; redirected when 12 tokens are written.
Clip clip(uint32_t flags, uint32_t crowd, double seconds) {
  const Host host(crowd, flags | KT_OPEN_NO_TEXT, 24);
  kt_character_options how = host.defaults();
  how.seconds = seconds;
  std::vector<kt_character> all;
  for (uint32_t i = 0; i < crowd; ++i) {
    how.request = i == crowd / 2 ? 5 : 100 + i;
    all.push_back(host.create(&how));
    host.prompt(all.back(), i == crowd / 2 ? 1 : 2 + i);
  }
  Clip out;
  for (int piece = 0; piece < 5; ++piece) {
    EXPECT_GT(host.run().tokens, 0);  // 24 frames, 12 tokens each
    for (const kt_character c : all) {
      const auto frames = host.frames(c);
      if (c == all[crowd / 2]) out.frames.insert(out.frames.end(), frames.begin(), frames.end());
      if (piece == 0) host.prompt(c, 5);
    }
  }
  out.tokens = host.tokens(all[crowd / 2]);
  EXPECT_EQ(out.tokens.size(), 60);
  return out;
}

}  // namespace

TEST(Characters, a_clip_is_the_same_in_line_beside_and_in_a_crowd) {
  const Clip alone = clip(0, 1, INFINITY);
  EXPECT_EQ(clip(KT_OPEN_INLINE, 1, INFINITY), alone);
  EXPECT_EQ(clip(0, 5, INFINITY).tokens, alone.tokens);
  const Clip crowd = clip(KT_OPEN_INLINE, 9, INFINITY);
  EXPECT_EQ(crowd.tokens, alone.tokens);
  for (size_t i = 0; i < alone.frames.size(); ++i) EXPECT_LT(std::fabs(crowd.frames[i] - alone.frames[i]), 1e-3f);
}

TEST(Characters, a_small_budget_moves_on_by_one_call) {
  const Host host(4, KT_OPEN_NO_TEXT | KT_OPEN_INLINE);
  for (int i = 0; i < 4; ++i) host.prompt(host.create(), 1);
  auto report = sized<kt_step_report>();
  for (uint32_t total = 0; total < 4;) {  // once all are prepared; a call may serve several
    EXPECT_STATUS(KT_OK, kt_step(host.model, 1, &report));
    EXPECT_LE(report.tokens, 4);
    total += report.tokens;
  }
  EXPECT_STATUS(KT_OK, kt_step(host.model, 0, &report));
  EXPECT_EQ(report.tokens, 0);
  EXPECT_EQ(report.working, 4);
}

TEST(Characters, a_clip_ends_and_goes_on_with_another_prompt) {
  const Host host(1, KT_OPEN_NO_TEXT, 200);
  kt_character_options how = host.defaults();
  how.seconds = 2;
  const kt_character c = host.create(&how);
  EXPECT_EQ(host.query(c).state, KT_IDLE);
  host.prompt(c, 1);
  EXPECT_EQ(host.query(c).state, KT_PREPARING);
  host.run();
  EXPECT_EQ(host.query(c).state, KT_DONE);
  EXPECT_EQ(host.query(c).tokens, 30);
  EXPECT_EQ(host.query(c).unread_frames, 60);
  const auto first = host.frames(c, KT_LAYOUT_GLTF);
  host.prompt(c, 2);
  host.run();
  EXPECT_EQ(host.query(c).state, KT_DONE);
  EXPECT_EQ(host.query(c).tokens, 60);
  const auto second = host.frames(c, KT_LAYOUT_GLTF);
  EXPECT_EQ(second.size(), first.size());
  double jump = 0;  // the root goes on from where it was
  for (size_t i = 0; i < 3; ++i) jump += std::fabs(double{second[i]} - first[first.size() - 91 + i]);
  EXPECT_LT(jump, 0.5);
  EXPECT_STATUS(KT_OK, kt_cancel(c));
  EXPECT_EQ(host.query(c).state, KT_IDLE);
  EXPECT_EQ(host.query(c).tokens, 0);
  host.prompt(c, 1);
  host.run();
  EXPECT_EQ(host.frames(c, KT_LAYOUT_GLTF), first);  // nothing is left of what was cancelled
}

TEST(Characters, a_twin_with_the_same_draws_moves_alike) {
  for (const uint32_t flags : {0u, uint32_t{KT_OPEN_INLINE}}) {
    const Host host(4, KT_OPEN_NO_TEXT | flags, 20);
    kt_character_options how = host.defaults();
    how.seconds = INFINITY;
    how.seed = 9;
    const kt_character c = host.create(&how);
    host.prompt(c, 1);
    host.run();
    kt_character same = 0, other = 0, grandchild = 0, none = 0;
    EXPECT_STATUS(KT_OK, kt_fork(c, 9, 0, &same));
    EXPECT_STATUS(KT_OK, kt_fork(same, 9, 0, &grandchild));
    EXPECT_STATUS(KT_OK, kt_fork(c, 10, 0, &other));
    EXPECT_EQ(host.query(same).unread_frames, 0);
    EXPECT_EQ(host.tokens(same), host.tokens(c));
    EXPECT_STATUS(KT_ERROR_FULL, kt_fork(c, 1, 0, &none));
    const auto before = host.frames(c, KT_LAYOUT_GLTF);
    host.run();
    EXPECT_EQ(host.tokens(same), host.tokens(c));
    EXPECT_NE(host.tokens(other), host.tokens(c));
    EXPECT_EQ(host.tokens(grandchild), host.tokens(c));
    const auto one = host.frames(c, KT_LAYOUT_GLTF), two = host.frames(same, KT_LAYOUT_GLTF);
    EXPECT_EQ(one.size(), two.size());
    EXPECT_EQ(before.size(), one.size());
    for (size_t i = 0; i < one.size(); ++i) EXPECT_LT(std::fabs(one[i] - two[i]), 1e-3f);
  }
}

TEST(Characters, features_are_copied_and_need_no_guidance) {
  const Host host(2, KT_OPEN_NO_TEXT | KT_OPEN_NO_GUIDANCE, 20);
  const kt_character_options how = host.defaults();
  EXPECT_EQ(how.guidance, 1);
  std::vector<float> made_up(384 * 5, 0.25f);
  auto source = sized<kt_prompt_source>();
  source.features = made_up.data();
  source.rows = 5;
  const kt_character a = host.create(), b = host.create();
  EXPECT_STATUS(KT_OK, kt_prompt(a, &source));
  std::fill(made_up.begin(), made_up.end(), 9.0f);  // copied already
  std::vector<float> again(384 * 5, 0.25f);
  source.features = again.data();
  EXPECT_STATUS(KT_OK, kt_prompt(b, &source));
  host.run();
  EXPECT_EQ(host.tokens(a), host.tokens(b));
  EXPECT_EQ(host.tokens(a).size(), 10);
}

TEST(Characters, anything_at_any_time) {
  for (const uint32_t flags : {0u, uint32_t{KT_OPEN_INLINE}}) {
    const Host host(5, flags);
    std::mt19937 random(11 + flags);
    std::vector<kt_character> all;
    kt_character_options how = host.defaults();
    how.seconds = INFINITY;
    for (int i = 0; i < 500; ++i) {
      const kt_character c = all.empty() ? 0 : all[random() % all.size()];
      kt_character born = 0;
      switch (random() % 10) {
        case 0:
        case 1: {
          const kt_status status = kt_character_create(host.model, &how, &born);
          EXPECT_TRUE(status == KT_OK || (status == KT_ERROR_FULL && all.size() == 5));
          if (status == KT_OK) all.push_back(born);
          break;
        }
        case 2:
          if (!c) break;
          EXPECT_STATUS(KT_OK, kt_character_destroy(c));
          all.erase(std::find(all.begin(), all.end(), c));
          break;
        case 3:
          if (c) {
            EXPECT_STATUS(KT_OK, kt_cancel(c));
          }
          break;
        case 4: {
          if (!c) break;
          const kt_status status = kt_fork(c, random(), 1, &born);
          EXPECT_TRUE(status == KT_OK || status == KT_ERROR_STATE || (status == KT_ERROR_FULL && all.size() == 5));
          if (status == KT_OK) all.push_back(born);
          break;
        }
        case 5:
        case 6:
          if (c) host.prompt(c, random() % 8);
          break;
        case 7:
          if (random() % 4 == 0) host.run();
          break;
        default:
          EXPECT_STATUS(KT_OK, kt_step(host.model, random() % 3000, nullptr));
      }
      if (c && random() % 2 && std::find(all.begin(), all.end(), c) != all.end()) {
        for (const float x : host.frames(c, random() % 4)) EXPECT_TRUE(std::isfinite(x));
        EXPECT_NE(host.query(c).state, KT_FAILED);
      }
    }
  }
}

TEST(Characters, sentences_are_encoded_beside) {
  const Host host(2, 0, 20);
  auto source = sized<kt_prompt_source>();
  const kt_character one = host.create(), two = host.create();
  std::string text = "a person nobody has banked walks on";
  source.text = text.c_str();
  EXPECT_STATUS(KT_OK, kt_prompt(one, &source));
  text.assign(text.size(), 'x');  // copied already
  source.text = "a person nobody has banked walks on";
  EXPECT_STATUS(KT_OK, kt_prompt(two, &source));
  host.run();
  EXPECT_EQ(host.query(one).state, KT_RUNNING);
  EXPECT_EQ(host.tokens(one).size(), 10);
  EXPECT_EQ(host.tokens(one), host.tokens(two));
}

TEST(Characters, the_hosts_allocator_gets_everything_back) {
  struct Account {
    size_t held = 0, pieces = 0;
  } account;
  auto options = sized<kt_model_options>();
  options.characters = 2;
  options.flags = KT_OPEN_NO_TEXT | KT_OPEN_NO_HASHES;
  options.context = &account;
  options.allocate = [](void* context, size_t bytes, size_t alignment) -> void* {
    auto* a = static_cast<Account*>(context);
    a->held += bytes, a->pieces++;
    return std::aligned_alloc(alignment, (bytes + alignment - 1) / alignment * alignment);
  };
  options.release = [](void* context, void* memory, size_t bytes) {
    auto* a = static_cast<Account*>(context);
    a->held -= bytes, a->pieces--;
    std::free(memory);
  };
  kt_model model = 0;
  EXPECT_STATUS(KT_OK, kt_model_open(bundle_folder.c_str(), &options, &model));
  auto info = sized<kt_model_info>();
  EXPECT_STATUS(KT_OK, kt_model_query(model, &info));
  EXPECT_EQ(account.held, info.memory_bytes);
  EXPECT_GT(account.pieces, 10);
  EXPECT_STATUS(KT_OK, kt_model_close(model));
  EXPECT_EQ(account.held, 0);
  EXPECT_EQ(account.pieces, 0);
}
