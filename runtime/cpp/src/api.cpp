// The C border: handles, threads, sizes and errors. Nothing is thrown past it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "model.hpp"

namespace kinetok {
namespace {

// A handle: 24 bits of the character's generation, 16 of its index, 16 of the model's generation, 8 of its place.
constexpr uint32_t NO_CHARACTER = 0xFFFF, MODELS = 64;

thread_local char last_error[400] = "";

struct Place {
  std::unique_ptr<Model> model;
  uint32_t generation = 0;
  std::thread::id owner;
  bool busy = false;
};

struct Registry {
  std::mutex mutex;
  Place places[MODELS];
};

Registry& registry() {
  static auto* const all = new Registry;  // never destroyed: a host may call while the process ends
  return *all;
}

struct Parts {
  uint32_t place, model_generation, index, generation;
};

Parts parts(uint64_t handle) {
  return {static_cast<uint32_t>(handle & 0xFF), static_cast<uint32_t>(handle >> 8 & 0xFFFF), static_cast<uint32_t>(handle >> 24 & 0xFFFF), static_cast<uint32_t>(handle >> 40)};
}

uint64_t handle_of(uint64_t model, uint32_t index, uint32_t generation) {
  return (model & 0xFFFFFF) | uint64_t{index} << 24 | uint64_t{generation} << 40;
}

// The right to use a model for one call.
class Use {
 public:
  Use(uint64_t handle, bool adopt = false) {
    const Parts p = parts(handle);
    Registry& all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    if (p.place >= MODELS || !all.places[p.place].model || all.places[p.place].generation != p.model_generation)
      throw Error(KT_ERROR_HANDLE, "%#llx is no handle of an open model, or of one of its characters", static_cast<unsigned long long>(handle));
    Place& place = all.places[p.place];
    if (place.busy) throw Error(KT_ERROR_THREAD, "another thread is in a call on this model: one at a time");
    if (adopt) place.owner = std::this_thread::get_id();
    if (place.owner != std::this_thread::get_id()) throw Error(KT_ERROR_THREAD, "this model belongs to another thread: call kt_model_adopt on this one first");
    place.busy = true;
    place_ = &place;
    model = place.model.get();
  }
  ~Use() {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    place_->busy = false;
  }
  Use(const Use&) = delete;

  std::unique_ptr<Model> release() {
    const std::lock_guard<std::mutex> lock(registry().mutex);
    return std::move(place_->model);
  }

  Model* model;

 private:
  Place* place_;
};

Use use_model(kt_model handle) {
  if (parts(handle).index != NO_CHARACTER) throw Error(KT_ERROR_HANDLE, "%#llx is no handle of a model", static_cast<unsigned long long>(handle));
  return Use(handle);
}

struct UseCharacter : Use {
  explicit UseCharacter(kt_character handle) : Use(handle) {
    const Parts p = parts(handle);
    index = p.index;
    Character* found = model->character(p.index, p.generation);
    if (!found) throw Error(KT_ERROR_HANDLE, "%#llx is no handle of a character, or of one that was destroyed", static_cast<unsigned long long>(handle));
    character = found;
  }
  uint32_t index;
  Character* character;
};

template <typename Body>
kt_status guarded(Body body) noexcept {
  try {
    body();
    return KT_OK;
  } catch (const Error& error) {
    std::snprintf(last_error, sizeof last_error, "%s", error.what());
    return error.status;
  } catch (const std::bad_alloc&) {
    std::snprintf(last_error, sizeof last_error, "no memory left: open with fewer characters or positions");
    return KT_ERROR_MEMORY;
  } catch (const std::exception& error) {
    std::snprintf(last_error, sizeof last_error, "unexpected: %s", error.what());
    return KT_ERROR_INTERNAL;
  } catch (...) {
    std::snprintf(last_error, sizeof last_error, "unexpected");
    return KT_ERROR_INTERNAL;
  }
}

void needs(const void* pointer, const char* name) {
  if (!pointer) throw Error(KT_ERROR_ARGUMENT, "%s: expected an address, got null", name);
}

template <typename T>
void check_head(const T* given, const char* name) {
  needs(given, name);
  if (given->abi != KT_ABI_VERSION) throw Error(KT_ERROR_VERSION, "%s.abi: expected KT_ABI_VERSION %d, got %u: compile against this library's kinetok.h", name, KT_ABI_VERSION, given->abi);
  // Every header's structure ends where its alignment does; any other size would cut an address in two.
  if (given->size < 2 * sizeof(uint32_t) || given->size > sizeof(T) || given->size % alignof(T))
    throw Error(KT_ERROR_VERSION, "%s.size: expected 8 to %zu in steps of %zu, got %u: set it to sizeof, and use a library no older than its header", name, sizeof(T), alignof(T), given->size);
}

template <typename T>
T taken(const T* given, const char* name) {
  check_head(given, name);
  T full{};
  std::memcpy(static_cast<void*>(&full), given, given->size);
  return full;
}

template <typename T>
void give(const T& full, T* target) {  // checked before; the host's size and abi stay
  constexpr size_t head = 2 * sizeof(uint32_t);
  std::memcpy(reinterpret_cast<char*>(target) + head, reinterpret_cast<const char*>(&full) + head, target->size - head);
}

void check_layout(uint32_t layout, uint32_t last) {
  if (layout > last) throw Error(KT_ERROR_ARGUMENT, "layout: expected one of KT_LAYOUT_..., got %u", layout);
}

uint32_t floats_of(const Model& model, uint32_t layout) {
  check_layout(layout, KT_LAYOUT_FEATURES);
  return layout == KT_LAYOUT_FEATURES ? model.bundle().features : pose_floats(model.bundle());
}

}  // namespace
}  // namespace kinetok

