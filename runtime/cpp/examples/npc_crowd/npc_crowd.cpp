// A headless game: a crowd of characters on banked prompts, 60 frames a second, kt_step with a budget in each.
//
//   npc_crowd BUNDLE OUT [CHARACTERS 8] [SECONDS 10] [BUDGET_US 2000] [--inline] [--json FILE]
//
// --inline computes in kt_step instead of beside it (KT_OPEN_INLINE); --json keeps the figures in a file.
// Every character gets another prompt every few seconds and goes on from the pose it is in. Writes OUT/npc_N.bvh and prints,
// last, how long the frames' calls of kinetok took.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "bvh.hpp"
#include "kinetok.h"

namespace {

constexpr int GAME_RATE = 60;
constexpr int TICKS_A_PROMPT = 3 * GAME_RATE;
constexpr uint32_t TEXT_ROOM = 20, TOKEN_RATE = 15;
const char* const PROMPTS[] = {"a person walks forward", "a person stands still", "a person runs", "a person jumps",
                               "a person walks", "a person runs forward"};
constexpr size_t PROMPT_COUNT = sizeof PROMPTS / sizeof *PROMPTS;

void must(kt_status status) {
  if (status == KT_OK) return;
  std::fprintf(stderr, "%s: %s\n", kt_status_name(status), kt_last_error());
  std::exit(2);
}

struct Npc {
  kt_character handle = 0;
  std::vector<float> played;  // every frame shown so far
  int late = 0;               // frames that were due and not there
};

void give_prompt(kt_model model, const Npc& npc, size_t which) {
  uint32_t id = 0;
  must(kt_bank_find(model, PROMPTS[which % PROMPT_COUNT], &id));
  kt_prompt_source source{};
  source.size = sizeof source;
  source.abi = KT_ABI_VERSION;
  source.banked = id + 1;
  must(kt_prompt(npc.handle, &source));
}

double percentile(const std::vector<double>& sorted, double p) {
  return sorted[std::min(sorted.size() - 1, static_cast<size_t>(p * static_cast<double>(sorted.size())))];
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<const char*> words;
  const char* json = nullptr;
  bool in_line = false;
  for (int i = 0; i < count; ++i) {
    if (std::strcmp(arguments[i], "--inline") == 0)
      in_line = true;
    else if (std::strcmp(arguments[i], "--json") == 0 && i + 1 < count)
      json = arguments[++i];
    else
      words.push_back(arguments[i]);
  }
  if (words.size() < 3 || words.size() > 6) {
    std::fprintf(stderr, "usage: npc_crowd BUNDLE OUT [CHARACTERS 8] [SECONDS 10] [BUDGET_US 2000] [--inline] [--json FILE]\n");
    return 2;
  }
  const auto number = [&](size_t at, int otherwise) { return words.size() > at ? std::atoi(words[at]) : otherwise; };
  const int characters = number(3, 8), seconds = number(4, 10), budget = number(5, 2000);
  if (characters < 1 || seconds < 1 || budget < 1) {
    std::fprintf(stderr, "expected whole numbers from 1 as CHARACTERS, SECONDS and BUDGET_US\n");
    return 2;
  }

  kt_model_options options{};
  options.size = sizeof options;
  options.abi = KT_ABI_VERSION;
  options.characters = static_cast<uint32_t>(characters);
  options.flags = KT_OPEN_NO_TEXT | (in_line ? KT_OPEN_INLINE : 0);
  kt_model model = 0;
  // A short text and the ten seconds of motion behind it; the cost of a token grows with what there is room for.
  options.positions = TEXT_ROOM + 10 * TOKEN_RATE;
  must(kt_model_open(words[1], &options, &model));
  kt_model_info info{};
  info.size = sizeof info;
  info.abi = KT_ABI_VERSION;
  must(kt_model_query(model, &info));
  std::vector<Joint> joints;
  for (uint32_t i = 0; i < info.joints; ++i) {
    kt_joint_info about{};
    about.size = sizeof about;
    about.abi = KT_ABI_VERSION;
    must(kt_joint(model, i, KT_LAYOUT_GLTF, &about));
    joints.push_back({about.name, about.parent, {about.offset[0], about.offset[1], about.offset[2]}});
  }
  uint32_t floats = 0;
  must(kt_frame_floats(model, KT_LAYOUT_GLTF, &floats));

  std::vector<Npc> crowd(static_cast<size_t>(characters));
  kt_character_options how{};
  must(kt_character_defaults(model, &how));
  how.seconds = INFINITY;
  for (size_t i = 0; i < crowd.size(); ++i) {
    how.request = static_cast<uint32_t>(i);
    must(kt_character_create(model, &how, &crowd[i].handle));
    crowd[i].played.reserve(static_cast<size_t>(seconds) * info.frame_rate * floats);
    give_prompt(model, crowd[i], i);
  }

  using Clock = std::chrono::steady_clock;
  must(kt_step(model, KT_UNLIMITED, nullptr));  // behind the loading screen: everyone's first frames
  const int ticks = seconds * GAME_RATE;
  const int ticks_a_frame = GAME_RATE / static_cast<int>(info.frame_rate);
  std::vector<double> took;
  std::vector<float> frame(floats);
  uint64_t tokens = 0;
  int switched = 0;
  const std::clock_t cpu_began = std::clock();
  auto next = Clock::now();
  for (int tick = 0; tick < ticks; ++tick) {
    const auto began = Clock::now();
    for (size_t i = 0; i < crowd.size(); ++i) {
      const int own = tick + static_cast<int>(i) * TICKS_A_PROMPT / characters;
      if (!tick || own % TICKS_A_PROMPT) continue;
      give_prompt(model, crowd[i], i + static_cast<size_t>(own / TICKS_A_PROMPT));
      ++switched;
    }
    kt_step_report report{};
    report.size = sizeof report;
    report.abi = KT_ABI_VERSION;
    must(kt_step(model, static_cast<uint32_t>(budget), &report));
    tokens += report.tokens;
    if (tick % ticks_a_frame == 0) {
      for (Npc& npc : crowd) {
        uint32_t read = 0;
        must(kt_read_frames(npc.handle, KT_LAYOUT_GLTF, frame.data(), frame.size(), 1, &read));
        npc.late += read == 0;
        npc.played.insert(npc.played.end(), frame.begin(), frame.begin() + (read ? floats : 0));
      }
    }
    took.push_back(std::chrono::duration<double, std::milli>(Clock::now() - began).count());
    next += std::chrono::microseconds(1000000 / GAME_RATE);
    std::this_thread::sleep_until(next);
  }

  const double cores = static_cast<double>(std::clock() - cpu_began) / CLOCKS_PER_SEC / seconds;
  std::sort(took.begin(), took.end());

  std::filesystem::create_directories(words[2]);
  int late = 0;
  size_t shown = 0;
  for (size_t i = 0; i < crowd.size(); ++i) {
    const std::string path = std::string(words[2]) + "/npc_" + std::to_string(i) + ".bvh";
    if (!write_bvh(path, joints, crowd[i].played, info.frame_rate)) {
      std::fprintf(stderr, "%s: cannot be written\n", path.c_str());
      return 2;
    }
    std::printf("wrote %s\n", path.c_str());
    late += crowd[i].late;
    shown += crowd[i].played.size() / floats;
  }
  must(kt_model_close(model));
  std::printf("%d characters, %d s at %d Hz, ONNX Runtime %s on %s, %.1f MB: %llu tokens, %d prompts switched\n", characters, seconds,
              GAME_RATE, info.onnxruntime, info.provider, static_cast<double>(info.memory_bytes) / 1e6,
              static_cast<unsigned long long>(tokens), switched);
  std::printf("frames shown %zu, late %d; %.2f cores\n", shown, late, cores);
  std::printf("milliseconds a game frame: p50 %.3f, p90 %.3f, p99 %.3f, most %.3f (budget %.3f)\n", percentile(took, 0.5),
              percentile(took, 0.9), percentile(took, 0.99), percentile(took, 1), budget / 1e3);
  if (!json) return 0;
  std::FILE* file = std::fopen(json, "w");
  if (!file) {
    std::fprintf(stderr, "%s: cannot be written\n", json);
    return 2;
  }
  std::fprintf(file,
               "{\n \"characters\": %d,\n \"seconds\": %d,\n \"inline\": %s,\n \"guided\": %s,\n \"budget_ms\": %.3f,\n"
               " \"frame_ms\": {\"p50\": %.3f, \"p90\": %.3f, \"p99\": %.3f, \"most\": %.3f},\n"
               " \"frames_shown\": %zu,\n \"frames_late\": %d,\n \"tokens\": %llu,\n \"prompts_switched\": %d,\n \"cores\": %.3f,\n"
               " \"memory_bytes\": %llu,\n \"onnxruntime\": \"%s\",\n \"provider\": \"%s\"\n}\n",
               characters, seconds, in_line ? "true" : "false", info.has_guidance ? "true" : "false", budget / 1e3, percentile(took, 0.5),
               percentile(took, 0.9), percentile(took, 0.99), percentile(took, 1), shown, late, static_cast<unsigned long long>(tokens),
               switched, cores, static_cast<unsigned long long>(info.memory_bytes), info.onnxruntime, info.provider);
  return std::fclose(file) == 0 ? 0 : 2;
}
