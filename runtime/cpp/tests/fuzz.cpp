// Damaged bundles: whatever stands in a manifest, a vocabulary or a sentence, only Error may come of it.
//
//   kinetok_fuzz manifest|words SECONDS SEED OUT CORPUS...
//
// Runs every file of the CORPUS folders, then changes them at random for SECONDS. What reaches new code joins the corpus and is
// written to OUT; what crashes is written there too, as crash-N, before the process ends. With 0 seconds OUT is the smallest
// part of the corpus that reaches as much. Meant for a build under AddressSanitizer and UBSan.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <new>
#include <random>
#include <string>

#include "bundle.hpp"
#include "character.hpp"
#include "error.hpp"
#include "pose.hpp"
#include "wordpiece.hpp"

namespace fs = std::filesystem;
using namespace kinetok;

namespace {

constexpr size_t EDGES = 1 << 16, LONGEST = 1 << 14;
unsigned char edges[EDGES], seen[EDGES];  // how often each step between two places was taken, in this run and ever
uintptr_t previous = 0;
std::string current;  // what is being tried
fs::path out_folder;

}  // namespace

// Called by the instrumented code at every branch (-fsanitize-coverage=trace-pc).
extern "C" void __sanitizer_cov_trace_pc() {
  // From a place of this program, which lies somewhere else in every run.
  const auto here = reinterpret_cast<uintptr_t>(__builtin_return_address(0)) - reinterpret_cast<uintptr_t>(&__sanitizer_cov_trace_pc);
  unsigned char& edge = edges[(here ^ previous >> 1) % EDGES];
  if (edge < 255) ++edge;
  previous = here;
}

extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

namespace {

void keep(const std::string& name) {
  std::ofstream(out_folder / name, std::ios::binary) << current;
  std::fprintf(stderr, "wrote %s\n", (out_folder / name).c_str());
}

void crashed() { keep("crash-" + std::to_string(std::hash<std::string>()(current) % 1000000)); }

// A bundle that is accepted is used: its numbers become sizes and places.
void try_manifest() {
  const Bundle bundle = Bundle::parse(current);
  std::vector<float> frame(bundle.features, 0.5f), pose(pose_floats(bundle));
  Walk walk;
  walk.step(frame.data(), bundle);
  for (uint32_t layout = 0; layout < 3; ++layout) write_pose(frame.data(), walk, bundle, layout, pose.data());
  for (const double seconds : {0.0, 5.0, static_cast<double>(INFINITY)}) {
    Plan plan;
    set_budget(plan, bundle, seconds, bundle.positions, bundle.bank.empty() ? 1 : bundle.bank.back().rows);
    if (plan.keep < 1 || plan.keep > plan.window || plan.window > bundle.positions) std::abort();
  }
}

// A vocabulary, a zero, a sentence.
void try_words() {
  TextSection section;
  section.vocab = "vocab.txt";
  section.unknown_id = 0, section.start_id = 1, section.end_id = 2;
  section.max_word = 12, section.max_ids = 9;
  section.special = {{"[SEP]", 2}, {"[SE", 1}};
  const size_t cut = std::min(current.find('\0'), current.size());
  const std::string sentence = cut < current.size() ? current.substr(cut + 1) : "";
  WordPiece words(section, current.substr(0, cut));
  int64_t ids[9];
  if (words.encode(sentence, ids, 9) > 9) std::abort();
}

bool survives(bool manifest) {
  try {
    manifest ? try_manifest() : try_words();
    return true;
  } catch (const Error&) {
    return false;
  }  // anything else ends the process: a finding
}

size_t bucket(unsigned char count) { return count < 4 ? count : count < 8 ? 4 : count < 16 ? 5 : count < 64 ? 6 : 7; }

// Runs `current`; true where it went a way that nothing before it went.
bool run(bool manifest, unsigned long long& accepted) {
  std::fill_n(edges, EDGES, static_cast<unsigned char>(0));
  previous = 0;
  accepted += survives(manifest);
  bool fresh = false;
  for (size_t i = 0; i < EDGES; ++i) {
    if (!edges[i]) continue;
    const auto bit = static_cast<unsigned char>(1u << bucket(edges[i]));
    if (!(seen[i] & bit)) seen[i] |= bit, fresh = true;
  }
  return fresh;
}

class Changes {
 public:
  explicit Changes(uint64_t seed) : random_(seed) {}
  size_t pick(size_t n) { return static_cast<size_t>(random_() % n); }

