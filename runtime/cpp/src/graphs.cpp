#include "graphs.hpp"

#include <algorithm>
#include <cstring>

namespace kinetok {

Graphs::Graphs(const Bundle& bundle, const ort::Runtime& runtime, const ort::Provider& provider, const kt_model_options& options,
               uint32_t rows_each, Memory& memory)
    : characters(options.characters), capacity(options.positions), rows(rows_each), bundle_(bundle) {
  if (bundle.stream.empty())
    throw Error(KT_ERROR_BUNDLE, "this bundle has no streaming detokenizer (its manifest says why under absent): use another model, or export it again");
  const bool hash = !(options.flags & KT_OPEN_NO_HASHES);
  const int threads = static_cast<int>(options.threads);
  const auto open = [&](const char* name) {
    return std::make_unique<ort::Session>(runtime, bundle.graph(name, hash), provider, threads);
  };
  const uint32_t all = characters * rows;
  token = memory.take<int64_t>(all);
  position = memory.take<int64_t>(all);
  pushed = memory.take<int64_t>(characters);
  before = memory.take<int64_t>(characters);
  ends = memory.take<int64_t>(characters);
  length_ = memory.take<int64_t>(1);
  slab_ = memory.take<unsigned char>(bundle.layers, 2, all, row_bytes());
  logits_ = memory.take<float>(all, bundle.logits);
  frames_ = memory.take<float>(characters, bundle.frames_per_token, bundle.features);
  for (const StreamState& state : bundle.states) {
    states_.push_back(memory.take<float>(characters, state.frames, state.channels));
    next_states_.push_back(memory.take<float>(characters, state.frames, state.channels));
    if (bundle.delay_frames) saved_states_.push_back(memory.take<float>(characters, state.frames, state.channels));
  }
  prefill_ = open("prefill");
  decode_ = open("decode");
  stream_ = open(bundle.stream.c_str());
  if (bundle.has_graph("text_encoder") && !(options.flags & KT_OPEN_NO_TEXT)) {
    text_ = open("text_encoder");
    encoding_ = std::make_unique<ort::Call>(*text_);
    encoding_->reserve_input("input_ids");
    encoding_->reserve_output("text_features");
  }
  bind_decoder(runtime);
  bind_detokenizer(runtime);
}

size_t Graphs::row_bytes() const {
  return size_t{bundle_.heads} * capacity * bundle_.head_dim * (bundle_.half_cache ? 2 : 4);
}

unsigned char* Graphs::cache(uint32_t layer, uint32_t part, uint32_t row) const {
  return slab_ + ((size_t{layer} * 2 + part) * characters * rows + row) * row_bytes();
}

const ort::Value& Graphs::keep(const ort::Runtime& runtime, const ort::Tensor& tensor) {
  values_.push_back(std::make_unique<ort::Value>(runtime, tensor));
  return *values_.back();
}

void Graphs::bind_decoder(const ort::Runtime& runtime) {
  const uint32_t all = characters * rows;
  for (uint32_t layer = 0; layer < bundle_.layers; ++layer)
    for (const char* part : {"key", "value"}) {
      cache_names_.push_back("past_key_values." + std::to_string(layer) + "." + part);
      cache_outputs_.push_back("present." + std::to_string(layer) + "." + part);
    }
  const ort::Value& length = keep(runtime, {length_, sizeof(int64_t), {1}, 1, ort::abi::INT64});
  for (uint32_t row = 0; row < all; ++row) {
    prefills_.push_back(std::make_unique<ort::Call>(*prefill_));
    prefills_.back()->reserve_input("text_features");
    prefills_.back()->input("text_lengths", length);
    bind_cache(runtime, *prefills_.back(), row, 1);
    bind_logits(runtime, *prefills_.back(), row, 1);
  }
  batched_ = rows_agree(runtime);
  // Where rows may not share a call, `first` counts rows and `count` is always 1.
  const uint32_t firsts = batched_ ? characters : all, each = batched_ ? rows : 1;
  decodes_.resize(size_t{firsts} * TOGETHER);
  for (uint32_t first = 0; first < firsts; ++first)
    for (uint32_t count = 1; count <= (batched_ ? std::min(TOGETHER, firsts - first) : 1); ++count)
      decodes_[size_t{first} * TOGETHER + count - 1] = decode_call(runtime, first * each, count * each);
}

void Graphs::bind_cache(const ort::Runtime& runtime, ort::Call& call, uint32_t row, uint32_t count) {
  const auto kind = bundle_.half_cache ? ort::abi::FLOAT16 : ort::abi::FLOAT;
  for (uint32_t i = 0; i < 2 * bundle_.layers; ++i) {
    const ort::Value& value = keep(runtime, {cache(i / 2, i % 2, row), row_bytes() * count, {count, bundle_.heads, capacity, bundle_.head_dim}, 4, kind});
    // The same memory goes in and comes out: the graphs write the new positions alone.
    call.input(cache_names_[i].c_str(), value);
    call.output(cache_outputs_[i].c_str(), value);
  }
}

void Graphs::bind_logits(const ort::Runtime& runtime, ort::Call& call, uint32_t row, uint32_t count) {
  call.output("logits", keep(runtime, {logits_of(row), sizeof(float) * count * bundle_.logits, {count, bundle_.logits}, 2, ort::abi::FLOAT}));
}

std::unique_ptr<ort::Call> Graphs::decode_call(const ort::Runtime& runtime, uint32_t row, uint32_t count) {
  auto call = std::make_unique<ort::Call>(*decode_);
  call->input("input_ids", keep(runtime, {token + row, sizeof(int64_t) * count, {count, 1}, 2, ort::abi::INT64}));
  call->input("position_ids", keep(runtime, {position + row, sizeof(int64_t) * count, {count, 1}, 2, ort::abi::INT64}));
  bind_cache(runtime, *call, row, count);
  bind_logits(runtime, *call, row, count);
  return call;
}

// Whether a row's bits stay the same whoever shares its call, which the kernels on this machine decide: rows alone are
// compared with rows together, as the Python backend does it.
bool Graphs::rows_agree(const ort::Runtime& runtime) {
  const uint32_t most = std::min(TOGETHER, characters) * rows;
  const size_t kept = values_.size(), numbers = size_t{most} * bundle_.logits;
  std::vector<float> alone(numbers);
  bool agree = true;
  for (uint32_t together = 0; agree && together <= most / rows; ++together) {
    const uint32_t group = together ? together * rows : 1;
    std::vector<std::unique_ptr<ort::Call>> calls;
    for (uint32_t row = 0; row < most; row += group) calls.push_back(decode_call(runtime, row, std::min(group, most - row)));
    for (uint32_t step = 0; step < 2; ++step) {  // the second token sees the first one's keys
      for (uint32_t row = 0; row < most; ++row) {
        token[row] = (row + step) % bundle_.codebook;
        position[row] = step;
      }
      for (const auto& call : calls) call->run("decode");
    }
    if (!together) std::copy_n(logits_, numbers, alone.begin());
    agree = std::equal(alone.begin(), alone.end(), logits_);
  }
  values_.resize(kept);
  return agree;
}

void Graphs::bind_detokenizer(const ort::Runtime& runtime) {
  streams_.resize(size_t{characters} * TOGETHER);
  for (uint32_t first = 0; first < characters; ++first)
    for (uint32_t count = 1; count <= std::min(TOGETHER, characters - first); ++count) {
      auto call = std::make_unique<ort::Call>(*stream_);
      call->input("tokens", keep(runtime, {pushed + first, sizeof(int64_t) * count, {count, 1}, 2, ort::abi::INT64}));
      if (bundle_.stream == "detokenize_ahead") {
        call->input("position", keep(runtime, {before + first, sizeof(int64_t) * count, {count}, 1, ort::abi::INT64}));
        call->input("end", keep(runtime, {ends + first, sizeof(int64_t) * count, {count}, 1, ort::abi::INT64}));
      }
      for (size_t i = 0; i < states_.size(); ++i) {
        const StreamState& state = bundle_.states[i];
        const size_t each = size_t{state.frames} * state.channels;
        const auto bound = [&](float* all) -> const ort::Value& {
          return keep(runtime, {all + first * each, sizeof(float) * each * count, {count, state.frames, state.channels}, 3, ort::abi::FLOAT});
        };
        call->input(state.input.c_str(), bound(states_[i]));
        call->output(state.output.c_str(), bound(next_states_[i]));
      }
      const size_t numbers = size_t{bundle_.frames_per_token} * bundle_.features;
      call->output("features", keep(runtime, {frames_of(first), sizeof(float) * numbers * count, {count, bundle_.frames_per_token, bundle_.features}, 3, ort::abi::FLOAT}));
      streams_[size_t{first} * TOGETHER + count - 1] = std::move(call);
    }
}

void Graphs::prefill(uint32_t row, float* features, uint32_t length) {
  // What is masked still counts as zero times its value: an earlier row's NaN must not come back.
  for (uint32_t layer = 0; layer < bundle_.layers; ++layer)
    for (uint32_t part = 0; part < 2; ++part) std::memset(cache(layer, part, row), 0, row_bytes());
  const ort::Value text(prefill_->runtime, {features, sizeof(float) * length * bundle_.text_dim, {1, length, bundle_.text_dim}, 3, ort::abi::FLOAT});
  *length_ = length;
  prefills_[row]->set_input(0, text);
  prefills_[row]->run("prefill");
}

void Graphs::decode(uint32_t character, uint32_t count) {
  if (batched_) {
    decodes_[size_t{character} * TOGETHER + count - 1]->run("decode");
    return;
  }
  for (uint32_t row = character * rows; row < (character + count) * rows; ++row) decodes_[size_t{row} * TOGETHER]->run("decode");
}

void Graphs::detokenize(uint32_t character, uint32_t count) {
  streams_[size_t{character} * TOGETHER + count - 1]->run("the detokenizer");
  for (size_t i = 0; i < states_.size(); ++i) {
    const size_t each = size_t{bundle_.states[i].frames} * bundle_.states[i].channels;
    std::copy_n(next_states_[i] + character * each, count * each, states_[i] + character * each);
  }
}

void Graphs::encode(int64_t* ids, uint32_t count, float* features, uint32_t length) {
  const ort::Value in(text_->runtime, {ids, sizeof(int64_t) * count, {1, count}, 2, ort::abi::INT64});
  const ort::Value out(text_->runtime, {features, sizeof(float) * length * bundle_.text_dim, {1, length, bundle_.text_dim}, 3, ort::abi::FLOAT});
  encoding_->set_input(0, in);
  encoding_->set_output(0, out);
  encoding_->run("text_encoder");
}

void Graphs::reset_detokenizer(uint32_t character) {
  for (size_t i = 0; i < states_.size(); ++i) {
    const size_t each = size_t{bundle_.states[i].frames} * bundle_.states[i].channels;
    std::fill_n(states_[i] + character * each, each, 0.0f);
  }
}

void Graphs::save_detokenizer(uint32_t character) {
  for (size_t i = 0; i < saved_states_.size(); ++i) {
    const size_t each = size_t{bundle_.states[i].frames} * bundle_.states[i].channels;
    std::copy_n(states_[i] + character * each, each, saved_states_[i] + character * each);
  }
}

void Graphs::restore_detokenizer(uint32_t character) {
  for (size_t i = 0; i < saved_states_.size(); ++i) {
    const size_t each = size_t{bundle_.states[i].frames} * bundle_.states[i].channels;
    std::copy_n(saved_states_[i] + character * each, each, states_[i] + character * each);
  }
}

void Graphs::copy(uint32_t from, uint32_t to, uint32_t positions) {
  const size_t line = size_t{bundle_.head_dim} * (bundle_.half_cache ? 2 : 4);
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t i = 0; i < 2 * bundle_.layers; ++i) {
      const unsigned char* source = cache(i / 2, i % 2, from * rows + row);
      unsigned char* target = cache(i / 2, i % 2, to * rows + row);
      // What lies beyond is masked, but has to be finite.
      std::memset(target, 0, row_bytes());
      for (uint32_t head = 0; head < bundle_.heads; ++head)
        std::memcpy(target + head * capacity * line, source + head * capacity * line, positions * line);
    }
    std::copy_n(logits_of(from * rows + row), bundle_.logits, logits_of(to * rows + row));
  }
  for (auto* const all : {&states_, &saved_states_})
    for (size_t i = 0; i < all->size(); ++i) {
      const size_t each = size_t{bundle_.states[i].frames} * bundle_.states[i].channels;
      std::copy_n((*all)[i] + from * each, each, (*all)[i] + to * each);
    }
}

}  // namespace kinetok
