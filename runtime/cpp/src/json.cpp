#include "json.hpp"

#include <charconv>
#include <cmath>

#include "error.hpp"

namespace kinetok {

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json document() {
    Json value = read(0);
    space();
    if (at_ != text_.size()) fail("one value");
    return value;
  }

 private:
  [[noreturn]] void fail(const char* expected) const {
    throw Error(KT_ERROR_BUNDLE, "the manifest is no JSON: expected %s at byte %zu; export the bundle again", expected, at_);
  }

  char peek() const { return at_ < text_.size() ? text_[at_] : '\0'; }

  void space() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\t' || text_[at_] == '\r')) ++at_;
  }

  bool take(char c) {
    space();
    if (peek() != c || at_ >= text_.size()) return false;
    ++at_;
    return true;
  }

  void word(std::string_view expected) {
    if (text_.substr(at_, expected.size()) != expected) fail("a value");
    at_ += expected.size();
  }

  Json read(int depth) {
    if (depth > Json::MAX_DEPTH) fail("less nesting");
    if (++values_ > Json::MAX_VALUES) fail("fewer values");
    space();
    Json value;
    switch (peek()) {
      case '{':
        value.type_ = Json::Type::object;
        ++at_;
        if (take('}')) break;
        do {
          space();
          std::string key = quoted();
          if (!take(':')) fail("':'");
          value.object_.emplace_back(std::move(key), read(depth + 1));
        } while (take(','));
        if (!take('}')) fail("',' or '}'");
        break;
      case '[':
        value.type_ = Json::Type::array;
        ++at_;
        if (take(']')) break;
        do value.array_.push_back(read(depth + 1));
        while (take(','));
        if (!take(']')) fail("',' or ']'");
        break;
      case '"':
        value.type_ = Json::Type::string;
        value.string_ = quoted();
        break;
      case 't':
        word("true");
        value.type_ = Json::Type::boolean;
        value.number_ = 1;
        break;
      case 'f':
        word("false");
        value.type_ = Json::Type::boolean;
        break;
      case 'n':
        word("null");
        break;
      default:
        value.type_ = Json::Type::number;
        value.number_ = numeral();
    }
    return value;
  }

  double numeral() {
    // from_chars also takes "inf" and "nan"; JSON does not.
    if (peek() != '-' && (peek() < '0' || peek() > '9')) fail("a value");
    double value = 0;
    const auto result = std::from_chars(text_.data() + at_, text_.data() + text_.size(), value);
    if (result.ec != std::errc() || !std::isfinite(value)) fail("a finite number");
    at_ = static_cast<size_t>(result.ptr - text_.data());
    return value;
  }

  unsigned hex() {
    unsigned value = 0;
    for (int i = 0; i < 4; ++i) {
      const char c = peek();
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail("four hexadecimal digits");
      value = value * 16 + static_cast<unsigned>(digit);
      ++at_;
    }
    return value;
  }

  std::string quoted() {
    if (peek() != '"') fail("a string");
    ++at_;
    std::string out;
    while (true) {
      if (at_ >= text_.size()) fail("the end of a string");
      const char c = text_[at_++];
      if (c == '"') return out;
      if (static_cast<unsigned char>(c) < 0x20) fail("no control character");
      if (c != '\\') {
        out.push_back(c);
        continue;
      }
      const char escape = peek();
      ++at_;
      switch (escape) {
        case '"': case '\\': case '/': out.push_back(escape); break;
        case 'b': out.push_back('\b'); break;
        case 'f': out.push_back('\f'); break;
        case 'n': out.push_back('\n'); break;
        case 'r': out.push_back('\r'); break;
        case 't': out.push_back('\t'); break;
        case 'u': append(out, code()); break;
        default: fail("an escape");
      }
    }
  }

  unsigned code() {
    const unsigned first = hex();
    if (first < 0xD800 || first > 0xDFFF) return first;
    if (first > 0xDBFF || text_.substr(at_, 2) != "\\u") fail("a pair of surrogates");
    at_ += 2;
    const unsigned second = hex();
    if (second < 0xDC00 || second > 0xDFFF) fail("a pair of surrogates");
    return 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
  }

  static void append(std::string& out, unsigned c) {
    const auto put = [&](unsigned byte) { out.push_back(static_cast<char>(byte)); };
    if (c < 0x80) {
      put(c);
    } else if (c < 0x800) {
      put(0xC0 | c >> 6), put(0x80 | (c & 0x3F));
    } else if (c < 0x10000) {
      put(0xE0 | c >> 12), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
    } else {
      put(0xF0 | c >> 18), put(0x80 | (c >> 12 & 0x3F)), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
    }
  }

  std::string_view text_;
  size_t at_ = 0, values_ = 0;
};

Json Json::parse(std::string_view text) { return JsonReader(text).document(); }

static void expect(bool fits, const char* what, const char* kind) {
  if (!fits) throw Error(KT_ERROR_BUNDLE, "the manifest's %.100s: expected %s; export the bundle again", what, kind);
}

const std::string& Json::string(const char* what) const {
  expect(type_ == Type::string, what, "a string");
  return string_;
}

bool Json::boolean(const char* what) const {
  expect(type_ == Type::boolean, what, "true or false");
  return number_ != 0;
}

double Json::number(const char* what) const {
  expect(type_ == Type::number, what, "a number");
  return number_;
}

uint64_t Json::natural(const char* what, uint64_t low, uint64_t high) const {
  const double value = number(what);
  if (!(value >= static_cast<double>(low) && value <= static_cast<double>(high) && value == std::floor(value)))
    throw Error(KT_ERROR_BUNDLE, "the manifest's %.100s: expected a whole number from %llu to %llu, got %g", what,
                static_cast<unsigned long long>(low), static_cast<unsigned long long>(high), value);
  return static_cast<uint64_t>(value);
}

const std::vector<Json>& Json::array(const char* what) const {
  expect(type_ == Type::array, what, "an array");
  return array_;
}

const std::vector<std::pair<std::string, Json>>& Json::object(const char* what) const {
  expect(type_ == Type::object, what, "an object");
  return object_;
}

const Json* Json::find(std::string_view key) const {
  for (const auto& [name, value] : object_)
    if (name == key) return &value;
  return nullptr;
}

const Json& Json::at(const char* key) const {
  const Json* value = find(key);
  expect(value != nullptr, key, "it to be there");
  return *value;
}

}  // namespace kinetok
