// What needs a stub in ONNX Runtime's place (stub_onnxruntime.cpp): providers that are not on this machine, and the order of calls.
#include <cmath>
#include <cstring>

#include "expect.hpp"
#include "hosts.hpp"
#include "platform.hpp"

namespace {

kt_status open_with(const char* provider, std::string* in_use = nullptr) {
  auto options = sized<kt_model_options>();
  options.characters = 1;
  options.flags = KT_OPEN_NO_TEXT | KT_OPEN_NO_HASHES;
  options.provider = provider;
  kt_model model = 0;
  const kt_status status = kt_model_open(bundle_folder.c_str(), &options, &model);
  if (status != KT_OK) return status;
  auto info = sized<kt_model_info>();
  EXPECT_STATUS(KT_OK, kt_model_query(model, &info));
  EXPECT_EQ(std::string(info.onnxruntime), "stub");
  if (in_use) *in_use = info.provider;
  return kt_model_close(model);
}

template <typename Function>
Function of_stub(const char* name) {
  std::string why;
  return reinterpret_cast<Function>(kinetok::platform::symbol(kinetok::platform::environment("KINETOK_ONNXRUNTIME"), name, why));
}

bool said(const char* part) { return std::strstr(kt_last_error(), part) != nullptr; }

}  // namespace

TEST(Stub, a_provider_is_chosen_by_name_and_reported) {
  std::string in_use;
  EXPECT_STATUS(KT_OK, open_with(nullptr, &in_use));
  EXPECT_EQ(in_use, "CPUExecutionProvider");
  for (const char* spelt : {"cuda", "CUDA", "CUDAExecutionProvider", "cuda:device_id=0"}) {
    EXPECT_STATUS(KT_OK, open_with(spelt, &in_use));
    EXPECT_EQ(in_use, "CUDAExecutionProvider");
  }
  EXPECT_STATUS(KT_OK, open_with("XNNPACK:intra_op_num_threads=1", &in_use));
  EXPECT_EQ(in_use, "XnnpackExecutionProvider");
}

TEST(Stub, options_reach_the_provider) {
  EXPECT_STATUS(KT_ERROR_RUNTIME, open_with("cuda:device_id=7"));
  EXPECT_TRUE(said("invalid device ordinal 7"));
  EXPECT_STATUS(KT_ERROR_RUNTIME, open_with("cuda:colour=red"));
  EXPECT_TRUE(said("Unknown provider option: colour"));
  EXPECT_STATUS(KT_ERROR_RUNTIME, open_with("XNNPACK:refuse=1"));
  EXPECT_TRUE(said("the provider cannot run prefill.onnx"));
}

TEST(Stub, a_provider_that_is_absent_or_fails_is_one_line) {
  EXPECT_STATUS(KT_ERROR_RUNTIME, open_with("openvino"));
  EXPECT_TRUE(said("cuda, tensorrt, xnnpack, cpu"));
  EXPECT_TRUE(said("got openvino"));
  EXPECT_STATUS(KT_ERROR_RUNTIME, open_with("tensorrt"));  // listed, but its library is not there
  EXPECT_TRUE(said("libnvinfer"));
  for (const char* odd : {"cuda:device_id", "cuda:=1", "cuda:,", "cpu:threads=2"}) EXPECT_STATUS(KT_ERROR_ARGUMENT, open_with(odd));
  EXPECT_STATUS(KT_ERROR_RUNTIME, open_with(""));
}

TEST(Stub, a_release_too_old_for_a_graph_is_one_line_with_the_remedy) {
  const char* remedies[][2] = {{"format", "--opset 18"}, {"opset", "--opset 18"}, {"bits", "--dtype fp32"}};
  for (const auto& [what, remedy] : remedies) {
    EXPECT_STATUS(KT_ERROR_RUNTIME, open_with((std::string("XNNPACK:old=") + what).c_str()));
    EXPECT_TRUE(said("ONNX Runtime stub is too old for ")) << kt_last_error();
    EXPECT_TRUE(said(": use a newer one") && said(remedy)) << kt_last_error();
    EXPECT_FALSE(std::strchr(kt_last_error(), '\n')) << kt_last_error();
  }
}

// A character that moves gets its token after one piece of somebody's preparation, not after all of it.
TEST(Stub, preparations_take_turns_with_tokens) {
  const auto hold = of_stub<void (*)(bool)>("kinetok_stub_hold");
  const auto calls = of_stub<const char* (*)()>("kinetok_stub_calls");
  const Host host(2, 0, 60);
  kt_character_options how = host.defaults();
  how.seconds = INFINITY;
  const kt_character moving = host.create(&how), told = host.create(&how);
  host.prompt(told, 1);
  host.prompt(moving, 2);
  host.run();
  EXPECT_GT(host.frames(moving).size(), 0);
  calls();
  hold(true);
  auto source = sized<kt_prompt_source>();
  source.text = "another sentence";
  EXPECT_STATUS(KT_OK, kt_prompt(told, &source));             // a sentence, two rows of text and 2 tokens behind them
  EXPECT_STATUS(KT_OK, kt_step(host.model, 1000, nullptr));  // a token
  hold(false);
  while (host.query(moving).tokens == 30) EXPECT_STATUS(KT_OK, kt_step(host.model, 0, nullptr));
  while (host.query(told).state == KT_PREPARING) EXPECT_STATUS(KT_OK, kt_step(host.model, 0, nullptr));
  EXPECT_STREQ(calls(), "tdsppdd");
}
