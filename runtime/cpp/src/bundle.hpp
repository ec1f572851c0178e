// A bundle (docs/bundle.md) as this library needs it: every number checked, every file's size, and its hash on demand.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "json.hpp"
#include "memory.hpp"

namespace kinetok {

struct StreamState {  // of the streaming detokenizer, a row
  std::string input, output;
  uint32_t frames, channels;
};

struct BankPrompt {
  std::string text;
  uint32_t row, rows;
};

struct TextSection {
  std::string vocab;
  bool lowercase = true;
  int unknown_id = 0, start_id = 0, end_id = 0;
  uint32_t max_word = 0, max_ids = 0;
  std::vector<std::pair<std::string, int>> special;
};

class Bundle {
 public:
  // Reads and checks the manifest; throws Error(KT_ERROR_BUNDLE or KT_ERROR_VERSION).
  explicit Bundle(const std::string& directory);
  // The same on a manifest in memory, for tests and fuzzing: no file is looked at.
  static Bundle parse(std::string_view manifest);

  // Path of a file of the bundle; its size is compared, its SHA-256 too where `hash` is set (KT_ERROR_HASH).
  std::string file(const std::string& name, bool hash) const;
  std::string graph(const char* name, bool hash) const;
  bool has_graph(const char* name) const { return graphs.count(name) != 0; }
  // The bank's features [bank_rows, text_dim]; nullptr where there is no bank.
  float* bank_features(bool hash, Memory& memory) const;

  std::string directory;
  uint32_t layers, heads, head_dim, codebook, logits, positions, text_dim, max_text;
  int32_t end_id;
  std::vector<uint32_t> banned;
  bool half_cache;
  uint32_t frame_rate, frames_per_token, features;
  double tokens_per_second;
  std::vector<std::string> joints;
  std::vector<int> parents;
  std::vector<float> offsets;  // [joints * 3]
  uint32_t rotations_at = 0, velocity_at = 0, heading_at = 0, positions_at = 0;
  double temperature, top_p, guidance, min_seconds, max_seconds;
  uint32_t top_k, max_features;
  std::map<std::string, std::string> graphs;        // name to file
  std::map<std::string, std::string> graph_external;  // name to its weights, where they are a file of their own
  std::string stream;         // the streaming detokenizer: "detokenize_stream", "detokenize_ahead", or "" where there is none
  uint32_t delay_frames = 0;  // by which its frames run behind its tokens
  std::vector<StreamState> states;
  TextSection text;
  std::vector<BankPrompt> bank;
  uint32_t bank_rows = 0;
  std::string bank_file;
  uint64_t bank_offset = 0;

 private:
  struct File {
    std::string sha256;
    uint64_t bytes;
  };
  Bundle() = default;
  void read(const Json& manifest);
  void read_decoder(const Json& root);
  void read_tokenizer(const Json& root);
  void read_skeleton(const Json& root);
  void read_graphs(const Json& root);
  void read_text(const Json& root);
  void read_bank(const Json& root);
  const File& about(const std::string& name) const;
  std::map<std::string, File> files_;
};

// A whole file; throws Error(KT_ERROR_BUNDLE) where it cannot be read or is larger than `most`.
std::string read_file(const std::string& path, uint64_t most);

}  // namespace kinetok
