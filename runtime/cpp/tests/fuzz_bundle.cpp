// Random damage to a bundle's manifest: only Error may come of it. Run under AddressSanitizer.
//
//   kinetok_fuzz_bundle MANIFEST SECONDS [SEED]      changes it at random for so long
//   with -DKINETOK_LIBFUZZER (clang -fsanitize=fuzzer): the usual entry for libFuzzer
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>

#include "bundle.hpp"
#include "error.hpp"

static bool survives(std::string_view text) {
  try {
    kinetok::Bundle::parse(text);
    return true;
  } catch (const kinetok::Error&) {
    return false;
  }
}

#if defined(KINETOK_LIBFUZZER)
extern "C" int LLVMFuzzerTestOneInput(const unsigned char* data, size_t size) {
  survives({reinterpret_cast<const char*>(data), size});
  return 0;
}
#else

static void damage(std::string& text, std::mt19937_64& random) {
  static const char* const WORDS[] = {"-1", "1e308", "0", "null", "[]", "{}", "\"\"", "4294967296", "0.5", "\\u0000", "true", "[[[[", ",", ":", "\""};
  const auto pick = [&](size_t n) { return static_cast<size_t>(random() % n); };
  if (text.empty()) text = "{";
  const size_t at = pick(text.size());
  switch (pick(6)) {
    case 0: text[at] = static_cast<char>(pick(256)); break;
    case 1: text.erase(at, 1 + pick(8)); break;
    case 2: text.insert(at, WORDS[pick(sizeof WORDS / sizeof *WORDS)]); break;
    case 3: text.resize(at); break;
    case 4: text.insert(at, text.substr(pick(text.size()), pick(200))); break;
    default: {  // a number or a word becomes another
      const size_t colon = text.find(": ", at);
      if (colon == std::string::npos) break;
      const size_t end = text.find_first_of(",}]\n", colon + 2);
      if (end != std::string::npos) text.replace(colon + 2, end - colon - 2, WORDS[pick(sizeof WORDS / sizeof *WORDS)]);
    }
  }
}

int main(int count, char** words) {
  if (count < 3) {
    std::fprintf(stderr, "usage: kinetok_fuzz_bundle MANIFEST SECONDS [SEED]\n");
    return 2;
  }
  const std::string whole = kinetok::read_file(words[1], 64u << 20);
  if (!survives(whole)) {
    std::fprintf(stderr, "the manifest itself is refused\n");
    return 1;
  }
  std::mt19937_64 random(count > 3 ? std::strtoull(words[3], nullptr, 10) : 1);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(std::atof(words[2]));
  unsigned long long tried = 0, accepted = 0;
  while (std::chrono::steady_clock::now() < end) {
    std::string text = whole;
    for (size_t changes = 1 + random() % 4; changes > 0; --changes) damage(text, random);
    ++tried;
    accepted += survives(text);
  }
  std::printf("%llu manifests, %llu of them still fine\n", tried, accepted);
  return tried ? 0 : 1;
}
#endif
