// Noise, drawing, hashes, poses.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>

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
