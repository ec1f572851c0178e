// A headless game: a crowd of characters on banked prompts, 60 frames a second, kt_step with a budget in each.
//
//   npc_crowd BUNDLE OUT [CHARACTERS 8] [SECONDS 10] [BUDGET_US 2000]
//
// Every character gets another prompt every few seconds and goes on from the pose it is in. Writes OUT/npc_N.bvh and prints,
// last, how long the frames' calls of kinetok took.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "bvh.hpp"
#include "kinetok.h"

namespace {

constexpr int GAME_RATE = 60;
constexpr int TICKS_A_PROMPT = 3 * GAME_RATE;
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

double percentile(std::vector<double> sorted, double p) {
  std::sort(sorted.begin(), sorted.end());
  return sorted[std::min(sorted.size() - 1, static_cast<size_t>(p * static_cast<double>(sorted.size())))];
}

}  // namespace

int main(int count, char** words) {
  if (count < 3) {
    std::fprintf(stderr, "usage: npc_crowd BUNDLE OUT [CHARACTERS 8] [SECONDS 10] [BUDGET_US 2000]\n");
    return 2;
  }
  const auto number = [&](int at, int otherwise) { return count > at ? std::atoi(words[at]) : otherwise; };
  const int characters = number(3, 8), seconds = number(4, 10), budget = number(5, 2000);
  if (characters < 1 || seconds < 1 || budget < 1) {
    std::fprintf(stderr, "expected whole numbers from 1 as CHARACTERS, SECONDS and BUDGET_US\n");
    return 2;
  }

  kt_model_options options{};
  options.size = sizeof options;
  options.abi = KT_ABI_VERSION;
  options.characters = static_cast<uint32_t>(characters);
  options.flags = KT_OPEN_NO_TEXT;
  kt_model model = 0;
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
  std::printf("frames shown %zu, late %d\n", shown, late);
  std::printf("milliseconds a game frame: p50 %.3f, p90 %.3f, p99 %.3f, most %.3f (budget %.3f)\n", percentile(took, 0.5),
              percentile(took, 0.9), percentile(took, 0.99), percentile(took, 1), budget / 1e3);
  return 0;
}
