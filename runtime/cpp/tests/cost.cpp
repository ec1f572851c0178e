// What a call costs by the characters in it, for benchmarks/runtime/bench_cpp_cost.py: kinetok_cost BUNDLE POSITIONS RUNS
//
// A line a call: "hot" (right after one like it) or "cold" (a game's frame later, when other work has had the caches), its
// characters, and microseconds of processor time of decoding, the detokenizer and one character's draw.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <thread>

#include "error.hpp"
#include "graphs.hpp"
#include "sampling.hpp"

using namespace kinetok;

namespace {

constexpr auto FRAME = std::chrono::milliseconds(16);

template <typename Body>
double microseconds(Body body) {
  const std::clock_t began = std::clock();
  body();
  return static_cast<double>(std::clock() - began) * 1e6 / CLOCKS_PER_SEC;
}

void measure(const char* folder, uint32_t positions, int runs) {
  const Bundle bundle(folder);
  constexpr uint32_t GUIDED = 2;  // rows a character
  kt_model_options options{};
  options.characters = Graphs::TOGETHER;
  options.positions = positions;
  options.threads = 1;
  Memory memory(options);
  const ort::Runtime runtime("");
  const ort::Provider provider(runtime, "cpu");
  Graphs graphs(bundle, runtime, provider, options, GUIDED, memory);
  sampling::Sampler sampler(bundle.logits);
  const auto call = [&](const char* name, uint32_t count) {
    const double decode = microseconds([&] { graphs.decode(0, count); });
    const double draw = microseconds([&] {
      sampler.mix(graphs.logits_of(0), graphs.logits_of(1), bundle.guidance);
      sampler.draw({0, 0, 0, bundle.top_k, bundle.temperature, bundle.top_p});
    });
    const double detokenize = microseconds([&] { graphs.detokenize(0, count); });
    if (name) std::printf("%s %u %.0f %.0f %.0f\n", name, count, decode, detokenize, draw);
  };
  for (int run = -1; run < runs; ++run) {  // the first is not counted: ONNX Runtime takes its memory in it
    for (uint32_t count = 1; count <= Graphs::TOGETHER; count *= 2) {
      std::this_thread::sleep_for(FRAME);
      call(run < 0 ? nullptr : "cold", count);
      call(run < 0 ? nullptr : "hot", count);
    }
  }
}

}  // namespace

int main(int count, char** words) {
  if (count != 4) {
    std::fprintf(stderr, "usage: kinetok_cost BUNDLE POSITIONS RUNS\n");
    return 2;
  }
  try {
    measure(words[1], static_cast<uint32_t>(std::atoi(words[2])), std::atoi(words[3]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  return 0;
}
