// JSON for the bundle's manifest: strict, no deeper than MAX_DEPTH, no more than MAX_VALUES. Throws Error(KT_ERROR_BUNDLE).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace kinetok {

class Json {
 public:
  enum class Type { null, boolean, number, string, array, object };
  static constexpr int MAX_DEPTH = 32;
  static constexpr size_t MAX_VALUES = 1 << 21;  // 200 MB of them: a few bytes of text each must not fill the memory

  static Json parse(std::string_view text);

  bool is_null() const { return type_ == Type::null; }
  // Each throws, naming `what`, where the value is of another type or out of range.
  const std::string& string(const char* what) const;
  bool boolean(const char* what) const;
  double number(const char* what) const;
  uint64_t natural(const char* what, uint64_t low, uint64_t high) const;
  const std::vector<Json>& array(const char* what) const;
  const std::vector<std::pair<std::string, Json>>& object(const char* what) const;
  const Json& at(const char* key) const;         // throws where absent
  const Json* find(std::string_view key) const;  // nullptr where absent, or no object

 private:
  friend class JsonReader;
  Type type_ = Type::null;
  double number_ = 0;  // of a boolean too
  std::string string_;
  std::vector<Json> array_;
  std::vector<std::pair<std::string, Json>> object_;
};

}  // namespace kinetok
