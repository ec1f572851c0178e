#include "sampling.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>

namespace kinetok::sampling {

namespace {

constexpr size_t LANES = 32;  // numbers that a loop takes together; GCC takes a loop of 16 apart before it looks for vectors
constexpr size_t QUADS = 64;  // four neighbouring tokens share a call of Philox: so many calls are made together
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

bool any_above(const float* x, float more, float bound) {  // of LANES numbers
  uint32_t any = 0;
  for (size_t i = 0; i < LANES; ++i) any |= x[i] + more > bound;
  return any;
}

// The weight that brings the sum of all from the largest on to `needed`: the largest bound that leaves so much of them. `low` leaves
// so much. count is a multiple of LANES.
int32_t threshold(const int32_t* weights, size_t count, int32_t low, uint64_t needed) {
  int32_t high = 1 << 25;  // above every weight; LANES of them do not overflow
  while (high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    uint64_t sum = 0;
    for (size_t i = 0; i < count; i += LANES) {
      int32_t part = 0;
      for (size_t j = 0; j < LANES; ++j) part += weights[i + j] >= middle ? weights[i + j] : 0;
      sum += static_cast<uint32_t>(part);
    }
    (sum >= needed ? low : high) = middle;
  }
  return low;
}

// The best token so far, and quads in rising order that have not been looked at.
struct Race {
  float best = MINUS_INFINITY;
  int32_t token = 0;
  size_t count = 0;
  uint32_t quads[QUADS] = {};
  float scores[4 * QUADS] = {};

