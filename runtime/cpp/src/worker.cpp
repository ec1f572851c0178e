// What a model computes beside its caller: sentences, prefill with the tokens that a new text carries over, and tokens.
#include <cstdio>

#include "model.hpp"

namespace kinetok {

namespace {

constexpr int32_t ENDED_AT_ONCE = 1;  // the one token of a clip whose end token comes first, as in the reference

}  // namespace

// Tokens and preparations take turns: who moves does not wait for the whole of somebody else's text, and the other way round.
void Model::work() {
  ort::inside = 0;
  for (bool tokens_turn = true;; tokens_turn = !tokens_turn) {
    Order order{};
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wanted_.wait(lock, [this] { return closing_ || !tokens_.empty() || !preparations_.empty(); });
      if (closing_) return;
      tokens_turn = preparations_.empty() || (tokens_turn && !tokens_.empty());
      order = (tokens_turn ? tokens_ : preparations_).front();
      if (tokens_turn) tokens_.pop();
    }
    if (tokens_turn) {
      compute(order.first, order.count);
      finish(order.first, order.count);
      continue;
    }
    bool last = true;
    Job& job = characters_[order.first].job;
    try {
      last = prepare(order.first);
    } catch (const Error& error) {
      job.fail(error.status, error.what());
    } catch (const std::exception& error) {
      job.fail(KT_ERROR_INTERNAL, error.what());
    }
    if (!last) continue;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      preparations_.pop();
    }
    finish(order.first, 1);
  }
}

void Model::finish(uint32_t first, uint32_t count) {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (uint32_t i = first; i < first + count; ++i) characters_[i].job.finished.store(true, std::memory_order_release);
  }
  done_.notify_all();
}

// One piece: the sentence, the text of a row, or a token behind it. True when it was the last.
bool Model::prepare(uint32_t index) {
  Character& c = characters_[index];
  Job& job = c.job;
  if (job.abandoned) return true;
  const Plan& plan = job.plan;
  float* features = c.text[plan.buffer];
  const uint32_t row = index * rows_, sentences = plan.ids ? 1 : 0, texts = sentences + rows_;
  const uint32_t piece = job.piece++;
  if (piece < sentences) {
    graphs_->encode(c.ids[plan.buffer], plan.ids, features, plan.rows);
  } else if (piece < texts) {
    const uint32_t part = piece - sentences;
    graphs_->prefill(row + part, part ? empty_ : features, part ? empty_rows_ : plan.rows);
  } else {
    for (uint32_t part = 0; part < rows_; ++part) {
      graphs_->token[row + part] = job.replay[piece - texts];
      graphs_->position[row + part] = (part ? empty_rows_ : plan.rows) + piece - texts;
    }
    graphs_->decode(index, 1);
  }
  return job.piece == texts + job.replayed;
}

// Calls `call(first, count)` for every run of neighbours within the range that fit; a call that throws fails them.
template <typename Fits, typename Call>
void Model::runs(uint32_t first, uint32_t count, Fits fits, Call call) {
  for (uint32_t at = first, end = first + count; at < end;) {
    uint32_t stop = at;
    while (stop < end && fits(characters_[stop].job)) ++stop;
    if (stop == at) {
      ++at;
      continue;
    }
    const auto fail = [&](kt_status status, const char* why) {
      for (uint32_t i = at; i < stop; ++i) characters_[i].job.fail(status, why);
    };
    try {
      call(at, stop - at);
    } catch (const Error& error) {
      fail(error.status, error.what());
    } catch (const std::exception& error) {
      fail(KT_ERROR_INTERNAL, error.what());
    }
    at = stop;
  }
}

// One token, and its frames, for each of `count` neighbours, as their jobs say.
void Model::compute(uint32_t first, uint32_t count) {
  runs(
      first, count, [](const Job& job) { return job.feed; }, [&](uint32_t at, uint32_t n) { graphs_->decode(at, n); });
  for (uint32_t i = first; i < first + count; ++i) {
    Job& job = characters_[i].job;
    if (job.drains)
      job.writes = true, job.ended = false, graphs_->pushed[i] = 0;  // any token: it lies behind the clip's end
    else
      draw(i);
  }
  runs(
      first, count, [](const Job& job) { return job.writes; },
      [&](uint32_t at, uint32_t n) {
        for (uint32_t i = at; i < at + n; ++i)
          start_detokenizer(i);
        graphs_->detokenize(at, n);
        const size_t numbers = size_t{bundle_.frames_per_token} * bundle_.features;
        for (uint32_t i = at; i < at + n; ++i) {
          const float* frames = graphs_->frames_of(i);
          if (!std::all_of(frames, frames + numbers, [](float x) { return std::isfinite(x); }))
            characters_[i].job.fail(KT_ERROR_BUNDLE, "the model decoded to NaN or infinity; are its weights whole?");
        }
      });
}

void Model::start_detokenizer(uint32_t index) {
  const Job& job = characters_[index].job;
  if (job.saves) graphs_->save_detokenizer(index);
  if (job.restores) graphs_->restore_detokenizer(index);
  if (job.first && !job.drains) graphs_->reset_detokenizer(index);
}

void Model::draw(uint32_t index) {
  Job& job = characters_[index].job;
  job.writes = job.ended = false;
  if (job.status != KT_OK) return;
  const uint32_t row = index * rows_;
  sampler_.mix(graphs_->logits_of(row), job.guidance == 1 ? nullptr : graphs_->logits_of(row + 1), job.guidance);
  for (const uint32_t id : bundle_.banned) sampler_.ban(id);
  if (job.ban_end) sampler_.ban(static_cast<uint32_t>(bundle_.end_id));
  job.token = sampler_.draw(job.draw);
  if (job.token == sampling::NOT_FINITE) return job.fail(KT_ERROR_BUNDLE, "expected finite logits; are the model's weights whole?");
  job.ended = job.token == bundle_.end_id;
  job.writes = !job.ended || job.first;
  if (job.ended) job.token = ENDED_AT_ONCE;
  graphs_->pushed[index] = job.token;
}

void Model::wait_for_worker() {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] {
    for (const Character& c : characters_)
      if (c.with_worker && c.job.finished.load(std::memory_order_relaxed)) return true;
    return false;
  });
}

}  // namespace kinetok
