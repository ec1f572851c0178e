// What this library computes, for tests/runtime/test_cpp.py to compare with Python.
//
//   kinetok_probe sample < CASES      a token a case: how it is drawn, classes, logits, logits of the empty text
//   kinetok_probe ids BUNDLE < TEXTS  ids a line; a text is its length (uint32) and its bytes
//   kinetok_probe generate BUNDLE OUT < COMMANDS   tokens a line, frames of every layout into OUT.N
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iostream>
#include <sstream>
#include <string>

#include "kinetok.h"
#include "sampling.hpp"
#include "wordpiece.hpp"

using namespace kinetok;

template <typename T>
static bool take(T& value) {
  return std::fread(&value, sizeof value, 1, stdin) == 1;
}

static int sample() {
  struct Case {
    uint64_t seed, position;
    uint32_t request, top_k, classes, banned;
    double temperature, top_p, guidance;
  } c;
  while (take(c)) {
    std::vector<float> logits(c.classes), empty(c.classes);
    if (std::fread(logits.data(), sizeof(float), c.classes, stdin) != c.classes) return 2;
    if (std::fread(empty.data(), sizeof(float), c.classes, stdin) != c.classes) return 2;
    sampling::Sampler sampler(c.classes);
    sampler.mix(logits.data(), c.guidance == 1 ? nullptr : empty.data(), c.guidance);
    if (c.banned < c.classes) sampler.ban(c.banned);
    std::printf("%d\n", sampler.draw({c.seed, c.position, c.request, c.top_k, c.temperature, c.top_p}));
  }
  return 0;
}

static int ids(const char* folder) {
  const Bundle bundle(folder);
  WordPiece words(bundle.text, read_file(bundle.file(bundle.text.vocab, true), 64u << 20));
  std::vector<int64_t> found(bundle.text.max_ids);
  for (uint32_t bytes; take(bytes);) {
    std::string text(bytes, '\0');
    if (std::fread(text.data(), 1, bytes, stdin) != bytes) return 2;
    const uint32_t count = words.encode(text, found.data(), bundle.text.max_ids);
    for (uint32_t i = 0; i < count; ++i) std::printf("%lld ", static_cast<long long>(found[i]));
    std::printf("\n");
  }
  return 0;
}

static void must(kt_status status) {
  if (status == KT_OK) return;
  std::fprintf(stderr, "%s: %s\n", kt_status_name(status), kt_last_error());
  std::exit(2);
}

// One character: "new SEED REQUEST TEMPERATURE TOP_K TOP_P GUIDANCE SECONDS AHEAD FLAGS", "say TEXT" (banked),
// "speak TEXT" (encoded), "run", "read LAYOUT" (into a file), "joints LAYOUT" (offsets, a line each).
static int generate(const char* folder, const std::string& out) {
  kt_model model = 0;
  kt_character character = 0;
  int number = 0;
  for (std::string line, word; std::getline(std::cin, line);) {
    std::istringstream rest(line);
    rest >> word;
    if (word == "new") {
      kt_model_options options{};
      options.size = sizeof options;
      options.abi = KT_ABI_VERSION;
      options.characters = 1;
      kt_character_options how{};
      std::string seconds;
      uint64_t seed;
      uint32_t request, top_k;
      double temperature, top_p, guidance;
      rest >> seed >> request >> temperature >> top_k >> top_p >> guidance >> seconds >> options.ahead_frames >> options.flags;
      if (!rest) return 2;
      if (model) must(kt_model_close(model));
      must(kt_model_open(folder, &options, &model));
      must(kt_character_defaults(model, &how));
      how.seed = seed, how.request = request, how.temperature = temperature, how.top_k = top_k, how.top_p = top_p;
      how.guidance = guidance, how.seconds = std::strtod(seconds.c_str(), nullptr);
      must(kt_character_create(model, &how, &character));
    } else if (word == "speak") {
      std::string text;
      std::getline(rest >> std::ws, text);
      kt_prompt_source source{};
      source.size = sizeof source;
      source.abi = KT_ABI_VERSION;
      source.text = text.c_str();
      must(kt_prompt(character, &source));
    } else if (word == "joints") {
      uint32_t layout = 0;
      rest >> layout;
      kt_joint_info joint{};
      joint.size = sizeof joint;
      joint.abi = KT_ABI_VERSION;
      for (uint32_t i = 0; i < 22; ++i) {
        must(kt_joint(model, i, layout, &joint));
        std::printf("%.9g %.9g %.9g\n", joint.offset[0], joint.offset[1], joint.offset[2]);
      }
    } else if (word == "say") {
      std::string text;
      std::getline(rest >> std::ws, text);
      kt_prompt_source source{};
      source.size = sizeof source;
      source.abi = KT_ABI_VERSION;
      must(kt_bank_find(model, text.c_str(), &source.banked));
      ++source.banked;
      must(kt_prompt(character, &source));
    } else if (word == "run") {
      must(kt_step(model, KT_UNLIMITED, nullptr));
    } else if (word == "tokens") {
      std::vector<int32_t> tokens(10000);
      uint32_t count = 0;
      must(kt_read_tokens(character, tokens.data(), 10000, &count));
      for (uint32_t i = 0; i < count; ++i) std::printf("%d ", tokens[i]);
      std::printf("\n");
    } else if (word == "read") {
      uint32_t layout = 0, floats = 0, read = 0;
      rest >> layout;
      must(kt_frame_floats(model, layout, &floats));
      std::vector<float> frames(size_t{floats} * 1000);
      must(kt_read_frames(character, layout, frames.data(), frames.size(), 1000, &read));
      std::ofstream file(out + "." + std::to_string(number++), std::ios::binary);
      file.write(reinterpret_cast<const char*>(frames.data()), static_cast<std::streamsize>(size_t{read} * floats * sizeof(float)));
    }
  }
  if (model) must(kt_model_close(model));
  return 0;
}

int main(int count, char** words) {
  try {
    const std::string what = count > 1 ? words[1] : "";
    if (what == "sample") return sample();
    if (what == "ids" && count == 3) return ids(words[2]);
    if (what == "generate" && count == 4) return generate(words[2], words[3]);
    std::fprintf(stderr, "usage: kinetok_probe sample | ids BUNDLE | generate BUNDLE OUT\n");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
  }
  return 2;
}
