#include "model.hpp"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <utility>

namespace kinetok {

namespace {

constexpr int64_t UNKNOWN_END = int64_t{1} << 40;  // more tokens than any clip has
constexpr double MEASURE_US = 2e5;
constexpr double CARRIED_SECONDS = 2.0 / 15;  // with more behind a new text, the old motion goes on (docs/streaming.md)
constexpr int MEASURE_RUNS = 3;

double microseconds(std::chrono::steady_clock::duration time) { return std::chrono::duration<double, std::micro>(time).count(); }

kt_model_options complete(kt_model_options options, const Bundle& bundle) {
  if (!options.characters) options.characters = 8;
  if (!options.positions) options.positions = bundle.positions;
  if (!options.ahead_frames) options.ahead_frames = 16;
  if (!options.threads) options.threads = 1;
  const auto within = [](const char* name, uint32_t value, uint32_t low, uint32_t high) {
    if (value < low || value > high) throw Error(KT_ERROR_ARGUMENT, "%s: expected %u to %u, got %u", name, low, high, value);
  };
  within("characters", options.characters, 1, 4096);
  within("positions", options.positions, 2, bundle.positions);
  within("ahead_frames", options.ahead_frames, bundle.frames_per_token, 1u << 16);
  within("threads", options.threads, 1, 256);
  if (options.flags & ~uint32_t{KT_OPEN_NO_TEXT | KT_OPEN_NO_HASHES | KT_OPEN_NO_GUIDANCE | KT_OPEN_INLINE})
    throw Error(KT_ERROR_ARGUMENT, "flags: expected KT_OPEN_... values, got %#x", options.flags);
  if (!options.allocate != !options.release) throw Error(KT_ERROR_ARGUMENT, "expected both allocate and release, or neither");
  return options;
}

uint32_t rows_each(const Bundle& bundle, uint32_t flags) {
  if (flags & KT_OPEN_NO_GUIDANCE) return 1;
  const bool banked = std::any_of(bundle.bank.begin(), bundle.bank.end(), [](const BankPrompt& p) { return p.text.empty(); });
  return banked || (bundle.has_graph("text_encoder") && !(flags & KT_OPEN_NO_TEXT)) ? 2 : 1;
}

}  // namespace

Model::Model(const char* folder, const kt_model_options& options)
    : bundle_(folder),
      options_(complete(options, bundle_)),
      rows_(rows_each(bundle_, options.flags)),
      memory_(options_),
      runtime_(options.onnxruntime ? options.onnxruntime : ""),
      provider_(runtime_, options.provider ? options.provider : "cpu"),
      sampler_(bundle_.logits, &memory_),
      tokens_(options_.characters),
      preparations_(options_.characters) {
  const bool hash = !(options_.flags & KT_OPEN_NO_HASHES);
  graphs_ = std::make_unique<Graphs>(bundle_, runtime_, provider_, options_, rows_, memory_);
  if (graphs_->encodes()) words_ = std::make_unique<WordPiece>(bundle_.text, read_file(bundle_.file(bundle_.text.vocab, hash), 64u << 20), &memory_);
  bank_ = bundle_.bank_features(hash, memory_);
  find_empty();
  for (uint32_t i = 0; i < options_.characters; ++i) {
    characters_.emplace_back(bundle_, options_.positions, options_.ahead_frames, memory_);
    characters_.back().text_width = bundle_.text_dim;
  }
  ids_ = memory_.take<int64_t>(bundle_.max_features);
  measure();
  worker_ = std::thread([this] { work(); });
}

Model::~Model() {
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    for (Character& c : characters_) c.job.abandoned = true;
  }
  wanted_.notify_all();
  if (worker_.joinable()) worker_.join();
}

void Model::find_empty() {
  if (rows_ == 1) return;
  for (const BankPrompt& prompt : bundle_.bank) {
    if (!prompt.text.empty()) continue;
    empty_ = bank_ + size_t{prompt.row} * bundle_.text_dim;
    empty_rows_ = prompt.rows;
    return;
  }
  std::vector<int64_t> ids(bundle_.text.max_ids);
  const uint32_t count = words_->encode("", ids.data(), bundle_.text.max_ids);
  empty_rows_ = count + bundle_.max_features - bundle_.text.max_ids;
  empty_ = memory_.take<float>(empty_rows_, bundle_.text_dim);
  graphs_->encode(ids.data(), count, empty_, empty_rows_);
}

