// The model's worker: sentences, prefill, and the tokens that a new text carries over. It touches one character at a time.
#include <cstdio>

#include "model.hpp"

namespace kinetok {

void Model::work() {
  while (true) {
    uint32_t index = 0;
    {
      std::unique_lock<std::mutex> lock(mutex_);
      wanted_.wait(lock, [this] { return closing_ || queued_; });
      if (closing_) return;
      index = queue_[queue_first_];
      queue_first_ = (queue_first_ + 1) % queue_.size();
      --queued_;
    }
    Job& job = characters_[index].job;
    try {
      prepare(index);
    } catch (const Error& error) {
      job.status = error.status;
      std::snprintf(job.error, sizeof job.error, "%s", error.what());
    } catch (const std::exception& error) {
      job.status = KT_ERROR_INTERNAL;
      std::snprintf(job.error, sizeof job.error, "preparing a prompt: %s", error.what());
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      job.finished.store(true, std::memory_order_release);
    }
    done_.notify_all();
  }
}

void Model::prepare(uint32_t index) {
  Character& c = characters_[index];
  const Plan& plan = c.job.plan;
  float* features = c.text[plan.buffer];
  if (plan.ids) graphs_->encode(c.ids[plan.buffer], plan.ids, features, plan.rows);
  const uint32_t row = index * rows_;
  for (uint32_t part = 0; part < rows_; ++part) {
    if (c.job.abandoned) return;
    graphs_->prefill(row + part, part ? empty_.data() : features, part ? empty_rows_ : plan.rows);
  }
  for (uint32_t i = 0; i < c.job.replayed && !c.job.abandoned; ++i) {
    for (uint32_t part = 0; part < rows_; ++part) {
      graphs_->token[row + part] = c.job.replay[i];
      graphs_->position[row + part] = (part ? empty_rows_ : plan.rows) + i;
    }
    graphs_->decode(index, 1);
  }
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
