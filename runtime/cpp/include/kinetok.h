/* kinetok: sentences to human motion inside a frame budget. C ABI; docs/cpp.md tells it in prose.
 *
 * Threads. A model and its characters belong to one thread at a time: the one that opened the model, or the last one that
 * called kt_model_adopt. Calls from another thread return KT_ERROR_THREAD. Different models are independent. kt_version,
 * kt_status_name and kt_last_error may be called from anywhere. A model has one worker thread of its own, which
 * computes; it never calls the host, except its allocator's release in kt_model_close on the caller's thread.
 *
 * Errors. Every function returns a kt_status; nothing else crosses this border, no exception and no abort. A handle that was
 * freed, or never was one, gives KT_ERROR_HANDLE. Failed calls change nothing and leave their outputs as they were.
 *
 * Structures start with `size` (sizeof the structure as the host knows it) and `abi` (KT_ABI_VERSION). A library of the same
 * ABI version accepts shorter ones of older headers: what they lack is 0, which means the default. Only kt_character_options
 * must be whole: kt_character_defaults fills it.
 *
 * Borrowed memory. What a call is given it reads or fills before it returns and never keeps: options, texts, features and
 * buffers are the host's again then; only allocate, release and context are used until kt_model_close. Strings that calls
 * hand out belong to the library and say beside them how long they live.
 *
 * Units: metres (centimetres in the Unreal layout), seconds, radians. Text is UTF-8.
 */
#ifndef KINETOK_H
#define KINETOK_H

#include <stddef.h>
#include <stdint.h>