  void apply(std::string& text, const std::string& other) {
    static const std::string WORDS[] = {"-1", "1e308", "0", "null", "[]", "{}", "\"\"", "4294967296", "0.5", "\\u0000", "true", "[[[[", ",", ":", "\"",
                                        "-0", "1e-400", "18446744073709551615", "\\ud83d\\ude00", "\xc3\xa9", "\xe1\x84\x80", "##", "\n", "[SEP]", "\xea\xb0\x80"};
    const std::string& word = WORDS[pick(sizeof WORDS / sizeof *WORDS)];
    if (text.empty()) text = "{";
    const size_t at = pick(text.size());
    switch (pick(9)) {
      case 0: text[at] = static_cast<char>(pick(256)); break;
      case 1: text.erase(at, 1 + pick(8)); break;
      case 2: text.insert(at, word); break;
      case 3: text.erase(at, pick(text.size())); break;
      case 4: text.insert(at, text.substr(pick(text.size()), pick(200))); break;
      case 5: text = text.substr(0, at) + other.substr(other.empty() ? 0 : pick(other.size())); break;
      case 6: {  // an element of a list goes
        const size_t comma = text.find(',', at);
        if (comma != std::string::npos) text.erase(comma, text.find_first_of(",]}", comma + 1) - comma);
        break;
      }
      default: {  // a number or a word becomes another
        const size_t colon = text.find(": ", at);
        if (colon == std::string::npos) break;
        const size_t end = text.find_first_of(",}]\n", colon + 2);
        if (end != std::string::npos) text.replace(colon + 2, end - colon - 2, pick(2) ? word : std::to_string(random_() >> pick(64)));
      }
    }
    if (text.size() > LONGEST) text.resize(LONGEST);
  }

 private:
  std::mt19937_64 random_;
};

}  // namespace

int main(int count, char** words) {
  const std::string target = count > 5 ? words[1] : "";
  if (target != "manifest" && target != "words") {
    std::fprintf(stderr, "usage: kinetok_fuzz manifest|words SECONDS SEED OUT CORPUS...\n");
    return 2;
  }
  const bool manifest = target == "manifest";
  const double seconds = std::atof(words[2]);
  out_folder = words[4];
  fs::create_directories(out_folder);
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(crashed);
  std::set_terminate([] { crashed(), std::abort(); });

  std::vector<std::string> corpus, whole;  // whole: the part that is accepted, from which every second try starts
  for (int i = 5; i < count; ++i)
    for (const auto& entry : fs::directory_iterator(words[i])) corpus.push_back(read_file(entry.path().string(), 1u << 20));
  // Small ones first, and in an order that does not depend on the file system.
  std::sort(corpus.begin(), corpus.end(), [](const auto& a, const auto& b) { return a.size() != b.size() ? a.size() < b.size() : a < b; });
  unsigned long long tried = 0, accepted = 0, found = 0;
  for (const std::string& text : corpus) {
    current = text;
    ++tried;
    const auto before = accepted;
    if (run(manifest, accepted) && seconds == 0) keep(std::to_string(++found));
    if (accepted > before) whole.push_back(text);
  }
  if (whole.empty()) {
    std::fprintf(stderr, "expected a corpus with something in it that is accepted\n");
    return 1;
  }
  Changes changes(std::strtoull(words[3], nullptr, 10));
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  while (std::chrono::steady_clock::now() < end) {
    const auto& from = changes.pick(2) ? whole : corpus;
    std::string text = from[changes.pick(from.size())];
    for (size_t n = 1 + changes.pick(4); n > 0; --n) changes.apply(text, corpus[changes.pick(corpus.size())]);
    current = text;
    ++tried;
    const auto before = accepted;
    if (!run(manifest, accepted)) continue;
    corpus.push_back(text);
    if (accepted > before) whole.push_back(text);
    keep(std::to_string(++found) + "-" + words[3]);
  }
  const auto reached = EDGES - static_cast<size_t>(std::count(seen, seen + EDGES, 0));
  std::printf("%s: %llu tried, %llu accepted, %zu edges reached, %zu in the corpus\n", target.c_str(), tried, accepted, reached, corpus.size());
  return 0;
}
