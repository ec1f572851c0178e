// The bundle's graphs bound to memory: rows of a cache, logits, a detokenizer's states, sentences. No policy.
//
// A character owns `rows` neighbouring rows: its prompt's, and with guidance the empty text's.
#pragma once

#include <memory>
#include <vector>

#include "bundle.hpp"
#include "memory.hpp"
#include "ort.hpp"

namespace kinetok {

class Graphs {
 public:
  static constexpr uint32_t TOGETHER = 8;  // most characters in one call

  Graphs(const Bundle& bundle, const ort::Runtime& runtime, const ort::Provider& provider, const kt_model_options& options, uint32_t rows,
         Memory& memory);

  // Start one row anew with text features [length, text_dim]; its logits follow from the text.
  void prefill(uint32_t row, float* features, uint32_t length);
  // One token for each row of `count` neighbouring characters, written into `token` and `position` before.
  void decode(uint32_t character, uint32_t count);
  // A token's worth of frames for each of `count` neighbouring characters: of the one in `pushed`, or as many as the
  // tokenizer is late before it, in a clip with `before` tokens before it and `ends` in all.
  void detokenize(uint32_t character, uint32_t count);
  // Features [ids + extra, text_dim] of a sentence's ids.
  void encode(int64_t* ids, uint32_t count, float* features, uint32_t rows);

  void reset_detokenizer(uint32_t character);
  void save_detokenizer(uint32_t character);     // its state, which a clip that goes on after its end comes back to
  void restore_detokenizer(uint32_t character);
  void copy(uint32_t from, uint32_t to, uint32_t positions);  // cache, logits and states of a character

  bool encodes() const { return text_ != nullptr; }
  float* logits_of(uint32_t row) { return logits_ + size_t{row} * bundle_.logits; }
  float* frames_of(uint32_t character) { return frames_ + size_t{character} * bundle_.frames_per_token * bundle_.features; }

  const uint32_t characters, capacity, rows;
  int64_t *token, *position;  // [characters * rows]
  int64_t *pushed, *before, *ends;  // [characters]

 private:
  unsigned char* cache(uint32_t layer, uint32_t part, uint32_t row) const;
  size_t row_bytes() const;
  void bind_decoder(const ort::Runtime& runtime);
  void bind_detokenizer(const ort::Runtime& runtime);
  const ort::Value& keep(const ort::Runtime& runtime, const ort::Tensor& tensor);
  std::unique_ptr<ort::Call> decode_call(const ort::Runtime& runtime, uint32_t row, uint32_t count);
  void bind_cache(const ort::Runtime& runtime, ort::Call& call, uint32_t row, uint32_t count);
  void bind_logits(const ort::Runtime& runtime, ort::Call& call, uint32_t row, uint32_t count);
  bool rows_agree(const ort::Runtime& runtime);

  const Bundle& bundle_;
  std::unique_ptr<ort::Session> prefill_, decode_, stream_, text_;
  std::vector<std::string> cache_names_, cache_outputs_;
  std::vector<std::unique_ptr<ort::Value>> values_;
  std::vector<std::unique_ptr<ort::Call>> prefills_;  // a row each
  bool batched_;                                      // neighbouring rows share a call
  std::vector<std::unique_ptr<ort::Call>> decodes_;   // [first][count - 1]; first counts characters, or rows if not batched
  std::vector<std::unique_ptr<ort::Call>> streams_;   // [first][count - 1]
  std::unique_ptr<ort::Call> encoding_;
  unsigned char* slab_;  // [layers, 2, rows, heads, capacity, head_dim]
  float *logits_, *frames_;
  int64_t* length_;  // of the row being prefilled
  std::vector<float*> states_, next_states_, saved_states_;
};

}  // namespace kinetok