// What a token costs, by groups of every size; ONNX Runtime also takes its own memory in its first calls.
void Model::measure() {
  const auto began = Clock::now();
  for (uint32_t count = 1; count <= std::min(Graphs::TOGETHER, options_.characters); ++count) {
    const bool late = microseconds(Clock::now() - began) > MEASURE_US;  // a large model: sizes cost their share
    cost_[count] = late ? cost_[count - 1] * count / (count - 1) : std::numeric_limits<double>::infinity();
    for (int run = 0; run < MEASURE_RUNS && !late; ++run) {
      const auto start = Clock::now();
      graphs_->decode(0, count);
      for (uint32_t i = 0; i < count; ++i) {
        sampler_.mix(graphs_->logits_of(i * rows_), guided() ? graphs_->logits_of(i * rows_ + 1) : nullptr, bundle_.guidance);
        sampler_.draw({0, 0, 0, bundle_.top_k, bundle_.temperature, bundle_.top_p});
      }
      graphs_->detokenize(0, count);
      cost_[count] = std::min(cost_[count], microseconds(Clock::now() - start));
    }
  }
}

kt_character_options Model::defaults() const {
  kt_character_options options{};
  options.size = sizeof options;
  options.abi = KT_ABI_VERSION;
  options.top_k = bundle_.top_k;
  options.temperature = bundle_.temperature;
  options.top_p = bundle_.top_p;
  options.guidance = guided() ? bundle_.guidance : 1;
  return options;
}

uint32_t Model::free_place() {
  take_back();
  while (true) {
    bool leaving = false;
    for (uint32_t i = 0; i < characters_.size(); ++i) {
      const Character& c = characters_[i];
      if (!c.taken && !c.with_worker) return i;
      leaving |= !c.taken;
    }
    if (!leaving) throw Error(KT_ERROR_FULL, "all %u characters are taken: destroy one, or open the model with more", options_.characters);
    wait_for_worker();  // it notices within one call that this one is not wanted any more
    take_back();
  }
}

uint32_t Model::create(const kt_character_options& o) {
  const auto check = [](bool fine, const char* what, double got) {
    if (!fine) throw Error(KT_ERROR_ARGUMENT, "%s, got %g", what, got);
  };
  check(o.temperature == 0 || (o.temperature >= 1e-3 && o.temperature <= 100), "temperature: expected 0 (greedy), or 0.001 to 100", o.temperature);
  check(o.top_p >= 1e-4 && o.top_p <= 1, "top_p: expected 0.0001 to 1 (off)", o.top_p);
  check(o.guidance >= 0 && o.guidance <= 100, "guidance: expected 0 to 100 (1: off)", o.guidance);
  check(o.guidance == 1 || guided(), "guidance: this model has no features of the empty text, or was opened without; expected 1", o.guidance);
  check(o.seconds == 0 || (o.seconds >= 1e-3 && (o.seconds <= 600 || std::isinf(o.seconds))), "seconds: expected 0 (the model decides), 0.001 to 600, or infinity", o.seconds);
  const uint32_t index = free_place();
  Character& c = characters_[index];
  c.reset();
  c.taken = true;
  c.generation = (c.generation + 1) & 0xFFFFFF;
  if (!c.generation) c.generation = 1;
  c.seed = o.seed, c.request = o.request, c.top_k = o.top_k;
  c.temperature = o.temperature, c.top_p = o.top_p, c.guidance = o.guidance, c.seconds = o.seconds;
  return index;
}

Character* Model::character(uint32_t index, uint32_t generation) {
  if (index >= characters_.size()) return nullptr;
  Character& c = characters_[index];
  return c.taken && c.generation == generation ? &c : nullptr;
}

void Model::destroy(uint32_t index) {
  cancel(index);
  characters_[index].taken = false;
}

void Model::cancel(uint32_t index) {
  Character& c = characters_[index];
  c.reset();
  c.discard = c.job.abandoned = c.with_worker;
}

