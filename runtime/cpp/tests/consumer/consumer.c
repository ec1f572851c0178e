/* The ten lines of docs/cpp.md in C: a bundle, a prompt, the first frame. */
#include <stdio.h>

#include <kinetok.h>

int main(int count, char **words) {
  kt_model model;
  kt_character character;
  kt_prompt_source prompt = {sizeof prompt, KT_ABI_VERSION, NULL, NULL, 0, 1 + 1};
  float frame[3 + 4 * 22];
  uint32_t read = 0;
  if (count < 2 || kt_model_open(words[1], NULL, &model) || kt_character_create(model, NULL, &character) ||
      kt_prompt(character, &prompt)) {
    fprintf(stderr, "%s\n", kt_last_error());
    return 2;
  }
  while (!read && !kt_step(model, 2000, NULL) && !kt_read_frames(character, KT_LAYOUT_GLTF, frame, 3 + 4 * 22, 1, &read)) continue;
  printf("version %u, first frame: pelvis at %.3f m\n", (unsigned)kt_version(), frame[1]);
  return kt_model_close(model);
}
