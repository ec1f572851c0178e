// A model that a test opens and closes.
#pragma once

#include "expect.hpp"

struct Host {
  explicit Host(uint32_t characters, uint32_t flags = KT_OPEN_NO_TEXT, uint32_t ahead_frames = 0) {
    auto options = sized<kt_model_options>();
    options.characters = characters;
    options.flags = flags | KT_OPEN_NO_HASHES;  // test_api.cpp looks at hashes
    options.ahead_frames = ahead_frames;
    EXPECT_STATUS(KT_OK, kt_model_open(bundle_folder.c_str(), &options, &model));
  }
  ~Host() { kt_model_close(model); }
  Host(const Host&) = delete;

  kt_character_options defaults() const {
    kt_character_options options{};
    EXPECT_STATUS(KT_OK, kt_character_defaults(model, &options));
    return options;
  }
  kt_character create(const kt_character_options* options = nullptr) const {
    kt_character character = 0;
    EXPECT_STATUS(KT_OK, kt_character_create(model, options, &character));
    return character;
  }
  void prompt(kt_character character, uint32_t banked) const {
    auto source = sized<kt_prompt_source>();
    source.banked = banked + 1;
    EXPECT_STATUS(KT_OK, kt_prompt(character, &source));
  }
  kt_step_report run() const {  // until nobody can go on
    auto report = sized<kt_step_report>();
    EXPECT_STATUS(KT_OK, kt_step(model, KT_UNLIMITED, &report));
    return report;
  }
  kt_character_info query(kt_character character) const {
    auto info = sized<kt_character_info>();
    EXPECT_STATUS(KT_OK, kt_character_query(character, &info));
    return info;
  }
  std::vector<int32_t> tokens(kt_character character) const {
    std::vector<int32_t> all(2000);
    uint32_t count = 0;
    EXPECT_STATUS(KT_OK, kt_read_tokens(character, all.data(), static_cast<uint32_t>(all.size()), &count));
    all.resize(count);
    return all;
  }
  std::vector<float> frames(kt_character character, uint32_t layout = KT_LAYOUT_FEATURES) const {
    uint32_t floats = 0, read = 0;
    EXPECT_STATUS(KT_OK, kt_frame_floats(model, layout, &floats));
    std::vector<float> all(size_t{query(character).unread_frames} * floats);
    EXPECT_STATUS(KT_OK, kt_read_frames(character, layout, all.data(), all.size(), query(character).unread_frames, &read));
    EXPECT_EQ(size_t{read} * floats, all.size());
    return all;
  }

  kt_model model = 0;
};
