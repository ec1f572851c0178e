// Noise, drawing, hashes, poses.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <random>
#include <utility>

#include "expect.hpp"
#include "pose.hpp"
#include "sampling.hpp"
#include "sha256.hpp"

using namespace kinetok;

TEST(Numbers, philox_gives_the_published_vector) {
  const auto words = sampling::philox({0, 0, 0, 0}, {0, 0});
  EXPECT_EQ(words[0], 0x6627e8d5);
  EXPECT_EQ(words[1], 0xe169c58d);
  EXPECT_EQ(words[2], 0xbc57ac4c);
  EXPECT_EQ(words[3], 0x9b00dbd8);
}

TEST(Numbers, noise_has_the_bits_of_docs_numerics) {
  struct Row {
    uint64_t seed, position;
    uint32_t request, token, bits;
  };
  const Row rows[] = {{0, 0, 0, 0, 0x3dadb63f}, {0, 0, 0, 1, 0x4003f241}, {0, 0, 0, 5, 0x4031b69b}, {7, 3, 0, 2, 0xbf25ef5b},
                      {7, 3, 1, 2, 0x3fa7bfc6}, {123456789, 149, 255, 63999, 0x3d2ebfff},
                      {18446744073709551615u, 300, 4294967295u, 64000, 0x40251d50}};
  for (const Row& row : rows) {
    const float g = sampling::gumbel(row.seed, row.position, row.request, row.token);
    uint32_t bits;
    std::memcpy(&bits, &g, sizeof bits);
    EXPECT_EQ(bits, row.bits);
  }
}

TEST(Numbers, weights_have_the_bits_of_docs_numerics) {
  const std::pair<float, int32_t> rows[] = {{0.0f, 1 << 24},    {-0.25f, 14107901}, {-0.5f, 11863283}, {-0.7213475f, 10175896}, {-1.0f, 1 << 23},
                                            {-3.3f, 1703416}, {-9.87654f, 17847}, {-16.5f, 181},     {-23.999f, 1},           {-40.0f, 0}};
  for (const auto& [x, weight] : rows) EXPECT_EQ(sampling::exp2_weight(x), weight) << x;
}

TEST(Numbers, noise_is_within_its_limit) {
  const float most = sampling::noise_limit(UINT32_MAX);
  uint32_t beyond = 0;
  for (uint32_t i = 0; i < 1u << 23; ++i) {  // every noise there is
    const uint32_t word = i << 9 | (i & 511);
    const float g = sampling::noise(word);
    beyond += !(g <= sampling::noise_limit(word) && g <= most);
  }
  EXPECT_EQ(beyond, 0u);
}

// A draw as docs/numerics.md has it, one number after the other. The logits hold no NaN.
static int32_t drawn_plainly(std::vector<float> scores, const sampling::Draw& how) {
  if (how.temperature == 0) return static_cast<int32_t>(std::max_element(scores.begin(), scores.end()) - scores.begin());
  const float inverse = static_cast<float>(1 / how.temperature);
  for (float& score : scores) score *= inverse;
  std::vector<float> falling = scores;
  std::sort(falling.rbegin(), falling.rend());
  if (how.top_k && how.top_k < scores.size())
    for (float& score : scores)
      if (score < falling[how.top_k - 1]) score = -INFINITY;
  std::vector<int32_t> weights;
  for (const float score : scores) weights.push_back(sampling::exp2_weight(std::max((score - falling[0]) * 1.4426950216293335f, -40.0f)));
  std::vector<int32_t> sorted = weights;
  std::sort(sorted.rbegin(), sorted.rend());
  uint64_t sum = 0, share = std::max<uint64_t>(1, static_cast<uint64_t>(std::nearbyint(how.top_p * 65536)));
  for (const int32_t weight : sorted) sum += static_cast<uint32_t>(weight);
  const uint64_t needed = (sum * share + 65535) >> 16;
  size_t last = 0;
  for (sum = static_cast<uint32_t>(sorted[0]); sum < needed;) sum += static_cast<uint32_t>(sorted[++last]);
  float best = -INFINITY;
  int32_t token = 0;
  for (size_t i = 0; i < scores.size(); ++i) {
    if (scores[i] == -INFINITY || (share < 65536 && weights[i] < sorted[last])) continue;
    const float noisy = scores[i] + sampling::gumbel(how.seed, how.position, how.request, static_cast<uint32_t>(i));
    if (noisy > best) best = noisy, token = static_cast<int32_t>(i);
  }
  return token;
}