#if defined(_WIN32)
#if defined(KINETOK_BUILDING)
#define KT_API __declspec(dllexport)
#elif defined(KINETOK_SHARED)
#define KT_API __declspec(dllimport)
#else
#define KT_API
#endif
#else
#define KT_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
#define KT_NOEXCEPT noexcept
extern "C" {
#else
#define KT_NOEXCEPT
#endif

#define KT_ABI_VERSION 1
#define KT_UNLIMITED UINT32_MAX

typedef int32_t kt_status;
enum {
  KT_OK = 0,
  KT_ERROR_ARGUMENT = 1, /* null, out of range, not a number */
  KT_ERROR_HANDLE = 2,   /* freed, or never a handle */
  KT_ERROR_THREAD = 3,   /* not the model's thread */
  KT_ERROR_BUNDLE = 4,   /* absent, truncated, damaged or impossible */
  KT_ERROR_HASH = 5,     /* a file is not the one that was exported */
  KT_ERROR_VERSION = 6,  /* of the ABI or of the bundle, newer than this library */
  KT_ERROR_RUNTIME = 7,  /* ONNX Runtime absent, too old, without the provider, or it failed */
  KT_ERROR_MEMORY = 8,   /* the allocator had none, or sizes beyond any memory */
  KT_ERROR_STATE = 9,    /* not possible in this state; the message says which */
  KT_ERROR_FULL = 10,    /* every character, or every model, is taken */
  KT_ERROR_INTERNAL = 11
};

/* Handles are numbers, not addresses: a stale one is recognised, never followed. 0 is never a handle. */
typedef uint64_t kt_model;
typedef uint64_t kt_character;

enum {
  KT_OPEN_NO_TEXT = 1,   /* leave the text encoder out: banked prompts and features only */
  KT_OPEN_NO_HASHES = 2, /* do not read every file to compare its SHA-256 */
  KT_OPEN_NO_GUIDANCE = 4, /* half the memory and work; every character's guidance is then 1 */
  KT_OPEN_INLINE = 8       /* kt_step computes the tokens itself, within its budget; the worker only prepares prompts */
};

typedef struct kt_model_options {
  uint32_t size, abi;
  uint32_t characters;   /* most at once; 0: 8 */
  uint32_t positions;    /* of text and motion a character may need; 0: all the model has */
  uint32_t ahead_frames; /* a character waits when so many frames lie unread; 0: 16 */
  uint32_t threads;      /* of ONNX Runtime in one call; 0: 1 */
  uint32_t flags;        /* KT_OPEN_... */
  const char *provider;  /* ONNX Runtime's execution provider: "NAME" or "NAME:key=value,key=value"; NULL: "cpu" */
  const char *onnxruntime; /* its library; NULL: $KINETOK_ONNXRUNTIME, then the system's search path */
  /* All memory but names and tables (tens of kB) and what ONNX Runtime takes itself; NULL: the C++ heap. Aligned to `alignment`,
   * a power of two. Called in kt_model_open alone; release also in kt_model_close. Neither may throw. */
  void *(*allocate)(void *context, size_t bytes, size_t alignment);
  void (*release)(void *context, void *memory, size_t bytes);
  void *context;
} kt_model_options;

typedef struct kt_model_info {
  uint32_t size, abi;
  uint32_t joints, features;            /* 22 and 272 */
  uint32_t frame_rate, frames_per_token;
  uint32_t characters, positions, ahead_frames;
  uint32_t look_ahead_frames;           /* a frame comes this many frames after its token; a clip that ends catches up */
  uint32_t banked_prompts;              /* ids 0 to this - 1 */
  uint32_t has_text, has_guidance;      /* 1 or 0 */
  uint64_t memory_bytes;                /* asked of the allocator */
  char provider[32], onnxruntime[32];   /* in use, as ONNX Runtime calls it; its version */
} kt_model_info;

typedef struct kt_character_options {
  uint32_t size, abi;
  uint64_t seed;
  uint32_t request;    /* with the seed the name of the draws: equal pairs and prompts give equal tokens */
  uint32_t top_k;      /* 0: off */
  double temperature;  /* 0: greedy */
  double top_p;        /* 1: off */
  double guidance;     /* 1: off */
  double seconds;      /* of a clip; 0: the end token decides; INFINITY: until another prompt or kt_cancel */
} kt_character_options;

typedef struct kt_prompt_source { /* exactly one of the three */
  uint32_t size, abi;
  const char *text;      /* a sentence of at most 4000 bytes, if not NULL; copied */
  const float *features; /* [rows, text_dim], if not NULL; copied */
  uint32_t rows;
  uint32_t banked;       /* an id of the bank + 1, if not 0 */
} kt_prompt_source;

enum { KT_IDLE = 0, KT_PREPARING = 1, KT_RUNNING = 2, KT_DONE = 3, KT_FAILED = 4 };

typedef struct kt_character_info {
  uint32_t size, abi;
  uint32_t state;         /* KT_IDLE ... */
  uint32_t unread_frames; /* what kt_read_frames can give now */
  uint64_t tokens;        /* written so far */
  char error[128];        /* why it failed */
} kt_character_info;

typedef struct kt_step_report {
  uint32_t size, abi;
  uint32_t tokens;   /* written in this step, by all characters together */
  uint32_t ready;    /* characters with unread frames */
  uint32_t working;  /* characters that would write more: with budget, with the worker's result, or when they are read */
} kt_step_report;

/* How kt_read_frames writes a frame. The three poses are 3 + 4 * joints floats: the root's place, then for each joint its
 * rotation against its parent as a quaternion x y z w (joint 0: in the world). The rest pose is a T-pose (kt_joint). */
enum {
  KT_LAYOUT_GLTF = 0,    /* right-handed, Y up, facing +Z, metres */
  KT_LAYOUT_UNITY = 1,   /* left-handed, Y up, facing +Z, metres */
  KT_LAYOUT_UNREAL = 2,  /* left-handed, Z up, facing +X, centimetres */
  KT_LAYOUT_FEATURES = 3 /* the 272 numbers of the model */
};

typedef struct kt_joint_info {
  uint32_t size, abi;
  int32_t parent;    /* -1: the root */
  float offset[3];   /* from the parent, at rest, in the layout's axes and units */
  const char *name;  /* lives as long as the model */
} kt_joint_info;

KT_API uint32_t kt_version(void) KT_NOEXCEPT; /* major * 10000 + minor * 100 + patch */
KT_API const char *kt_status_name(kt_status status) KT_NOEXCEPT; /* lives for ever */
/* One line about this thread's last failed call: what was expected, what came, what to do. Until its next failed call. */
KT_API const char *kt_last_error(void) KT_NOEXCEPT;

/* options may be NULL. Takes all memory; reads and checks every file of the bundle that it needs. */
KT_API kt_status kt_model_open(const char *bundle, const kt_model_options *options, kt_model *model) KT_NOEXCEPT;
KT_API kt_status kt_model_close(kt_model model) KT_NOEXCEPT; /* its characters' handles end with it */
KT_API kt_status kt_model_adopt(kt_model model) KT_NOEXCEPT; /* from now on the calling thread's; not during another call */
KT_API kt_status kt_model_query(kt_model model, kt_model_info *info) KT_NOEXCEPT;
KT_API kt_status kt_joint(kt_model model, uint32_t joint, uint32_t layout, kt_joint_info *info) KT_NOEXCEPT;
KT_API kt_status kt_bank_find(kt_model model, const char *text, uint32_t *id) KT_NOEXCEPT;
KT_API kt_status kt_bank_text(kt_model model, uint32_t id, const char **text) KT_NOEXCEPT; /* lives as long as the model */

KT_API kt_status kt_character_defaults(kt_model model, kt_character_options *options) KT_NOEXCEPT; /* fills all of it */
/* options NULL: the defaults. It stands idle until its first kt_prompt. */
KT_API kt_status kt_character_create(kt_model model, const kt_character_options *options,
                                     kt_character *character) KT_NOEXCEPT;
KT_API kt_status kt_character_destroy(kt_character character) KT_NOEXCEPT;
KT_API kt_status kt_character_query(kt_character character, kt_character_info *info) KT_NOEXCEPT;

/* The first prompt starts a clip; a later one takes over from the next token, with the last 0.13 s of motion, also after the
 * clip has ended; its length counts anew. Frames that lie unread stay. Returns at once; a sentence is encoded by the worker. */
KT_API kt_status kt_prompt(kt_character character, const kt_prompt_source *prompt) KT_NOEXCEPT;
/* Takes what the worker has finished and hands out the next tokens, for everyone who has room for their frames; it computes
 * nothing itself and takes microseconds, whatever the budget. With KT_OPEN_INLINE it computes: the characters with the fewest
 * unread frames first, as long as a call is expected to end within budget_us; at least one where there is work.
 * 0: only takes. KT_UNLIMITED: until nobody can go on, the worker awaited.
 * report may be NULL. A character that fails says so in its state; the step is still KT_OK. */
KT_API kt_status kt_step(kt_model model, uint32_t budget_us, kt_step_report *report) KT_NOEXCEPT;
/* Up to `frames` unread frames into buffer, which holds `floats` numbers; *read is how many. KT_ERROR_STATE where the character
 * has failed and nothing is left to read. */
KT_API kt_status kt_read_frames(kt_character character, uint32_t layout, float *buffer, size_t floats, uint32_t frames,
                                uint32_t *read) KT_NOEXCEPT;
KT_API kt_status kt_frame_floats(kt_model model, uint32_t layout, uint32_t *floats) KT_NOEXCEPT;
/* The newest tokens, at most `capacity`, oldest first; *count is how many. The library keeps as many as the model's positions. */
KT_API kt_status kt_read_tokens(kt_character character, int32_t *tokens, uint32_t capacity, uint32_t *count) KT_NOEXCEPT;
/* A twin with the same past, which draws by seed and request of its own; its first frame is the one after the newest. */
KT_API kt_status kt_fork(kt_character character, uint64_t seed, uint32_t request, kt_character *twin) KT_NOEXCEPT;
/* Ends the clip and forgets it, unread frames too: idle, as after kt_character_create. */
KT_API kt_status kt_cancel(kt_character character) KT_NOEXCEPT;

#ifdef __cplusplus
}
#endif
#endif