using namespace kinetok;

uint32_t kt_version(void) noexcept { return KINETOK_VERSION_NUMBER; }

const char* kt_status_name(kt_status status) noexcept {
  static const char* const names[] = {"KT_OK",           "KT_ERROR_ARGUMENT", "KT_ERROR_HANDLE",  "KT_ERROR_THREAD",
                                      "KT_ERROR_BUNDLE", "KT_ERROR_HASH",     "KT_ERROR_VERSION", "KT_ERROR_RUNTIME",
                                      "KT_ERROR_MEMORY", "KT_ERROR_STATE",    "KT_ERROR_FULL",    "KT_ERROR_INTERNAL"};
  return status >= 0 && status <= KT_ERROR_INTERNAL ? names[status] : "unknown status";
}

const char* kt_last_error(void) noexcept { return last_error; }

kt_status kt_model_open(const char* bundle, const kt_model_options* options, kt_model* model) noexcept {
  return guarded([&] {
    needs(bundle, "bundle");
    needs(model, "model");
    const kt_model_options full = options ? taken(options, "options") : kt_model_options{};
    auto opened = std::make_unique<Model>(bundle, full);
    Registry& all = registry();
    const std::lock_guard<std::mutex> lock(all.mutex);
    for (uint32_t i = 0; i < MODELS; ++i) {
      Place& place = all.places[i];
      if (place.model || place.busy) continue;
      place.model = std::move(opened);
      place.generation = place.generation % 0xFFFF + 1;
      place.owner = std::this_thread::get_id();
      *model = handle_of(i | uint64_t{place.generation} << 8, NO_CHARACTER, 0);
      return;
    }
    throw Error(KT_ERROR_FULL, "%u models are open: close one", MODELS);
  });
}

kt_status kt_model_close(kt_model model) noexcept {
  return guarded([&] {
    std::unique_ptr<Model> last;
    Use use = use_model(model);
    last = use.release();
    last.reset();
  });
}

kt_status kt_model_adopt(kt_model model) noexcept {
  return guarded([&] {
    if (parts(model).index != NO_CHARACTER) throw Error(KT_ERROR_HANDLE, "expected a handle of a model");
    const Use use(model, true);
  });
}

kt_status kt_model_query(kt_model handle, kt_model_info* info) noexcept {
  return guarded([&] {
    check_head(info, "info");
    const Use use = use_model(handle);
    const Model& model = *use.model;
    const Bundle& bundle = model.bundle();
    kt_model_info full{};
    full.joints = static_cast<uint32_t>(bundle.joints.size());
    full.features = bundle.features;
    full.frame_rate = bundle.frame_rate;
    full.frames_per_token = bundle.frames_per_token;
    full.characters = model.options().characters;
    full.positions = model.options().positions;
    full.ahead_frames = model.options().ahead_frames;
    full.look_ahead_frames = bundle.delay_frames;
    full.banked_prompts = static_cast<uint32_t>(bundle.bank.size());
    full.has_text = model.has_text();
    full.has_guidance = model.guided();
    full.memory_bytes = model.memory_bytes();
    std::snprintf(full.provider, sizeof full.provider, "%s", model.provider().c_str());
    std::snprintf(full.onnxruntime, sizeof full.onnxruntime, "%s", model.runtime_version().c_str());
    give(full, info);
  });
}

kt_status kt_joint(kt_model handle, uint32_t joint, uint32_t layout, kt_joint_info* info) noexcept {
  return guarded([&] {
    check_head(info, "info");
    check_layout(layout, KT_LAYOUT_UNREAL);
    const Use use = use_model(handle);
    const Bundle& bundle = use.model->bundle();
    if (joint >= bundle.joints.size()) throw Error(KT_ERROR_ARGUMENT, "joint: expected 0 to %zu, got %u", bundle.joints.size() - 1, joint);
    kt_joint_info full{};
    full.parent = bundle.parents[joint];
    const float* o = bundle.offsets.data() + 3 * size_t{joint};
    const Vector offset = place_in({o[0], o[1], o[2]}, layout);
    for (size_t i = 0; i < 3; ++i) full.offset[i] = static_cast<float>(offset[i]);
    full.name = bundle.joints[joint].c_str();
    give(full, info);
  });
}