  void run(const Draw& how) {
    const std::array<uint32_t, 2> key = {static_cast<uint32_t>(how.seed), static_cast<uint32_t>(how.seed >> 32)};
    const auto position = static_cast<uint32_t>(how.position);
    uint32_t words[4 * QUADS], any = 0;
    for (size_t q = 0; q < QUADS; ++q) {
      const auto four = philox({position, how.request, quads[q], 0}, key);
      for (size_t i = 0; i < 4; ++i) words[4 * q + i] = four[i];
    }
    // Few tokens could win by their limits, and only they need their noise.
    for (size_t i = 0; i < 4 * QUADS; ++i) any |= scores[i] + noise_limit(words[i]) > best;
    for (size_t i = 0; any && i < 4 * count; ++i) {
      if (!(scores[i] + noise_limit(words[i]) > best)) continue;
      const float noisy = scores[i] + noise(words[i]);
      if (noisy > best) best = noisy, token = static_cast<int32_t>(4 * quads[i / 4] + i % 4);
    }
    count = 0;
  }
};

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

int32_t exp2_weight(float x) {
  // Rounded down by hand: std::floor is a call on plain x86-64, which keeps compilers from doing several at once.
  const int32_t cut_off = static_cast<int32_t>(x), whole = cut_off - (static_cast<float>(cut_off) > x);
  const float scale = bits_as<float>((whole + 127 + 24) * (1 << 23));
  return static_cast<int32_t>(horner(x - static_cast<float>(whole), EXP2) * scale);
}

float noise(uint32_t word) {
  const float u = (static_cast<float>(word >> 9) + 0.5f) * 0x1p-23f;
  return -log_fp32(-log_fp32(u));
}

float noise_limit(uint32_t word) {
  // -ln(-ln u) <= -ln(1 - u), and a number's bits, read as an integer, are a chord under its logarithm.
  const float rest = (8388607.5f - static_cast<float>(static_cast<int32_t>(word >> 9))) * 0x1p-23f;  // 1 - u, exact
  return static_cast<float>(0x3F800000 - bits_as<int32_t>(rest)) * (0.6931472f * 0x1p-23f) + 1e-5f;  // more than what was rounded
}

float gumbel(uint64_t seed, uint64_t position, uint32_t request, uint32_t token) {
  const auto words = philox({static_cast<uint32_t>(position), request, token / 4, 0},
                            {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)});
  return noise(words[token % 4]);
}

Sampler::Sampler(size_t classes, std::pmr::memory_resource* memory)
    : classes_(classes),
      scores_((classes + LANES - 1) / LANES * LANES, MINUS_INFINITY, memory),
      order_(classes, memory),
      weights_(scores_.size(), memory),
      picked_(scores_.size(), memory) {}

void Sampler::mix(const float* logits, const float* empty, double guidance) {
  const float scale = static_cast<float>(guidance);
  if (!empty) {
    std::copy_n(logits, classes_, scores_.begin());
    return;
  }
  for (size_t i = 0; i < classes_; ++i) scores_[i] = empty[i] + (logits[i] - empty[i]) * scale;
}

void Sampler::ban(uint32_t token) { scores_[token] = MINUS_INFINITY; }

float Sampler::largest() const {
  float top[LANES];
  uint32_t nan[LANES] = {};
  std::fill_n(top, LANES, MINUS_INFINITY);
  for (size_t i = 0; i < scores_.size(); i += LANES)
    for (size_t j = 0; j < LANES; ++j) {
      const float x = scores_[i + j];
      top[j] = x > top[j] ? x : top[j];
      nan[j] |= x != x;
    }
  if (std::find(nan, nan + LANES, 1) != nan + LANES) return std::numeric_limits<float>::quiet_NaN();
  return *std::max_element(top, top + LANES);
}

int32_t Sampler::draw(const Draw& how) {
  const float most = largest();
  if (!std::isfinite(most)) return NOT_FINITE;
  if (how.temperature == 0) return static_cast<int32_t>(std::find(scores_.begin(), scores_.end(), most) - scores_.begin());
  const float inverse = static_cast<float>(1.0 / how.temperature);
  for (float& score : scores_) score *= inverse;
  if (how.top_k || how.top_p < 1) cut(how, most * inverse);
  const float most_noise = noise_limit(UINT32_MAX);
  Race race;
  for (size_t at = 0; at < scores_.size(); at += LANES) {
    if (!any_above(&scores_[at], most_noise, race.best)) continue;
    for (size_t i = at; i < at + LANES; i += 4) {
      const float* x = &scores_[i];
      std::copy_n(x, 4, race.scores + 4 * race.count);
      race.quads[race.count] = static_cast<uint32_t>(i / 4);
      race.count += std::max(std::max(x[0], x[1]), std::max(x[2], x[3])) + most_noise > race.best;
    }
    if (race.count + LANES / 4 > QUADS) race.run(how);
  }
  race.run(how);
  return race.token;
}

void Sampler::cut(const Draw& how, float most) {
  if (how.top_k && how.top_k < classes_) {
    std::copy_n(scores_.begin(), classes_, order_.begin());
    const auto kth = order_.begin() + how.top_k - 1;
    std::nth_element(order_.begin(), kth, order_.end(), std::greater<float>());
    const float least = *kth;
    for (float& score : scores_) score = score < least ? MINUS_INFINITY : score;
  }
  // nearbyint rounds half to even in the default mode, which nobody here changes.
  const auto share = static_cast<uint64_t>(std::max(1.0, std::nearbyint(how.top_p * 65536)));
  if (share >= 65536) return;
  const size_t size = scores_.size();
  for (size_t i = 0; i < size; i += LANES) {
    float x[LANES];  // its own loop: compilers that see what follows from x = -40 branch there, and take numbers one by one
    for (size_t j = 0; j < LANES; ++j) x[j] = std::max(-40.0f, (scores_[i + j] - most) * LOG2_E);
    for (size_t j = 0; j < LANES; ++j) weights_[i + j] = exp2_weight(x[j]);  // minus infinity weighs nothing
  }
  uint64_t total = 0;
  for (const int32_t weight : weights_) total += static_cast<uint32_t>(weight);
  const uint64_t needed = (total * share + 65535) >> 16;
  // Weights below `low` add up to less than what is not needed, so that what is looked for is not among them. Few others are left.
  const auto low = static_cast<int32_t>((total - needed) / size);
  size_t count = 0;
  for (const int32_t weight : weights_) {
    picked_[count] = weight;
    count += weight >= low;
  }
  while (count % LANES) picked_[count++] = 0;
  const int32_t least = threshold(picked_.data(), count, low, needed);
  for (size_t i = 0; i < size; ++i) scores_[i] = weights_[i] < least ? MINUS_INFINITY : scores_[i];
}

}  // namespace kinetok::sampling