TEST(Numbers, a_draw_is_that_of_a_plain_loop) {
  std::mt19937 random(9);
  std::normal_distribution<float> normal;
  const auto one_of = [&](std::initializer_list<double> of) { return of.begin()[random() % of.size()]; };
  for (const size_t classes : {1u, 3u, 5u, 31u, 32u, 33u, 255u, 257u, 1001u, 4376u, 64001u}) {
    sampling::Sampler sampler(classes);
    std::vector<float> logits(classes);
    for (uint64_t draw = 0; draw < (classes > 5000 ? 4 : 60); ++draw) {
      const auto kind = draw % 4;
      const auto spread = static_cast<float>(one_of({0, 0.5, 3, 30}));
      for (float& x : logits) {
        x = spread * normal(random) - 5;
        if (kind == 1) x = std::round(x);                // many equals
        if (kind == 2 && random() % 50) x = -INFINITY;   // few that are not banned
        if (kind == 3) x = random() % 2 ? 1e9f : -1e9f;  // noise is nothing to them: the lowest id
      }
      logits[random() % classes] = kind == 3 ? 1e9f : 1;
      sampling::Draw how = {draw << 40 | classes, draw, 7, static_cast<uint32_t>(one_of({0, 0, 1, 50}))};
      how.temperature = one_of({0, 0.1, 1, 1.3});
      how.top_p = one_of({1, 0.999995, 0.95, 0.3, 1e-4});
      sampler.mix(logits.data(), nullptr, 1);
      EXPECT_EQ(sampler.draw(how), drawn_plainly(logits, how)) << classes << " classes, draw " << draw;
      logits[random() % classes] = draw % 2 ? std::nanf("") : -std::nanf("");
      sampler.mix(logits.data(), nullptr, 1);
      EXPECT_EQ(sampler.draw(how), sampling::NOT_FINITE);
    }
  }
}

TEST(Numbers, top_p_stops_at_just_enough) {
  const float half = -0.6931472f, logits[3] = {0, half, half};
  EXPECT_EQ(sampling::exp2_weight(half * 1.4426950216293335f), 1 << 23);  // so the first token is half of all
  sampling::Sampler sampler(3);
  for (uint64_t seed = 0; seed < 20; ++seed) {
    sampler.mix(logits, nullptr, 1);
    EXPECT_EQ(sampler.draw({seed, 0, 0, 0, 1, 0.5}), 0);
  }
  float more = half;
  while (sampling::exp2_weight(more * 1.4426950216293335f) == 1 << 23) more = std::nextafter(more, 0.0f);
  const float odd[3] = {0, half, more};  // so it is half a weight less than half, which is rounded up
  int drawn[3] = {};
  for (uint64_t seed = 0; seed < 20; ++seed) {
    sampler.mix(odd, nullptr, 1);
    ++drawn[sampler.draw({seed, 0, 0, 0, 1, 0.5})];
  }
  EXPECT_TRUE(drawn[0] && !drawn[1] && drawn[2]);
}

TEST(Numbers, numbers_that_are_not_finite_are_not_drawn_from) {
  sampling::Sampler sampler(3);
  const float nan = std::nanf(""), low = -INFINITY;
  for (const float bad : {nan, INFINITY}) {
    const float logits[3] = {1, bad, 2};
    sampler.mix(logits, nullptr, 1);
    EXPECT_EQ(sampler.draw({}), sampling::NOT_FINITE);
  }
  const float none[3] = {low, low, low};
  sampler.mix(none, nullptr, 1);
  EXPECT_EQ(sampler.draw({}), sampling::NOT_FINITE);
  const float one[3] = {low, 5, low};
  for (const double top_p : {1.0, 0.5, 1e-4})
    for (const uint32_t top_k : {0u, 1u, 2u, 3u, 4u, 1u << 31}) {
      sampler.mix(one, nullptr, 1);
      EXPECT_EQ(sampler.draw({1, 2, 3, top_k, 0.7, top_p}), 1);
    }
}

