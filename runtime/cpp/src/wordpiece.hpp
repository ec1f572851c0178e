// Sentences to ids, as MiniLM's tokenizer does it (docs/bundle.md, text).
#pragma once

#include <cstdint>
#include <memory_resource>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "bundle.hpp"

namespace kinetok {

class WordPiece {
 public:
  static constexpr size_t MOST_BYTES = 4000;  // of a sentence

  // vocabulary: a piece a line, its id the line's number. Throws Error(KT_ERROR_BUNDLE).
  WordPiece(const TextSection& section, std::string_view vocabulary, std::pmr::memory_resource* memory = std::pmr::get_default_resource());
  WordPiece(const WordPiece&) = delete;
  // At most `most` ids, the start and end ids among them where they fit; takes no memory. Throws Error(KT_ERROR_ARGUMENT)
  // for what is no UTF-8 or too long.
  uint32_t encode(std::string_view text, int64_t* ids, uint32_t most);

 private:
  void segment(std::string_view text);
  void normalise(uint32_t point);
  void put(uint32_t point);
  void end_word();
  void emit(int64_t id);
  const TextSection& section_;
  std::pmr::monotonic_buffer_resource pool_;  // of what follows, which never grows after construction
  std::pmr::string vocabulary_;
  std::pmr::unordered_map<std::string_view, int> first_, later_;  // pieces of vocabulary_; later_ without their ##
  std::pmr::string word_;                                         // of the word so far, UTF-8
  std::pmr::vector<size_t> starts_;                               // where its characters begin
  int64_t* ids_ = nullptr;
  uint32_t count_ = 0, most_ = 0;
};

}  // namespace kinetok
