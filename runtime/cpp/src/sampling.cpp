#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace kinetok::sampling {

namespace {

constexpr float MINUS_INFINITY = -std::numeric_limits<float>::infinity();
constexpr float LOG[] = {-0.4999999701976776f, 0.33333322405815125f, -0.2500077188014984f, 0.2000196874141693f, -0.1662759929895401f,
                         0.1418900042772293f,  -0.131016343832016f,  0.12821748852729797f, -0.07866667956113815f};
constexpr float LN2_HIGH = 0.693359375f, LN2_LOW = -2.1219444170128554e-04f, LOG2_E = 1.4426950216293335f;
constexpr float EXP2[] = {1.0f,
                          0.6931469440460205f,
                          0.2402305006980896f,
                          0.05548042804002762f,
                          0.009684580378234386f,
                          0.0012387821916490793f,
                          0.00021877505059819669f};
constexpr int32_t SQRT_HALF_BITS = 0x3F3504F3;

template <typename To, typename From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <size_t N>
float horner(float x, const float (&c)[N]) {
  float r = c[N - 1];
  for (size_t i = N - 1; i-- > 0;) r = r * x + c[i];
  return r;
}

float noise(uint32_t word) {
  const float u = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
  return -log_fp32(-log_fp32(u));
}

// How many bits a weight has.
uint32_t width(uint32_t weight) { return weight ? (bits_as<uint32_t>(static_cast<float>(weight)) >> 23) - 126 : 0; }

// The weight that brings the sum of all from the largest on to `needed`. Reorders the weights; expected linear time.
uint32_t threshold(uint32_t* first, uint32_t* last, uint64_t needed) {
  uint64_t above = 0;
  while (true) {
    const uint32_t a = *first, b = first[(last - first) / 2], c = last[-1];
    const uint32_t pivot = std::max(std::min(a, b), std::min(std::max(a, b), c));
    uint64_t larger = 0, equal = 0;
    for (const uint32_t* p = first; p != last; ++p) {
      if (*p > pivot) larger += *p;
      if (*p == pivot) equal += *p;
    }
    if (above + larger >= needed) {
      last = std::partition(first, last, [pivot](uint32_t w) { return w > pivot; });
    } else if (above + larger + equal >= needed) {
      return pivot;
    } else {
      above += larger + equal;
      first = std::partition(first, last, [pivot](uint32_t w) { return w >= pivot; });
    }
  }
}

}  // namespace

std::array<uint32_t, 4> philox(std::array<uint32_t, 4> c, std::array<uint32_t, 2> k) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{c[0]} * 0xD2511F53u, p1 = uint64_t{c[2]} * 0xCD9E8D57u;
    c = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1), static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1],
         static_cast<uint32_t>(p0)};
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  return c;
}

float log_fp32(float x) {
  const int32_t bits = bits_as<int32_t>(x);
  // Shifting a negative number right keeps its sign on every compiler that matters, and in C++20 by definition.
  const int32_t exponent = (bits - SQRT_HALF_BITS) >> 23;
  const float f = bits_as<float>(bits - exponent * (1 << 23)) - 1.0f;
  const float e = static_cast<float>(exponent);
  const float t = (f * f) * horner(f, LOG) + e * LN2_LOW;
  return (f + t) + e * LN2_HIGH;
}

uint32_t exp2_weight(float x) {
  x = std::max(x, -40.0f);
  // Rounded down by hand: std::floor is a call on plain x86-64, which keeps compilers from doing several at once.
  const int32_t cut_off = static_cast<int32_t>(x), whole = cut_off - (static_cast<float>(cut_off) > x);
  const float scale = bits_as<float>((whole + 127 + 24) * (1 << 23));
  return static_cast<uint32_t>(static_cast<int32_t>(horner(x - static_cast<float>(whole), EXP2) * scale));
}

float gumbel(uint64_t seed, uint64_t position, uint32_t request, uint32_t token) {
  const auto words = philox({static_cast<uint32_t>(position), request, token / 4, 0},
                            {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  return noise(words[token % 4]);
}

void Sampler::mix(const float* logits, const float* empty, double guidance) {
  const float scale = static_cast<float>(guidance);
  if (!empty) {
    std::copy_n(logits, scores_.size(), scores_.begin());
    return;
  }
  for (size_t i = 0; i < scores_.size(); ++i) scores_[i] = empty[i] + (logits[i] - empty[i]) * scale;
}

void Sampler::ban(uint32_t token) { scores_[token] = MINUS_INFINITY; }

int32_t Sampler::greedy() const {
  return static_cast<int32_t>(std::max_element(scores_.begin(), scores_.end()) - scores_.begin());
}

int32_t Sampler::draw(const Draw& how) {
  for (const float score : scores_)
    if (std::isnan(score)) return NOT_FINITE;
  if (!std::isfinite(scores_[static_cast<size_t>(greedy())])) return NOT_FINITE;
  if (how.temperature == 0) return greedy();
  const float inverse = static_cast<float>(1.0 / how.temperature);
  for (float& score : scores_) score *= inverse;
  if (how.top_k || how.top_p < 1) cut(how);
  const std::array<uint32_t, 2> key = {static_cast<uint32_t>(how.seed), static_cast<uint32_t>(how.seed >> 32)};
  std::array<uint32_t, 4> words{};
  uint32_t block = UINT32_MAX;
  float best = MINUS_INFINITY;
  int32_t token = 0;
  for (uint32_t i = 0; i < scores_.size(); ++i) {
    if (scores_[i] == MINUS_INFINITY) continue;
    if (i / 4 != block) {
      block = i / 4;
      words = philox({static_cast<uint32_t>(how.position), how.request, block, 0}, key);
    }
    const float noisy = scores_[i] + noise(words[i % 4]);
    if (noisy > best) best = noisy, token = static_cast<int32_t>(i);
  }
  return token;
}

void Sampler::cut(const Draw& how) {
  if (how.top_k && how.top_k < scores_.size()) {
    std::copy(scores_.begin(), scores_.end(), order_.begin());
    const auto kth = order_.begin() + how.top_k - 1;
    std::nth_element(order_.begin(), kth, order_.end(), std::greater<float>());
    for (float& score : scores_)
      if (score < *kth) score = MINUS_INFINITY;
  }
  // nearbyint rounds half to even in the default mode, which nobody here changes.
  const auto share = static_cast<uint64_t>(std::max(1.0, std::nearbyint(how.top_p * 65536)));
  if (share >= 65536) return;
  const float most = scores_[static_cast<size_t>(greedy())];
  // Minus infinity weighs nothing.
  for (size_t i = 0; i < scores_.size(); ++i) weights_[i] = exp2_weight((scores_[i] - most) * LOG2_E);
  uint64_t total = 0, sums[33] = {};  // by width
  for (const uint32_t weight : weights_) sums[width(weight)] += weight;
  for (const uint64_t sum : sums) total += sum;
  // What is looked for has the width at which the sum from the widest on reaches what is needed: few weights are left.
  uint64_t needed = (total * share + 65535) >> 16;
  uint32_t wide = 32;
  for (; sums[wide] < needed; --wide) needed -= sums[wide];
  size_t count = 0;
  for (const uint32_t weight : weights_)
    if (width(weight) == wide) picked_[count++] = weight;
  const uint32_t least = threshold(picked_.data(), picked_.data() + count, needed);
  for (size_t i = 0; i < scores_.size(); ++i)
    if (weights_[i] < least) scores_[i] = MINUS_INFINITY;
}

}  // namespace kinetok::sampling
