// Philox, Gumbel noise and the drawing of a token, to the bit as docs/numerics.md defines them.
//
// This file and its .cpp are compiled without fused multiply-adds: every operation rounds once.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory_resource>
#include <vector>

namespace kinetok::sampling {

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> counter, std::array<uint32_t, 2> key);
float log_fp32(float x);           // of positive normal numbers
int32_t exp2_weight(float x);      // floor(2^x * 2^24), -40 <= x <= 0
float noise(uint32_t word);        // Gumbel noise of a word of Philox
float noise_limit(uint32_t word);  // at least noise(word); of UINT32_MAX: at least any word's
float gumbel(uint64_t seed, uint64_t position, uint32_t request, uint32_t token);

struct Draw {  // the name of a draw, and how it is drawn
  uint64_t seed = 0, position = 0;
  uint32_t request = 0, top_k = 0;
  double temperature = 1, top_p = 1;
};

inline constexpr int32_t NOT_FINITE = -1;

class Sampler {
 public:
  explicit Sampler(size_t classes, std::pmr::memory_resource* memory = std::pmr::get_default_resource());
  // scores[i] = empty + (logits - empty) * guidance; empty nullptr: the logits.
  void mix(const float* logits, const float* empty, double guidance);
  void ban(uint32_t token);
  // The token, or NOT_FINITE where the largest score is no finite number. Spoils the scores.
  int32_t draw(const Draw& how);

 private:
  float largest() const;                  // NaN if any score is
  void cut(const Draw& how, float most);  // -inf for what top-k and top-p leave out; most: the largest score
  size_t classes_;
  std::pmr::vector<float> scores_, order_;  // the scores are filled up with -inf for loops without a rest
  std::pmr::vector<int32_t> weights_, picked_;
};

}  // namespace kinetok::sampling