void Model::prompt(uint32_t index, const kt_prompt_source& source) {
  Character& c = characters_[index];
  take_back();
  if (c.state == KT_FAILED) throw Error(KT_ERROR_STATE, "this character has failed: kt_cancel it before another prompt");
  Plan plan;
  // The worker may be reading the buffer of the plan under way.
  plan.buffer = 1 - (c.with_worker ? c.job.plan.buffer : c.plan.buffer);
  const float* features = nullptr;
  if (source.text) {
    if (!words_) throw Error(KT_ERROR_STATE, "this model has no text encoder that this library runs (MiniLM; not Flan-T5), or was opened without: give a banked prompt or features");
    plan.ids = words_->encode(source.text, ids_, bundle_.text.max_ids);
    plan.rows = plan.ids + bundle_.max_features - bundle_.text.max_ids;
  } else if (source.features) {
    features = source.features;
    plan.rows = source.rows;
    if (!plan.rows || plan.rows > bundle_.max_features) throw Error(KT_ERROR_ARGUMENT, "rows: expected 1 to %u, got %u", bundle_.max_features, plan.rows);
    if (!std::all_of(features, features + size_t{plan.rows} * bundle_.text_dim, [](float x) { return std::isfinite(x); }))
      throw Error(KT_ERROR_ARGUMENT, "features: expected finite numbers");
  } else {
    if (source.banked > bundle_.bank.size()) throw Error(KT_ERROR_ARGUMENT, "banked: expected the id of one of %zu prompts, plus 1, got %u", bundle_.bank.size(), source.banked);
    const BankPrompt& prompt = bundle_.bank[source.banked - 1];
    features = bank_ + size_t{prompt.row} * bundle_.text_dim;
    plan.rows = prompt.rows;
  }
  set_budget(plan, bundle_, c.seconds, options_.positions, std::max(plan.rows, empty_rows_));
  // From here on nothing fails: a call that does leaves the prompt before it as it was.
  std::copy_n(ids_, plan.ids, c.ids[plan.buffer]);
  if (features) std::copy_n(features, size_t{plan.rows} * bundle_.text_dim, c.text[plan.buffer]);
  if (c.with_worker) {
    c.pending = true;
    c.next = plan;
    c.job.abandoned = c.discard || c.job.task == Task::prepare;  // a token under way is still wanted
    return;
  }
  begin(index, plan);
}

// A prompt takes over, with the newest motion behind it, as in runtime/sampling.py.
void Model::begin(uint32_t index, const Plan& plan) {
  Character& c = characters_[index];
  const auto carried = static_cast<uint32_t>(std::max(1.0, std::nearbyint(CARRIED_SECONDS * bundle_.tokens_per_second)));
  c.least = static_cast<double>(c.written) + plan.least;
  c.most = static_cast<double>(c.written) + plan.most;
  c.plan = plan;
  c.ending = false;
  prepare_later(index, plan, std::min({carried, c.kept_tokens(), plan.window}));
}

void Model::prepare_later(uint32_t index, const Plan& plan, uint32_t tokens) {
  Character& c = characters_[index];
  Job& job = c.job;
  job.task = Task::prepare;
  job.plan = plan;
  job.first = c.written == 0;
  job.replayed = tokens;
  job.piece = 0;
  for (uint32_t i = 0; i < tokens; ++i) job.replay[i] = c.token(c.written - tokens + i);
  c.fresh = false;
  c.state = KT_PREPARING;
  queue(index, 1);
}

// Hands `count` characters, whose jobs are filled in, to the worker.
void Model::queue(uint32_t first, uint32_t count) {
  for (uint32_t i = first; i < first + count; ++i) {
    Character& c = characters_[i];
    c.with_worker = true;
    c.job.status = KT_OK;
    c.job.abandoned = false;
    c.job.finished = false;
  }
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    (characters_[first].job.task == Task::advance ? tokens_ : preparations_).push({first, count});
  }
  wanted_.notify_one();
}

void Model::take_back() {
  for (uint32_t i = 0; i < characters_.size(); ++i) {
    Character& c = characters_[i];
    if (!c.with_worker || !c.job.finished.load(std::memory_order_acquire)) continue;
    c.with_worker = false;
    if (!std::exchange(c.discard, false)) {
      if (c.job.task == Task::advance)
        take_token(i);
      else if (!c.pending)
        take_prepared(c);
    }
    if (!std::exchange(c.pending, false)) continue;
    if (c.with_worker) {  // taking its token filled its window
      c.pending = true;
      c.job.abandoned = true;
    } else if (c.state != KT_FAILED) {
      begin(i, c.next);
    }
  }
}

