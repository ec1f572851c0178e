// A character: how it draws, what it has written, what lies unread. Who may touch what while the worker has it: see `job`.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <limits>

#include "bundle.hpp"
#include "memory.hpp"
#include "pose.hpp"
#include "sampling.hpp"

namespace kinetok {

struct Plan {  // what a prompt asks for
  uint32_t buffer = 0;       // which of the two text buffers holds its features, or will
  uint32_t rows = 0;         // of features
  uint32_t ids = 0;          // of a sentence that is still to be encoded; 0: the features are there
  double least = 0, most = 0;  // tokens from here on; most may be infinite
  uint32_t window = 0, keep = 0;
};

// How long a clip is, for a text of `text_rows` positions. Throws Error(KT_ERROR_ARGUMENT).
inline void set_budget(Plan& plan, const Bundle& bundle, double seconds, uint32_t positions, uint32_t text_rows) {
  const double rate = bundle.tokens_per_second, room = static_cast<double>(positions) - text_rows;
  if (room < 1) throw Error(KT_ERROR_ARGUMENT, "the prompt fills all %u positions: expected a shorter one, or open with more", positions);
  if (std::isinf(seconds)) {
    plan.least = plan.most = std::numeric_limits<double>::infinity();
  } else if (seconds > 0) {
    plan.least = plan.most = std::max(1.0, std::nearbyint(seconds * rate));
    if (plan.most > room && seconds <= bundle.max_seconds)
      throw Error(KT_ERROR_ARGUMENT, "seconds: %g s are %g tokens, but this prompt leaves room for %g; ask for less, or open with more positions",
                  seconds, plan.most, room);
  } else {
    plan.most = std::min(std::nearbyint(bundle.max_seconds * rate), room);
    plan.least = std::min(plan.most, std::nearbyint(bundle.min_seconds * rate));
  }
  constexpr double KEPT_SECONDS = 1;
  plan.window = static_cast<uint32_t>(std::min(std::nearbyint(bundle.max_seconds * rate), room));
  plan.keep = std::max(1u, std::min(static_cast<uint32_t>(std::nearbyint(KEPT_SECONDS * rate)), plan.window / 2));
}

enum class Task { prepare, advance };

// What is to be computed for a character and what came of it. The thread that computes touches this, the character's rows of
// the graphs and the text buffer named here, and nothing else of it; with_worker says whose turn it is.
struct Job {
  Task task = Task::prepare;
  Plan plan;                  // prepare: the text, and tokens to write behind it
  int32_t* replay = nullptr;  // [positions]
  uint32_t replayed = 0;
  uint32_t piece = 0;  // prepare: the next one to compute
  bool first = false;  // nothing of the clip was detokenized yet
  bool feed = false;   // advance: the newest token is to be decoded before the next is drawn
  bool drains = false;  // advance: no token more, only frames of those that are written; the first such job saves the
  bool saves = false, restores = false;  // detokenizer's state, and the first token of a clip that goes on restores it
  bool ban_end = false;
  sampling::Draw draw;
  double guidance = 1;
  int32_t token = 0;    // drawn
  bool writes = false;  // it is one more token, whose frames lie in the graphs
  bool ended = false;   // the end token came
  kt_status status = KT_OK;
  char error[128] = "";
  std::atomic<bool> finished{false}, abandoned{false};

  void fail(kt_status code, const char* why) {
    status = code;
    std::snprintf(error, sizeof error, "%s", why);
  }
};

struct Character {
  Character(const Bundle& bundle, uint32_t positions, uint32_t ahead_frames, Memory& memory)
      : ahead(ahead_frames), kept(positions) {
    tokens_ = memory.take<int32_t>(positions);
    unread_ = memory.take<float>(ahead, bundle.features);
    features_ = bundle.features;
    job.replay = memory.take<int32_t>(positions);
    for (auto& buffer : text) buffer = memory.take<float>(bundle.max_features, bundle.text_dim);
    for (auto& buffer : ids) buffer = memory.take<int64_t>(bundle.max_features);
  }

  // As after creation; the draws stay.
  void reset() {
    state = KT_IDLE;
    error[0] = '\0';
    written = 0;
    cached = 0;
    fresh = pending = ending = false;
    drained = 0;
    framed = 0;
    walk = Walk();
    first_ = count_ = 0;
  }

  void write_token(int32_t token) { tokens_[written++ % kept] = token; }
  int32_t token(uint64_t index) const { return tokens_[index % kept]; }
  uint32_t kept_tokens() const { return static_cast<uint32_t>(std::min<uint64_t>(written, kept)); }

  // When to prefill text and tokens anew, and how many of these, as in runtime/character.py: a window that is full, or in a clip
  // of more than a window one that shows a held pose, of which one token is kept.
  bool slides() const { return cached >= plan.window || (most > plan.window && cached > 2 * plan.keep && holds(written - 1)); }
  uint32_t slid_tokens() const { return holds(written) ? 1 : std::min(plan.keep, kept_tokens()); }

  // Few kinds of tokens among the last before number `end`, the newest one or what is to follow it.
  bool holds(uint64_t end) const {
    constexpr uint32_t HELD = 6;
    const uint32_t recent = static_cast<uint32_t>(std::min<uint64_t>(2 * plan.keep, end));
    uint32_t kinds = 0;
    for (uint64_t i = end - recent; i < end; ++i) {
      uint64_t other = end - recent;
      while (other < i && token(other) != token(i)) ++other;
      kinds += other == i;
    }
    return HELD * kinds <= recent;
  }

  uint32_t unread() const { return count_; }
  const float* frame(uint32_t index) const { return unread_ + size_t{(first_ + index) % ahead} * features_; }
  void push_frame(const float* frame) {
    std::copy_n(frame, features_, unread_ + size_t{(first_ + count_++) % ahead} * features_);
  }
  void drop_frame() { first_ = (first_ + 1) % ahead, --count_; }

  void copy_past(const Character& other) {
    for (uint32_t i = 0; i < kept; ++i) tokens_[i] = other.tokens_[i];
    for (uint32_t i = 0; i < other.plan.rows; ++i) {
      const size_t width = text_width;
      std::copy_n(other.text[other.plan.buffer] + i * width, width, text[other.plan.buffer] + i * width);
    }
  }

  // Handle.
  bool taken = false;
  uint32_t generation = 0;
  // Draws.
  uint64_t seed = 0;
  uint32_t request = 0, top_k = 0;
  double temperature = 1, top_p = 1, guidance = 1, seconds = 0;
  // Clip.
  uint32_t state = KT_IDLE;
  char error[128] = "";
  uint64_t written = 0;
  double least = 0, most = 0;  // in `written`'s count
  Plan plan;                   // under way
  uint32_t cached = 0;         // motion tokens behind the text in the cache
  bool fresh = false;          // the logits follow from all that is written
  bool pending = false;        // another prompt waits for the worker
  bool ending = false;         // the last token is written, but a tokenizer that looks ahead owes frames
  uint32_t drained = 0;        // pieces of what it owes
  uint64_t framed = 0;         // frames of the clip so far, read or not
  Plan next;
  bool with_worker = false;
  bool discard = false;  // cancelled or destroyed meanwhile: what the worker brings is not wanted
  Walk walk;  // of the frames that were read
  float* text[2] = {};
  int64_t* ids[2] = {};
  size_t text_width = 0;
  Job job;
  const uint32_t ahead, kept;

 private:
  int32_t* tokens_;  // a ring
  float* unread_;    // a ring of frames
  size_t features_;
  uint32_t first_ = 0, count_ = 0;
};

}  // namespace kinetok
