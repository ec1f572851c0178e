// What needs a stub in ONNX Runtime's place (stub_onnxruntime.cpp): providers that are not on this machine.
#include <cstring>

#include "check.hpp"

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
  CHECK_STATUS(KT_OK, kt_model_query(model, &info));
  CHECK(std::string(info.onnxruntime) == "stub");
  if (in_use) *in_use = info.provider;
  return kt_model_close(model);
}

bool said(const char* part) { return std::strstr(kt_last_error(), part) != nullptr; }

}  // namespace

TEST(a_provider_is_chosen_by_name_and_reported) {
  std::string in_use;
  CHECK_STATUS(KT_OK, open_with(nullptr, &in_use));
  CHECK(in_use == "CPUExecutionProvider");
  for (const char* spelt : {"cuda", "CUDA", "CUDAExecutionProvider", "cuda:device_id=0"}) {
    CHECK_STATUS(KT_OK, open_with(spelt, &in_use));
    CHECK(in_use == "CUDAExecutionProvider");
  }
  CHECK_STATUS(KT_OK, open_with("XNNPACK:intra_op_num_threads=1", &in_use));
  CHECK(in_use == "XnnpackExecutionProvider");
}

TEST(options_reach_the_provider) {
  CHECK_STATUS(KT_ERROR_RUNTIME, open_with("cuda:device_id=7"));
  CHECK(said("invalid device ordinal 7"));
  CHECK_STATUS(KT_ERROR_RUNTIME, open_with("cuda:colour=red"));
  CHECK(said("Unknown provider option: colour"));
  CHECK_STATUS(KT_ERROR_RUNTIME, open_with("XNNPACK:refuse=1"));
  CHECK(said("the provider cannot run prefill.onnx"));
}

TEST(a_provider_that_is_absent_or_fails_is_one_line) {
  CHECK_STATUS(KT_ERROR_RUNTIME, open_with("openvino"));
  CHECK(said("cuda, tensorrt, xnnpack, cpu") && said("got openvino"));
  CHECK_STATUS(KT_ERROR_RUNTIME, open_with("tensorrt"));  // listed, but its library is not there
  CHECK(said("libnvinfer"));
  for (const char* odd : {"cuda:device_id", "cuda:=1", "cuda:,", "cpu:threads=2"}) CHECK_STATUS(KT_ERROR_ARGUMENT, open_with(odd));
  CHECK_STATUS(KT_ERROR_RUNTIME, open_with(""));
}
