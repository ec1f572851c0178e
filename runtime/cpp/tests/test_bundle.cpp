// The manifest: strict JSON, every number in bounds, nothing outside its folder.
#include <filesystem>
#include <fstream>

#include "bundle.hpp"
#include "expect.hpp"
#include "wordpiece.hpp"

using namespace kinetok;

static std::string manifest() { return read_file(bundle_folder + "/kinetok_bundle.json", 64u << 20); }

static std::string changed(const std::string& from, const std::string& to) {
  std::string text = manifest();
  const size_t at = text.find(from);
  EXPECT_NE(at, std::string::npos);
  return text.replace(at, from.size(), to);
}

TEST(Bundles, json_is_strict) {
  for (const char* good : {"{}", "[1, -2.5e3, \"a\\u00e9\\ud83d\\ude00\\n\", true, false, null]", " {\"a\": {\"b\": []}} ", "0"}) Json::parse(good);
  for (const char* bad : {"", "{", "[1,]", "{\"a\" 1}", "nan", "inf", "1e999", "\"\\ud800\"", "\"\n\"", "[1] 2", "tru", "\"\\x\"", "+1", "{1: 2}", "\"a"})
    EXPECT_EQ(thrown([bad] { Json::parse(bad); }), KT_ERROR_BUNDLE);
  EXPECT_EQ(thrown([] { Json::parse(std::string(100000, '[')); }), KT_ERROR_BUNDLE);
  std::string many = "[0";
  for (size_t i = 0; i < Json::MAX_VALUES; ++i) many += ",0";
  EXPECT_EQ(thrown([&] { Json::parse(many + "]"); }), KT_ERROR_BUNDLE);
  EXPECT_EQ(Json::parse("\"\\u00e9\\ud83d\\ude00\"").string("x"), "\xc3\xa9\xf0\x9f\x98\x80");
}

TEST(Bundles, a_manifest_cut_anywhere_is_refused) {
  const std::string text = manifest();
  const size_t end = text.find_last_of('}');
  for (size_t at = 0; at < end; at += 1 + end / 97) EXPECT_EQ(thrown([&] { Bundle::parse(std::string_view(text).substr(0, at)); }), KT_ERROR_BUNDLE);
}

TEST(Bundles, impossible_manifests_are_refused) {
  const std::pair<const char*, const char*> changes[] = {
      {"\"kinetok-bundle\"", "\"another\""},
      {"\"layers\": 4", "\"layers\": 1e15"},
      {"\"layers\": 4", "\"layers\": 0"},
      {"\"heads\": 6", "\"heads\": -6"},
      {"\"heads\": 6", "\"heads\": 6.5"},
      {"\"end_id\": 15360", "\"end_id\": 15362"},
      {"\"positions\": 301", "\"positions\": 1"},
      {"\"positions\": 301", "\"positions\": 1000000"},
      {"\"kv_dtype\": \"float32\"", "\"kv_dtype\": \"bfloat16\""},
      {"\"frames_per_token\": 2", "\"frames_per_token\": 0"},
      {"\"prefill.onnx\"", "\"../prefill.onnx\""},
      {"\"prefill.onnx\"", "\"prefill.onnx\\u0000\""},
      {"\"file\": \"bank.bin\"", "\"file\": \"/etc/passwd\""},
      {"\"row\": 3,", "\"row\": 99999999,"},
      {"\"top_p\": 0.95", "\"top_p\": 2"},
      {"\"decoder\": {", "\"decode\": {"},
  };
  for (const auto& [from, to] : changes) {
    const std::string text = changed(from, to);
    EXPECT_EQ(thrown([&] { Bundle::parse(text); }), KT_ERROR_BUNDLE) << "with " << to;
  }
  EXPECT_EQ(thrown([] { Bundle::parse(changed("\"version\": 1", "\"version\": 2")); }), KT_ERROR_VERSION);
  Bundle::parse(changed("\"version\": 1", "\"unknown\": [1], \"version\": 1"));
}

TEST(Bundles, another_text_encoder_is_left_out) {
  const Bundle own = Bundle::parse(manifest()), other = Bundle::parse(changed("\"vocab\": ", "\"tokenizer\": "));
  EXPECT_TRUE(own.has_graph("text_encoder"));
  EXPECT_FALSE(other.has_graph("text_encoder"));
  EXPECT_EQ(other.bank.size(), own.bank.size());
}

TEST(Bundles, sentences_that_are_no_utf8_are_refused) {
  const Bundle bundle(bundle_folder);
  WordPiece words(bundle.text, read_file(bundle.file(bundle.text.vocab, false), 64u << 20));
  int64_t ids[200];
  for (const char* bad : {"\x80", "\xc3", "\xc0\x80", "\xed\xa0\x80", "\xf4\x90\x80\x80", "a\xff", "\xe2\x82"})
    EXPECT_EQ(thrown([&] { words.encode(bad, ids, bundle.text.max_ids); }), KT_ERROR_ARGUMENT);
  EXPECT_EQ(thrown([&] { words.encode(std::string(WordPiece::MOST_BYTES + 1, 'a'), ids, bundle.text.max_ids); }), KT_ERROR_ARGUMENT);
  EXPECT_EQ(words.encode(std::string(WordPiece::MOST_BYTES, '.'), ids, bundle.text.max_ids), bundle.text.max_ids);
  EXPECT_EQ(words.encode("", ids, bundle.text.max_ids), 2);
  EXPECT_EQ(ids[0], bundle.text.start_id);
  EXPECT_EQ(ids[1], bundle.text.end_id);
}