kt_status kt_bank_find(kt_model handle, const char* text, uint32_t* id) noexcept {
  return guarded([&] {
    needs(text, "text");
    needs(id, "id");
    const Use use = use_model(handle);
    const auto& bank = use.model->bundle().bank;
    const auto found = std::find_if(bank.begin(), bank.end(), [text](const BankPrompt& prompt) { return prompt.text == text; });
    if (found == bank.end()) throw Error(KT_ERROR_ARGUMENT, "\"%.100s\" is not among the %zu banked prompts: kinetok embed adds it, before the export", text, bank.size());
    *id = static_cast<uint32_t>(found - bank.begin());
  });
}

kt_status kt_bank_text(kt_model handle, uint32_t id, const char** text) noexcept {
  return guarded([&] {
    needs(text, "text");
    const Use use = use_model(handle);
    const auto& bank = use.model->bundle().bank;
    if (id >= bank.size()) throw Error(KT_ERROR_ARGUMENT, "id: expected less than %zu, got %u", bank.size(), id);
    *text = bank[id].text.c_str();
  });
}

kt_status kt_character_defaults(kt_model handle, kt_character_options* options) noexcept {
  return guarded([&] {
    needs(options, "options");
    const Use use = use_model(handle);
    *options = use.model->defaults();
  });
}

kt_status kt_character_create(kt_model handle, const kt_character_options* options, kt_character* character) noexcept {
  return guarded([&] {
    needs(character, "character");
    const Use use = use_model(handle);
    if (options) check_head(options, "options");
    if (options && options->size != sizeof *options) throw Error(KT_ERROR_VERSION, "options.size: expected %zu, got %u", sizeof *options, options->size);
    const uint32_t index = use.model->create(options ? *options : use.model->defaults());
    *character = handle_of(handle, index, use.model->generation(index));
  });
}

kt_status kt_character_destroy(kt_character character) noexcept {
  return guarded([&] {
    const UseCharacter use(character);
    use.model->destroy(use.index);
  });
}

kt_status kt_character_query(kt_character character, kt_character_info* info) noexcept {
  return guarded([&] {
    check_head(info, "info");
    const UseCharacter use(character);
    kt_character_info full{};
    full.state = use.character->state;
    full.unread_frames = use.character->unread();
    full.tokens = use.character->written;
    std::memcpy(full.error, use.character->error, sizeof full.error);
    give(full, info);
  });
}

kt_status kt_prompt(kt_character character, const kt_prompt_source* prompt) noexcept {
  return guarded([&] {
    const kt_prompt_source full = taken(prompt, "prompt");
    if ((full.text != nullptr) + (full.features != nullptr) + (full.banked != 0) != 1) throw Error(KT_ERROR_ARGUMENT, "prompt: expected exactly one of text, features and banked");
    const UseCharacter use(character);
    use.model->prompt(use.index, full);
  });
}

kt_status kt_step(kt_model handle, uint32_t budget_us, kt_step_report* report) noexcept {
  return guarded([&] {
    if (report) check_head(report, "report");
    const Use use = use_model(handle);
    const kt_step_report full = use.model->step(budget_us);
    if (report) give(full, report);
  });
}

kt_status kt_read_frames(kt_character character, uint32_t layout, float* buffer, size_t floats, uint32_t frames, uint32_t* read) noexcept {
  return guarded([&] {
    needs(read, "read");
    if (frames) needs(buffer, "buffer");
    const UseCharacter use(character);
    const uint64_t wanted = uint64_t{frames} * floats_of(*use.model, layout);
    if (wanted > floats) throw Error(KT_ERROR_ARGUMENT, "buffer: %u frames need %llu floats, got %zu", frames, static_cast<unsigned long long>(wanted), floats);
    *read = use.model->read(use.index, layout, buffer, frames);
  });
}

kt_status kt_frame_floats(kt_model handle, uint32_t layout, uint32_t* floats) noexcept {
  return guarded([&] {
    needs(floats, "floats");
    const Use use = use_model(handle);
    *floats = floats_of(*use.model, layout);
  });
}

kt_status kt_read_tokens(kt_character character, int32_t* tokens, uint32_t capacity, uint32_t* count) noexcept {
  return guarded([&] {
    needs(count, "count");
    if (capacity) needs(tokens, "tokens");
    const UseCharacter use(character);
    const Character& c = *use.character;
    const uint32_t given = std::min(capacity, c.kept_tokens());
    for (uint32_t i = 0; i < given; ++i) tokens[i] = c.token(c.written - given + i);
    *count = given;
  });
}

kt_status kt_fork(kt_character character, uint64_t seed, uint32_t request, kt_character* twin) noexcept {
  return guarded([&] {
    needs(twin, "twin");
    const UseCharacter use(character);
    const uint32_t index = use.model->fork(use.index, seed, request);
    *twin = handle_of(character, index, use.model->generation(index));
  });
}

kt_status kt_cancel(kt_character character) noexcept {
  return guarded([&] {
    const UseCharacter use(character);
    use.model->cancel(use.index);
  });
}