void Model::take_prepared(Character& c) {
  if (c.job.status != KT_OK) return fail(c, c.job.error);
  c.plan.ids = 0;  // the features are there now
  c.cached = c.job.replayed;
  c.fresh = true;
  c.state = KT_RUNNING;
}

// The token that a character's job has drawn, and its frames.
void Model::take_token(uint32_t index) {
  Character& c = characters_[index];
  const Job& job = c.job;
  if (job.status != KT_OK) return fail(c, job.error);
  c.cached += job.feed;
  if (!job.drains) c.fresh = !job.writes;
  if (job.writes) take_frames(index);
  if (job.writes && !job.drains) {
    c.write_token(job.token);
    ++written_;
  }
  c.drained += job.drains;
  if (!job.drains) c.ending = job.ended || static_cast<double>(c.written) >= c.most;
  if (c.ending && c.drained * bundle_.frames_per_token >= bundle_.delay_frames)
    c.state = KT_DONE;
  else if (c.ending)
    return;
  else if (c.slides())
    prepare_later(index, c.plan, c.slid_tokens());
}

// Of the frames that a call gave: those that the clip has and that were not there before.
void Model::take_frames(uint32_t index) {
  Character& c = characters_[index];
  const int64_t each = bundle_.frames_per_token, end = static_cast<int64_t>(c.written + !c.job.drains) * each;
  const int64_t first = static_cast<int64_t>(c.written + c.drained) * each - bundle_.delay_frames;
  for (int64_t f = 0; f < each; ++f) {
    if (first + f < static_cast<int64_t>(c.framed) || first + f >= end) continue;
    c.push_frame(graphs_->frames_of(index) + f * bundle_.features);
    ++c.framed;
  }
}

void Model::fail(Character& c, const char* why) {
  c.state = KT_FAILED;
  std::snprintf(c.error, sizeof c.error, "%s", why);
}

bool Model::can_write(const Character& c) const {
  return c.taken && c.state == KT_RUNNING && !c.with_worker && c.unread() + bundle_.frames_per_token <= c.ahead;
}

double Model::expected(uint32_t count) const { return cost_[count] * slowness_; }

// What was measured at first holds for an idle machine. Dear surprises count more than cheap ones: a frame that is late is seen,
// one that is early is not.
void Model::learn(uint32_t count, double us) {
  const double now = us / cost_[count];
  slowness_ += (now - slowness_) * (now > slowness_ ? 0.3 : 0.1);
}

// The hungriest character, with as many of its neighbours as make a token cheapest and fit the budget.
bool Model::choose(double budget_us, uint32_t& first, uint32_t& count) const {
  uint32_t best = UINT32_MAX;
  for (uint32_t i = 0; i < characters_.size(); ++i)
    if (can_write(characters_[i]) && (best == UINT32_MAX || characters_[i].unread() < characters_[best].unread())) best = i;
  if (best == UINT32_MAX) return false;
  first = best, count = 1;
  for (uint32_t at = best, n = 1; n < Graphs::TOGETHER && expected(n + 1) <= budget_us;) {
    const bool left = at > 0 && can_write(characters_[at - 1]);
    const bool right = at + n < characters_.size() && can_write(characters_[at + n]);
    if (!left && !right) break;
    if (left && (!right || characters_[at - 1].unread() <= characters_[at + n].unread())) --at;
    ++n;
    if (cost_[n] / n <= cost_[count] / count) first = at, count = n;
  }
  return true;
}

