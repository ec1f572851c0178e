#include "bundle.hpp"

#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>

#include "error.hpp"
#include "sha256.hpp"

namespace kinetok {

namespace {

constexpr const char* MANIFEST = "kinetok_bundle.json";
constexpr uint64_t MANIFEST_BYTES = 64u << 20, VERSION = 1;
constexpr uint64_t MANY = 1u << 20;  // more than any layer, head, class or position count of a model that fits a machine

struct Close {
  void operator()(std::FILE* file) const { std::fclose(file); }
};
using Handle = std::unique_ptr<std::FILE, Close>;

Handle open(const std::string& path) {
#if defined(_WIN32)
  return Handle(_wfopen(std::filesystem::u8path(path).c_str(), L"rb"));
#else
  return Handle(std::fopen(path.c_str(), "rb"));
#endif
}

// Names of files come from the manifest: none may lead out of the folder.
bool plain_name(const std::string& name) {
  if (name.empty() || name.size() > 100 || name[0] == '.') return false;
  // A null byte counts for strchr as one of the three, and cuts a path short.
  return std::all_of(name.begin(), name.end(), [](unsigned char c) { return c && c < 128 && (std::isalnum(c) || std::strchr("._-", c)); });
}

std::string name_of(const Json& value, const char* what) {
  const std::string& name = value.string(what);
  if (!plain_name(name)) throw Error(KT_ERROR_BUNDLE, "the manifest's %.40s: expected the plain name of a file, got %.60s", what, name.c_str());
  return name;
}

uint32_t size_of(const Json& section, const char* key, uint64_t low = 1, uint64_t high = MANY) {
  return static_cast<uint32_t>(section.at(key).natural(key, low, high));
}

double real(const Json& section, const char* key, double low, double high) {
  const double value = section.at(key).number(key);
  if (!(value >= low && value <= high))
    throw Error(KT_ERROR_BUNDLE, "the manifest's %.40s: expected %g to %g, got %g", key, low, high, value);
  return value;
}

}  // namespace

std::string read_file(const std::string& path, uint64_t most) {
  const Handle file = open(path);
  if (!file) throw Error(KT_ERROR_BUNDLE, "%.250s: expected a file that can be read; name the folder of a bundle", path.c_str());
  std::string out;
  char piece[1 << 14];
  while (const size_t got = std::fread(piece, 1, sizeof piece, file.get())) {
    out.append(piece, got);
    if (out.size() > most) throw Error(KT_ERROR_BUNDLE, "%.250s: expected at most %llu bytes", path.c_str(), static_cast<unsigned long long>(most));
  }
  if (std::ferror(file.get())) throw Error(KT_ERROR_BUNDLE, "%.250s: cannot be read", path.c_str());
  return out;
}

Bundle::Bundle(const std::string& folder) : directory(folder) {
  read(Json::parse(read_file(folder + "/" + MANIFEST, MANIFEST_BYTES)));
}

Bundle Bundle::parse(std::string_view manifest) {
  Bundle bundle;
  bundle.read(Json::parse(manifest));
  return bundle;
}

void Bundle::read(const Json& root) {
  if (root.at("format").string("format") != "kinetok-bundle")
    throw Error(KT_ERROR_BUNDLE, "expected a kinetok bundle: kinetok export onnx MODEL --out DIR writes one");
  const uint64_t version = root.at("version").natural("version", 1, MANY);
  if (version > VERSION)
    throw Error(KT_ERROR_VERSION, "this bundle is of version %llu, this library reads up to %llu: update the library",
                static_cast<unsigned long long>(version), static_cast<unsigned long long>(VERSION));
  for (const auto& [name, about] : root.at("files").object("files")) {
    const std::string& digest = about.at("sha256").string("sha256");
    const bool hexadecimal = digest.size() == 64 && digest.find_first_not_of("0123456789abcdef") == std::string::npos;
    if (!plain_name(name) || !hexadecimal) throw Error(KT_ERROR_BUNDLE, "the manifest's files: %.60s is no name with 64 hexadecimal digits", name.c_str());
    files_[name] = {digest, about.at("bytes").natural("bytes", 0, uint64_t{1} << 46)};
  }
  read_decoder(root);
  read_tokenizer(root);
  read_skeleton(root);
  read_graphs(root);
  read_text(root);
  read_bank(root);
}

void Bundle::read_decoder(const Json& root) {
  const Json& decoder = root.at("decoder");
  layers = size_of(decoder, "layers", 1, 4096);
  heads = size_of(decoder, "heads", 1, 4096);
  head_dim = size_of(decoder, "head_dim", 1, 4096);
  codebook = size_of(decoder, "codebook");
  logits = size_of(decoder, "logits", 1, 2 * MANY);
  positions = size_of(decoder, "positions", 2, 1 << 16);  // a cache is taken for all of them
  text_dim = size_of(decoder, "text_dim");
  max_text = size_of(decoder, "max_text", 1, positions);
  end_id = static_cast<int32_t>(decoder.at("end_id").natural("end_id", 0, logits - 1));
  for (const Json& id : decoder.at("banned_ids").array("banned_ids"))
    banned.push_back(static_cast<uint32_t>(id.natural("banned_ids", 0, logits - 1)));
  const std::string& kv = root.at("kv_dtype").string("kv_dtype");
  if (kv != "float32" && kv != "float16") throw Error(KT_ERROR_BUNDLE, "the manifest's kv_dtype: expected float32 or float16, got %.40s", kv.c_str());
  half_cache = kv == "float16";
}

void Bundle::read_tokenizer(const Json& root) {
  const Json& tokenizer = root.at("tokenizer");
  if (tokenizer.at("codebook").natural("codebook", 1, logits) != codebook)
    throw Error(KT_ERROR_BUNDLE, "the manifest's decoder and tokenizer have different codebooks");
  frame_rate = size_of(tokenizer, "frame_rate", 1, 1000);
  frames_per_token = size_of(tokenizer, "frames_per_token", 1, 64);
  features = size_of(tokenizer, "features", 1, 65536);
  tokens_per_second = static_cast<double>(frame_rate) / frames_per_token;
  const Json& layout = root.at("features").at("layout");
  const auto place = [&](const char* name, uint64_t length) {
    const auto& range = layout.at(name).array(name);
    if (range.size() != 2) throw Error(KT_ERROR_BUNDLE, "the manifest's %.40s: expected [first, end)", name);
    const uint64_t first = range[0].natural(name, 0, features), end = range[1].natural(name, 0, features);
    if (end < first || end - first != length) throw Error(KT_ERROR_BUNDLE, "the manifest's %.40s: expected %llu numbers", name, static_cast<unsigned long long>(length));
    return static_cast<uint32_t>(first);
  };
  const uint64_t count = root.at("skeleton").at("names").array("names").size();
  velocity_at = place("root_velocity_xz", 2);
  heading_at = place("heading_change_6d", 6);
  positions_at = place("positions", 3 * count);
  rotations_at = place("rotations_6d", 6 * count);
  const Json& sampling = root.at("sampling");
  temperature = real(sampling, "temperature", 0, 100);
  top_k = size_of(sampling, "top_k", 0, uint64_t{1} << 31);
  top_p = real(sampling, "top_p", 1e-4, 1);
  guidance = real(sampling, "guidance", 0, 100);
  min_seconds = real(sampling, "min_seconds", 0, 600);
  max_seconds = real(sampling, "max_seconds", 0.01, 600);
}

void Bundle::read_skeleton(const Json& root) {
  const Json& skeleton = root.at("skeleton");
  const auto& names = skeleton.at("names").array("names");
  const auto& given = skeleton.at("parents").array("parents");
  const auto& rows = skeleton.at("offsets").array("offsets");
  if (names.empty() || names.size() > 1024 || given.size() != names.size() || rows.size() != names.size())
    throw Error(KT_ERROR_BUNDLE, "the manifest's skeleton: expected as many names, parents and offsets, 1 to 1024");
  for (size_t j = 0; j < names.size(); ++j) {
    joints.push_back(names[j].string("names"));
    const double parent = given[j].number("parents");
    if (j == 0 ? parent != -1 : !(parent >= 0 && parent < static_cast<double>(j) && parent == std::floor(parent)))
      throw Error(KT_ERROR_BUNDLE, "the manifest's skeleton: expected -1 and then an earlier joint each as parents");
    parents.push_back(static_cast<int>(parent));
    const auto& row = rows[j].array("offsets");
    if (row.size() != 3) throw Error(KT_ERROR_BUNDLE, "the manifest's skeleton: expected offsets of three numbers");
    for (const Json& value : row) offsets.push_back(static_cast<float>(value.number("offsets")));
  }
}

void Bundle::read_graphs(const Json& root) {
  for (const auto& [name, about] : root.at("graphs").object("graphs")) {
    graphs[name] = name_of(about.at("file"), "graphs");
    if (name != "detokenize_stream" && name != "detokenize_ahead") continue;
    if (!stream.empty()) throw Error(KT_ERROR_BUNDLE, "the manifest's graphs: expected one of detokenize_stream and detokenize_ahead");
    stream = name;
    const Json* delay = about.find("delay_frames");
    if (delay || name == "detokenize_ahead") delay_frames = size_of(about, "delay_frames", 0, 4096);
    const auto& inputs = about.at("inputs").array("inputs");
    for (const Json& pair : about.at("states").array("states")) {
      StreamState state{pair.at("input").string("states"), pair.at("output").string("states"), 0, 0};
      for (const Json& input : inputs) {
        if (input.at("name").string("name") != state.input) continue;
        const auto& shape = input.at("shape").array("shape");
        if (shape.size() != 3) throw Error(KT_ERROR_BUNDLE, "the manifest's %.40s: expected a shape of three axes", state.input.c_str());
        state.frames = static_cast<uint32_t>(shape[1].natural("states", 1, MANY));
        state.channels = static_cast<uint32_t>(shape[2].natural("states", 1, MANY));
      }
      if (!state.frames) throw Error(KT_ERROR_BUNDLE, "the manifest's states: no input %.60s", state.input.c_str());
      states.push_back(std::move(state));
    }
  }
  for (const char* needed : {"prefill", "decode"})
    if (!has_graph(needed)) throw Error(KT_ERROR_BUNDLE, "this bundle has no graph %s; export it again", needed);
  const std::pair<const char*, const char*> weights[] = {{"prefill", "weights.bin"},
                                                         {"decode", "weights.bin"},
                                                         {"detokenize_stream", "detokenizer.bin"},
                                                         {"detokenize_ahead", "detokenizer.bin"},
                                                         {"text_encoder", "text_encoder.bin"}};
  for (const auto& [name, file] : weights)
    if (has_graph(name)) graph_external[name] = file;
}

void Bundle::read_text(const Json& root) {
  const Json& section = root.at("text");
  max_features = size_of(section, "max_features", 1, max_text);
  if (!has_graph("text_encoder")) return;
  if (!section.find("vocab")) {  // Flan-T5's tokenizer, which this library does not have: banked prompts and features
    graphs.erase("text_encoder");
    graph_external.erase("text_encoder");
    return;
  }
  const uint64_t most = uint64_t{1} << 24;
  text.vocab = name_of(section.at("vocab"), "vocab");
  const Json* lowercase = section.find("lowercase");
  text.lowercase = !lowercase || lowercase->boolean("lowercase");
  text.unknown_id = static_cast<int>(section.at("unknown_id").natural("unknown_id", 0, most));
  text.start_id = static_cast<int>(section.at("start_id").natural("start_id", 0, most));
  text.end_id = static_cast<int>(section.at("end_id").natural("end_id", 0, most));
  text.max_word = size_of(section, "max_word", 1, 10000);
  text.max_ids = size_of(section, "max_ids", 2, max_features);
  if (const Json* special = section.find("special"))
    for (const auto& [name, id] : special->object("special"))
      if (!name.empty()) text.special.emplace_back(name, static_cast<int>(id.natural("special", 0, most)));
}

void Bundle::read_bank(const Json& root) {
  const Json& section = root.at("bank");
  if (section.is_null()) return;
  const Json& tensor = section.at("features");
  bank_file = name_of(tensor.at("file"), "bank");
  bank_offset = tensor.at("offset").natural("offset", 0, uint64_t{1} << 46);
  const auto& shape = tensor.at("shape").array("shape");
  if (tensor.at("dtype").string("dtype") != "float32" || shape.size() != 2)
    throw Error(KT_ERROR_BUNDLE, "the manifest's bank: expected float32 features of two axes");
  bank_rows = static_cast<uint32_t>(shape[0].natural("bank", 0, uint64_t{1} << 31));
  if (shape[1].natural("bank", 1, MANY) != text_dim) throw Error(KT_ERROR_BUNDLE, "the manifest's bank: expected features of width %u", text_dim);
  for (const Json& prompt : section.at("prompts").array("prompts")) {
    BankPrompt entry{prompt.at("text").string("text"), size_of(prompt, "row", 0, uint64_t{1} << 31), size_of(prompt, "rows", 1, max_features)};
    if (uint64_t{entry.row} + entry.rows > bank_rows) throw Error(KT_ERROR_BUNDLE, "the manifest's bank: %.60s lies beyond its end", entry.text.c_str());
    bank.push_back(std::move(entry));
  }
  const File& file = about(bank_file);
  const uint64_t bytes = uint64_t{bank_rows} * text_dim * sizeof(float);
  if (bank_offset > file.bytes || bytes > file.bytes - bank_offset) throw Error(KT_ERROR_BUNDLE, "the manifest's bank lies beyond the end of %.60s", bank_file.c_str());
}

const Bundle::File& Bundle::about(const std::string& name) const {
  const auto found = files_.find(name);
  if (found == files_.end()) throw Error(KT_ERROR_BUNDLE, "%.60s is not among the bundle's files", name.c_str());
  return found->second;
}

std::string Bundle::file(const std::string& name, bool hash) const {
  const File& expected = about(name);
  const std::string path = directory + "/" + name;
  std::error_code problem;
  const uint64_t bytes = std::filesystem::file_size(std::filesystem::u8path(path), problem);
  if (problem) throw Error(KT_ERROR_BUNDLE, "%.250s: the bundle lacks this file; copy or export it again", path.c_str());
  if (bytes != expected.bytes)
    throw Error(KT_ERROR_BUNDLE, "%.250s: expected %llu bytes, got %llu; copy or export the bundle again", path.c_str(),
                static_cast<unsigned long long>(expected.bytes), static_cast<unsigned long long>(bytes));
  if (!hash) return path;
  const Handle handle = open(path);
  Sha256 sum;
  std::vector<char> piece(1 << 16);
  while (const size_t got = handle ? std::fread(piece.data(), 1, piece.size(), handle.get()) : 0) sum.add(piece.data(), got);
  if (!handle || std::ferror(handle.get())) throw Error(KT_ERROR_BUNDLE, "%.250s: cannot be read", path.c_str());
  if (sum.hex() != expected.sha256)
    throw Error(KT_ERROR_HASH, "%.250s: its SHA-256 is not the manifest's: it was changed or damaged; export the bundle again", path.c_str());
  return path;
}

std::string Bundle::graph(const char* name, bool hash) const {
  const auto found = graphs.find(name);
  if (found == graphs.end()) throw Error(KT_ERROR_BUNDLE, "this bundle has no graph %.40s", name);
  const auto external = graph_external.find(name);
  // prefill and decode share their weights: hashing them once is enough.
  if (external != graph_external.end()) file(external->second, hash && std::strcmp(name, "decode") != 0);
  return file(found->second, hash);
}

float* Bundle::bank_features(bool hash, Memory& memory) const {
  if (bank_file.empty()) return nullptr;
  const std::string path = file(bank_file, hash);  // it is as large as the manifest says: so is what is taken for it
  auto* const out = memory.take<float>(bank_rows, text_dim);
  const Handle handle = open(path);
  // In pieces, as no function of the standard goes to a place beyond a long.
  std::vector<char> skipped(std::min<uint64_t>(bank_offset, 1 << 16));
  bool whole = handle != nullptr;
  for (uint64_t left = bank_offset; whole && left;) {
    const size_t piece = static_cast<size_t>(std::min<uint64_t>(left, skipped.size()));
    whole = std::fread(skipped.data(), 1, piece, handle.get()) == piece;
    left -= piece;
  }
  const size_t numbers = size_t{bank_rows} * text_dim;
  if (!whole || std::fread(out, sizeof(float), numbers, handle.get()) != numbers)
    throw Error(KT_ERROR_BUNDLE, "%.250s: cannot be read to its end; copy or export the bundle again", path.c_str());
  if (!std::all_of(out, out + numbers, [](float x) { return std::isfinite(x); }))
    throw Error(KT_ERROR_BUNDLE, "%.60s holds numbers that are not finite; export the bundle again", bank_file.c_str());
  return out;
}

}  // namespace kinetok
