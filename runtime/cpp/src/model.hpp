// A model under way: its characters, what is called when inside a frame's budget, and the worker beside it.
#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>

#include "character.hpp"
#include "graphs.hpp"
#include "sampling.hpp"
#include "wordpiece.hpp"

namespace kinetok {

class Model {
 public:
  Model(const char* bundle, const kt_model_options& options);
  ~Model();

  const Bundle& bundle() const { return bundle_; }
  const kt_model_options& options() const { return options_; }
  const std::string& runtime_version() const { return runtime_.version; }
  const std::string& provider() const { return provider_.name; }
  uint64_t memory_bytes() const { return memory_.total(); }
  bool in_line() const { return options_.flags & KT_OPEN_INLINE; }
  bool guided() const { return rows_ == 2; }
  bool has_text() const { return graphs_->encodes(); }

  // Index of a character; throws Error(KT_ERROR_FULL).
  uint32_t create(const kt_character_options& options);
  void destroy(uint32_t index);
  Character* character(uint32_t index, uint32_t generation);  // nullptr where that is over
  void prompt(uint32_t index, const kt_prompt_source& source);
  kt_step_report step(uint32_t budget_us);
  uint32_t fork(uint32_t index, uint64_t seed, uint32_t request);
  void cancel(uint32_t index);
  uint32_t read(uint32_t index, uint32_t layout, float* buffer, uint32_t frames);
  uint32_t generation(uint32_t index) const { return characters_[index].generation; }
  kt_character_options defaults() const;

 private:
  using Clock = std::chrono::steady_clock;

  void measure();
  void find_empty();
  uint32_t free_place();
  void begin(uint32_t index, const Plan& plan);
  void prepare_later(uint32_t index, const Plan& plan, uint32_t tokens);
  void queue(uint32_t index, uint32_t count);
  void take_back();
  void take_prepared(Character& c);
  void take_token(uint32_t index);
  void take_frames(uint32_t index);
  void fail(Character& c, const char* why);
  bool can_write(const Character& c) const;
  bool choose(double budget_us, uint32_t& first, uint32_t& count) const;
  void order(uint32_t first, uint32_t count);
  double expected(uint32_t count) const;
  void learn(uint32_t count, double us);

  // On the thread that computes: the worker, or with KT_OPEN_INLINE the caller for tokens.
  void compute(uint32_t first, uint32_t count);
  void start_detokenizer(uint32_t index);
  void draw(uint32_t index);
  template <typename Fits, typename Call>
  void runs(uint32_t first, uint32_t count, Fits fits, Call call);
  void work();
  bool prepare(uint32_t index);
  void finish(uint32_t first, uint32_t count);
  void wait_for_worker();

  const Bundle bundle_;
  kt_model_options options_;
  uint32_t rows_;
  Memory memory_;
  ort::Runtime runtime_;
  ort::Provider provider_;
  std::unique_ptr<Graphs> graphs_;
  std::unique_ptr<WordPiece> words_;
  float *bank_, *empty_ = nullptr;  // features; empty_ [empty_rows_, text_dim] of the empty text
  uint32_t empty_rows_ = 0;
  int64_t* ids_;  // of a sentence, until its prompt is sure to be taken
  sampling::Sampler sampler_;
  std::deque<Character> characters_;  // never moved
  uint32_t written_ = 0;              // tokens that take_token took since the last report
  double cost_[Graphs::TOGETHER + 1] = {};  // microseconds of a token for so many characters, measured at first
  double slowness_ = 1;                     // how much longer calls take now

  std::mutex mutex_;
  std::condition_variable wanted_, done_;
  struct Order {
    uint32_t first, count;
  };
  class Queue {  // first in, first out; room for every character
   public:
    explicit Queue(size_t most) : ring_(most) {}
    bool empty() const { return !count_; }
    void push(Order order) { ring_[(first_ + count_++) % ring_.size()] = order; }
    Order front() const { return ring_[first_]; }
    void pop() { first_ = (first_ + 1) % ring_.size(), --count_; }

   private:
    std::vector<Order> ring_;
    size_t first_ = 0, count_ = 0;
  };
  Queue tokens_, preparations_;
  bool closing_ = false;
  std::thread worker_;  // last: it uses all the others
};

}  // namespace kinetok
