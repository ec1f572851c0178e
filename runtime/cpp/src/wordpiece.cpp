#include "wordpiece.hpp"

#include <algorithm>
#include <iterator>

#include "error.hpp"
#include "unicode_tables.hpp"

namespace kinetok {

namespace {

template <typename Table>
auto covering(const Table& table, uint32_t point) {
  const auto after = std::upper_bound(std::begin(table), std::end(table), point, [](uint32_t p, const auto& row) { return p < row.first; });
  return after != std::begin(table) && point <= std::prev(after)->last ? std::prev(after) : nullptr;
}

// The next character of UTF-8 text, or the reason to refuse it.
uint32_t next_character(std::string_view text, size_t& at) {
  const auto byte = [&](size_t i) { return i < text.size() ? static_cast<unsigned char>(text[i]) : 0u; };
  const uint32_t lead = byte(at);
  const int more = lead < 0x80 ? 0 : lead >> 5 == 6 ? 1 : lead >> 4 == 14 ? 2 : lead >> 3 == 30 ? 3 : -1;
  uint32_t point = more <= 0 ? lead : lead & (0x3Fu >> more);
  bool fine = more >= 0;
  for (int i = 1; fine && i <= more; ++i) {
    const uint32_t next = byte(at + static_cast<size_t>(i));
    fine = next >> 6 == 2;
    point = point << 6 | (next & 0x3F);
  }
  static const uint32_t LEAST[] = {0, 0x80, 0x800, 0x10000};
  if (!fine || point < LEAST[more] || point > 0x10FFFF || (point >= 0xD800 && point < 0xE000))
    throw Error(KT_ERROR_ARGUMENT, "text: expected UTF-8, got the byte 0x%02X at %zu", lead, at);
  at += static_cast<size_t>(more) + 1;
  return point;
}

}  // namespace

WordPiece::WordPiece(const TextSection& section, std::string_view vocabulary, std::pmr::memory_resource* memory)
    : section_(section), pool_(memory), vocabulary_(vocabulary, &pool_), first_(&pool_), later_(&pool_), word_(&pool_), starts_(&pool_) {
  const std::string_view all(vocabulary_);
  int id = 0;
  for (size_t at = 0; at < all.size(); ++id) {
    const size_t end = std::min(all.find('\n', at), all.size());
    const std::string_view piece = all.substr(at, end - at);
    if (piece.substr(0, 2) == "##")
      later_.emplace(piece.substr(2), id);
    else
      first_.emplace(piece, id);
    at = end + 1;
  }
  if (section.unknown_id >= id || section.start_id >= id || section.end_id >= id)
    throw Error(KT_ERROR_BUNDLE, "%.60s has %d pieces, too few for the manifest's ids; export the bundle again", section.vocab.c_str(), id);
  // A character decomposes into three at most, of four bytes each.
  word_.reserve(12 * MOST_BYTES);
  starts_.reserve(3 * MOST_BYTES);
}

uint32_t WordPiece::encode(std::string_view text, int64_t* ids, uint32_t most) {
  if (text.size() > MOST_BYTES) throw Error(KT_ERROR_ARGUMENT, "text: expected at most %zu bytes, got %zu", MOST_BYTES, text.size());
  for (size_t at = 0; at < text.size();) next_character(text, at);
  ids_ = ids, count_ = 0, most_ = most;
  word_.clear();
  starts_.clear();
  emit(section_.start_id);
  // Special tokens are taken as they stand; what lies between them is text.
  size_t from = 0;
  for (size_t at = 0; at < text.size(); ++at) {
    const std::pair<std::string, int>* found = nullptr;
    for (const auto& special : section_.special)
      if (text.compare(at, special.first.size(), special.first) == 0 && (!found || special.first.size() > found->first.size())) found = &special;
    if (!found) continue;
    segment(text.substr(from, at - from));
    emit(found->second);
    from = at + found->first.size();
    at = from - 1;
  }
  segment(text.substr(from));
  emit(section_.end_id);
  return count_;
}

void WordPiece::emit(int64_t id) {
  if (count_ < most_) ids_[count_++] = id;
}

void WordPiece::segment(std::string_view text) {
  for (size_t at = 0; at < text.size();) normalise(next_character(text, at));
  end_word();
}

void WordPiece::normalise(uint32_t point) {
  if (point < 0x80 && point > 0x20 && point < 0x7F) {  // the same as below, sooner
    put(section_.lowercase && point >= 'A' && point <= 'Z' ? point + 32 : point);
    return;
  }
  if (point == ' ' || covering(unicode::SPACES, point)) return end_word();
  if (covering(unicode::REMOVED, point)) return;
  const bool alone = covering(unicode::SURROUNDED, point);
  if (alone) end_word();
  if (point >= 0xAC00 && point < 0xD7A4) {
    const uint32_t index = point - 0xAC00;
    put(0x1100 + index / 588);
    put(0x1161 + index % 588 / 28);
    if (index % 28) put(0x11A7 + index % 28);
  } else if (const auto* run = covering(unicode::RUNS, point); run && (point - run->first) % run->stride == 0) {
    put(static_cast<uint32_t>(static_cast<int32_t>(point) + run->difference));
  } else {
    const auto* several = std::lower_bound(std::begin(unicode::SEVERAL), std::end(unicode::SEVERAL), point, [](const auto& row, uint32_t p) { return row.from < p; });
    if (several != std::end(unicode::SEVERAL) && several->from == point) {
      for (const uint32_t part : several->to)
        if (part) put(part);
    } else {
      put(point);
    }
  }
  if (alone) end_word();
}

void WordPiece::put(uint32_t point) {
  const bool punctuation = covering(unicode::PUNCTUATION, point);
  if (punctuation) end_word();
  starts_.push_back(word_.size());
  const auto byte = [this](uint32_t value) { word_.push_back(static_cast<char>(value)); };
  if (point < 0x80) {
    byte(point);
  } else if (point < 0x800) {
    byte(0xC0 | point >> 6), byte(0x80 | (point & 0x3F));
  } else if (point < 0x10000) {
    byte(0xE0 | point >> 12), byte(0x80 | (point >> 6 & 0x3F)), byte(0x80 | (point & 0x3F));
  } else {
    byte(0xF0 | point >> 18), byte(0x80 | (point >> 12 & 0x3F)), byte(0x80 | (point >> 6 & 0x3F)), byte(0x80 | (point & 0x3F));
  }
  if (punctuation) end_word();
}

// The longest piece that fits, again and again; a word with a gap is one unknown id.
void WordPiece::end_word() {
  if (starts_.empty()) return;
  const std::string_view word(word_);
  const uint32_t before = count_;
  bool known = starts_.size() <= section_.max_word;
  for (size_t at = 0; known && at < starts_.size();) {
    const auto& pieces = at ? later_ : first_;
    size_t end = starts_.size();
    auto found = pieces.end();
    for (; end > at && found == pieces.end(); --end) {
      const size_t stop = end < starts_.size() ? starts_[end] : word.size();
      found = pieces.find(word.substr(starts_[at], stop - starts_[at]));
      if (found != pieces.end()) break;
    }
    known = found != pieces.end();
    if (known) emit(found->second), at = end;
  }
  if (!known) {
    count_ = before;
    emit(section_.unknown_id);
  }
  word_.clear();
  starts_.clear();
}

}  // namespace kinetok