TEST(Numbers, sha256_gives_the_published_digests) {
  Sha256 empty, abc, long_one;
  EXPECT_EQ(empty.hex(), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  abc.add("abc", 3);
  EXPECT_EQ(abc.hex(), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  const std::string many(1000000, 'a');
  long_one.add(many.data(), 17);
  long_one.add(many.data() + 17, many.size() - 17);
  EXPECT_EQ(long_one.hex(), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

static Matrix from_quaternion(const float* q) {
  const double x = q[0], y = q[1], z = q[2], w = q[3];
  return {1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y), 2 * (x * y + w * z), 1 - 2 * (x * x + z * z),
          2 * (y * z - w * x),     2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)};
}

// In other axes a vector v is M v, a rotation R is M R M^T, and what R does to v is the same thing seen there.
TEST(Numbers, layouts_are_the_same_motion_in_other_axes) {
  const Bundle bundle(bundle_folder);
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<float> frame(bundle.features);
  Walk walk;
  std::vector<float> poses[3];
  for (int t = 0; t < 5; ++t) {
    for (float& x : frame) x = normal(random);
    walk.step(frame.data(), bundle);
  }
  for (uint32_t layout = 0; layout < 3; ++layout) {
    poses[layout].resize(pose_floats(bundle));
    write_pose(frame.data(), walk, bundle, layout, poses[layout].data());
  }
  for (const uint32_t layout : {KT_LAYOUT_UNITY, KT_LAYOUT_UNREAL}) {
    for (size_t joint = 0; joint < bundle.joints.size(); ++joint) {
      const Matrix here = from_quaternion(poses[0].data() + 3 + 4 * joint), there = from_quaternion(poses[layout].data() + 3 + 4 * joint);
      const Vector v = {0.3, -1.1, 0.7};
      const auto apply = [](const Matrix& m, const Vector& x) {
        return Vector{m[0] * x[0] + m[1] * x[1] + m[2] * x[2], m[3] * x[0] + m[4] * x[1] + m[5] * x[2], m[6] * x[0] + m[7] * x[1] + m[8] * x[2]};
      };
      const Vector one = place_in(apply(here, v), layout), other = apply(there, place_in(v, layout));
      for (size_t i = 0; i < 3; ++i) EXPECT_LT(std::fabs(one[i] - other[i]), 1e-3);
    }
    const Vector root = place_in({poses[0][0], poses[0][1], poses[0][2]}, layout);
    for (size_t i = 0; i < 3; ++i) EXPECT_LT(std::fabs(root[i] - static_cast<double>(poses[layout][i])), 1e-2);
  }
  const Vector forward = place_in({0, 0, 1}, KT_LAYOUT_UNREAL), up = place_in({0, 1, 0}, KT_LAYOUT_UNREAL), left = place_in({1, 0, 0}, KT_LAYOUT_UNREAL);
  EXPECT_EQ(forward[0], 100);
  EXPECT_EQ(up[2], 100);
  EXPECT_EQ(left[1], -100);  // X forward, Z up, Y to the right
}

TEST(Numbers, a_long_walk_keeps_its_heading_a_rotation) {
  const Bundle bundle(bundle_folder);
  std::vector<float> frame(bundle.features, 0.1f);
  const float turn[6] = {0.999f, 0.01f, 0.04f, -0.01f, 1, 0};
  std::copy_n(turn, 6, frame.begin() + bundle.heading_at);
  Walk walk;
  for (int t = 0; t < 100000; ++t) walk.step(frame.data(), bundle);
  const Matrix& b = walk.back();
  const Matrix unit = product(b, {b[0], b[3], b[6], b[1], b[4], b[7], b[2], b[5], b[8]});
  for (size_t i = 0; i < 9; ++i) EXPECT_LT(std::fabs(unit[i] - (i % 4 == 0)), 1e-12);
}