// Fills in the jobs of `count` neighbours for one token each.
void Model::order(uint32_t first, uint32_t count) {
  for (uint32_t i = first; i < first + count; ++i) {
    Character& c = characters_[i];
    c.job.task = Task::advance;
    c.job.status = KT_OK;
    c.job.drains = c.ending;
    c.job.saves = c.ending && !c.drained;
    c.job.restores = !c.ending && c.drained;
    if (!c.ending) c.drained = 0;
    c.job.feed = !c.fresh && !c.ending;
    c.job.ban_end = static_cast<double>(c.written) < c.least;
    c.job.first = c.written == 0;
    c.job.draw = {c.seed, c.written, c.request, c.top_k, c.temperature, c.top_p};
    c.job.guidance = c.guidance;
    graphs_->before[i] = static_cast<int64_t>(c.written) + c.drained;
    graphs_->ends[i] = c.ending ? static_cast<int64_t>(c.written) : UNKNOWN_END;
    if (!c.job.feed) continue;
    for (uint32_t row = 0; row < rows_; ++row) {
      graphs_->token[i * rows_ + row] = c.token(c.written - 1);
      graphs_->position[i * rows_ + row] = (row ? empty_rows_ : c.plan.rows) + c.cached;
    }
  }
}

kt_step_report Model::step(uint32_t budget_us) {
  const auto began = Clock::now();
  const bool unlimited = budget_us == KT_UNLIMITED;
  const auto left = [&] { return unlimited ? 1e18 : budget_us - microseconds(Clock::now() - began); };
  take_back();
  for (bool any = false; budget_us;) {
    uint32_t first = 0, count = 0;
    if (choose(in_line() ? left() : 1e18, first, count)) {
      if (any && expected(count) > left()) break;
      order(first, count);
      if (!in_line()) {
        queue(first, count);
        continue;
      }
      any = true;
      const auto before = Clock::now();
      compute(first, count);
      for (uint32_t i = first; i < first + count; ++i) take_token(i);
      // The first token after a text needs no decoding, nor do the last frames of one that looks ahead: they say little of the rest.
      const auto whole = [](const Character& c) { return c.job.feed; };
      if (std::all_of(characters_.begin() + first, characters_.begin() + first + count, whole)) learn(count, microseconds(Clock::now() - before));
      continue;
    }
    if (!unlimited || std::none_of(characters_.begin(), characters_.end(), [](const Character& c) { return c.with_worker; })) break;
    wait_for_worker();
    take_back();
  }
  kt_step_report report{};
  report.tokens = std::exchange(written_, 0);
  for (const Character& c : characters_) {
    if (!c.taken) continue;
    report.ready += c.unread() != 0;
    report.working += c.state == KT_PREPARING || c.state == KT_RUNNING;
  }
  return report;
}

uint32_t Model::read(uint32_t index, uint32_t layout, float* buffer, uint32_t frames) {
  Character& c = characters_[index];
  const uint32_t count = std::min(frames, c.unread());
  // Who only reads would wait for ever.
  if (frames && !count && c.state == KT_FAILED) throw Error(KT_ERROR_STATE, "this character has failed (%s): kt_cancel it before another prompt", c.error);
  for (uint32_t i = 0; i < count; ++i) {
    const float* frame = c.frame(0);
    c.walk.step(frame, bundle_);
    if (layout == KT_LAYOUT_FEATURES) {
      std::copy_n(frame, bundle_.features, buffer);
      buffer += bundle_.features;
    } else {
      write_pose(frame, c.walk, bundle_, layout, buffer);
      buffer += pose_floats(bundle_);
    }
    c.drop_frame();
  }
  return count;
}

uint32_t Model::fork(uint32_t index, uint64_t seed, uint32_t request) {
  Character& c = characters_[index];
  take_back();
  while (c.with_worker && c.job.task == Task::advance) {
    wait_for_worker();
    take_back();
  }
  if (c.state != KT_RUNNING) throw Error(KT_ERROR_STATE, "expected a running character to fork: step until its state is KT_RUNNING");
  const kt_character_options options{sizeof options, KT_ABI_VERSION, seed, request, c.top_k, c.temperature, c.top_p, c.guidance, c.seconds};
  const uint32_t place = create(options);
  Character& twin = characters_[place];
  twin.state = KT_RUNNING;
  twin.written = c.written, twin.least = c.least, twin.most = c.most;
  twin.plan = c.plan, twin.cached = c.cached, twin.fresh = c.fresh;
  twin.copy_past(c);
  twin.ending = c.ending, twin.drained = c.drained, twin.framed = c.framed;
  twin.walk = c.walk;
  for (uint32_t i = 0; i < c.unread(); ++i) twin.walk.step(c.frame(i), bundle_);
  graphs_->copy(index, place, std::max(c.plan.rows, empty_rows_) + c.cached);
  return place;
}

}  // namespace kinetok
