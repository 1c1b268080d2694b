/* tinyllama: tiny Llama models inside games and other programs. Plain C11, also C++.
 *
 *     tl_model_def def = tl_default_model_def();
 *     def.path = "stories.gguf";
 *     tl_model* model;
 *     if (tl_model_open(&def, &model) != TL_OK) puts(tl_last_error());
 *
 * Three nouns. A tl_model: weights and tokenizer; it never changes, and any number of threads may
 * use it. A tl_session: one timeline of tokens, a character's memory. A tl_scheduler: continues
 * many sessions at once, for as many milliseconds per frame as it is given.
 *
 * - A function that can fail returns a tl_status; tl_last_error() then tells what was wrong. What
 *   fails changes nothing, and what is returned through pointers is written on success only.
 * - No function exits, aborts, prints, throws, installs a signal handler or reads the locale.
 * - A session or a scheduler is used by one thread at a time; a second one gets TL_BUSY. While its
 *   request goes on, a session is for the thread that steps, between its steps.
 * - Text is UTF-8 of a given length, and need not end in 0. Arrays are copied: what is passed in
 *   need not outlive the call.
 * - Begin with the default of a definition and change what you want: a later library takes the
 *   shorter definitions of an earlier header, by struct_size. Structs that are filled for you
 * change with the library's SOVERSION only.
 * - What you hand over (allocator, log, task system) must not throw, nor call back into tl_*.
 * - Where a buffer is filled: *n is what there is, and TL_BUFFER_TOO_SMALL, with nothing written,
 *   where capacity is less. Null with a capacity of 0 only asks for n.
 *
 * What a session says depends on its own tokens and seed alone, bit for bit: not on threads, on
 * budgets, nor on who speaks beside it. Between instruction sets (TINYLLAMA_ISA names one) and
 * formats of weights it may differ.
 */
#ifndef TINYLLAMA_H
#define TINYLLAMA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(_WIN32) && defined(TINYLLAMA_SHARED)
#ifdef TINYLLAMA_BUILD
#define TL_API __declspec(dllexport)
#else
#define TL_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define TL_API __attribute__((visibility("default")))
#else
#define TL_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

typedef struct tl_model tl_model;
typedef struct tl_session tl_session;
typedef struct tl_scheduler tl_scheduler;
typedef uint64_t tl_request; /* one text on its way in a scheduler; never 0 */

typedef enum tl_status {
    TL_OK = 0,
    TL_FORMAT_ERROR = 1,     /* a file or saved state is not what it claims to be */
    TL_CONFIG_ERROR = 2,     /* a model's hyperparameter is out of range */
    TL_INVALID_ARGUMENT = 3, /* an argument is null, out of range or contradicts another */
    TL_CONTEXT_FULL = 4,     /* the tokens do not fit into what is left of the context */
    TL_NONFINITE = 5,        /* NaN or infinity in weights or logits */
    TL_BUSY = 6,             /* in use by another thread */
    TL_IO_ERROR = 7,         /* the operating system refused */
    TL_NO_MEMORY = 8,
    TL_BUFFER_TOO_SMALL = 9
} tl_status;

/* --- the library --------------------------------------------------------------------------- */

/* "0.1.0" */
TL_API const char* tl_version(void);

/* What went wrong in this thread's latest call that failed: file, field and value. Valid until its
 * next call that fails; "" before the first. */
TL_API const char* tl_last_error(void);

/* Where memory comes from. `allocate` returns null when there is none; both are called by any
 * thread. The shared library takes all its memory there; the static one that of weights, keys and
 * values, and the rest from operator new, which is yours to replace (as does a shared library built
 * where there is no static libstdc++). To be called before anything else: TL_BUSY once memory is in
 * use. Threads that drew tokens keep some buffers until they end, so it has to outlive them. Null
 * functions: the system's. */
TL_API tl_status tl_set_allocator(void* (*allocate)(size_t size, size_t alignment, void* user),
                                  void (*release)(void* memory, size_t size, size_t alignment,
                                                  void* user),
                                  void* user);

/* Told what is opened, and the message of every call that fails. Called by the thread that calls.
 * To be set while no other thread is in the library. Null for none, as in the beginning. */
TL_API void tl_set_log(void (*log)(tl_status status, const char* message, void* user), void* user);

/* --- models -------------------------------------------------------------------------------- */

/* Your task system, in place of threads of the library's own: has task(context) called soon, once,
 * on any thread but the calling one, with n_threads above 1. Nothing is waited for: what no task
 * picks up in time, the calling thread does. A task may be late, even after tl_model_close(), when
 * it only frees memory; at most n_threads - 1 are on their way at once. */
typedef void tl_enqueue(void (*task)(void* context), void* context, void* user);

typedef struct tl_model_def {
    size_t struct_size;
    const char* path; /* of a GGUF file, ends in 0; or null, and */
    const void* data; /* such a file's bytes, needed during tl_model_open() only */
    size_t n_data;
    int32_t n_threads;   /* that compute a step, the caller's included. 1 (default): no other thread
                            is ever started. 0: one per physical core */
    int32_t max_seq_len; /* context in tokens, for less than the file's; 0: the file's */
    const char* kv_dtype; /* of cached keys and values: "f32" (default), "bf16" or "int8" */
    const char* isa;      /* kernel set by name; null: the best this CPU can run */
    tl_enqueue* enqueue;  /* null: threads of our own, asleep between steps */
    void* enqueue_user;
} tl_model_def;

typedef struct tl_model_info {
    int32_t vocab_size, max_seq_len;
    int32_t bos_id, eos_id; /* -1: none */
    int32_t n_threads;
    int64_t n_parameters;
    int64_t weight_bytes;
    int64_t kv_bytes_per_token; /* memory that a token of a session takes, in blocks of 32 */
    const char* isa;            /* kernel set in use; valid as long as the model */
} tl_model_info;

static inline tl_model_def tl_default_model_def(void) {
    tl_model_def def;
    memset(&def, 0, sizeof(def));
    def.struct_size = sizeof(def);
    def.n_threads = 1;
    return def;
}
TL_API tl_status tl_model_open(const tl_model_def* def, tl_model** model);
/* Sessions and schedulers made from it may outlive it. Null is fine, here and in all that close. */
TL_API void tl_model_close(tl_model* model);
TL_API tl_status tl_model_get_info(const tl_model* model, tl_model_info* info);

/* Text to tokens, with the begin token before it where asked for, and back to text. */
TL_API tl_status tl_model_encode(const tl_model* model, const char* text, size_t n_text, bool bos,
                                 int32_t* tokens, size_t capacity, size_t* n);
TL_API tl_status tl_model_decode(const tl_model* model, const int32_t* tokens, size_t n_tokens,
                                 char* text, size_t capacity, size_t* n);

/* --- sessions ------------------------------------------------------------------------------ */

/* An empty timeline, which draws from `seed`. */
TL_API tl_status tl_session_create(tl_model* model, uint64_t seed, tl_session** session);
/* A request on it goes on to its end. */
TL_API void tl_session_close(tl_session* session);

/* Adds text; the model reads it when it is next asked what follows: in a scheduler, within its
 * budgets. Text that comes first is put after the begin token; later text continues what is there
 * without a space. */
TL_API tl_status tl_session_append(tl_session* session, const char* text, size_t n_text);
TL_API tl_status tl_session_append_tokens(tl_session* session, const int32_t* tokens, size_t n);
TL_API tl_status tl_session_get_tokens(tl_session* session, int32_t* tokens, size_t capacity,
                                       size_t* n);

/* Keeps the first n tokens. */
TL_API tl_status tl_session_rewind(tl_session* session, size_t n_tokens);
/* A second timeline with the same past, which draws from its own seed. The past's memory is
 * shared: give a scene or persona to one session, and fork it for every character. */
TL_API tl_status tl_session_fork(tl_session* session, uint64_t seed, tl_session** fork);
/* Gives back the memory of one that rests; it is read again when it goes on. */
TL_API tl_status tl_session_drop_cache(tl_session* session);

/* Tokens and random state: two bytes per token and about sixty. With the cache of whole blocks of
 * 32 tokens only the rest is read again. Restoring refuses, with the reason, what is damaged or of
 * another model or version. */
TL_API tl_status tl_session_save(tl_session* session, bool with_cache, void* blob, size_t capacity,
                                 size_t* n);
TL_API tl_status tl_session_restore(tl_model* model, const void* blob, size_t n,
                                    tl_session** session);

/* The natural logarithm of the probability of each of n texts to come next, found in one batch; the
 * session stays as it is. Reads first what was not read yet: not bound by any budget. */
TL_API tl_status tl_session_score(tl_session* session, const char* const* texts, size_t n,
                                  double* logprobs);

/* --- the scheduler ------------------------------------------------------------------------- */

typedef struct tl_scheduler_def {
    size_t struct_size;
    int32_t max_sessions; /* that speak at once; more wait. 64 */
    int32_t
        max_requests; /* that there are at once, waiting ones too: beyond it TL_NO_MEMORY. 256 */
    int64_t reserve_tokens; /* memory for so many, all sessions together, is taken now. 0 */
} tl_scheduler_def;

typedef enum tl_overflow {               /* when the context is full: */
                           TL_STOP = 0,  /* the text ends */
                           TL_SHIFT = 1, /* half of it is dropped, the oldest but for the first
                                            n_keep tokens */
                           TL_TRUNCATE =
                               2, /* of what is there before, as much as makes room; then it ends */
                           TL_ERROR = 3 /* the text ends with TL_CONTEXT_FULL */
} tl_overflow;

typedef struct tl_request_def {
    size_t struct_size;
    tl_session* session;    /* to be continued */
    int32_t max_new_tokens; /* 0 (default): until the model ends it or the context is full */
    int32_t min_new_tokens;
    float temperature; /* 1; 0: always the likeliest token */
    int32_t top_k;     /* 0: all */
    float top_p;       /* 0.9 */
    float min_p;
    float repetition_penalty; /* 1 */
    float presence_penalty, frequency_penalty;
    const int32_t* bias_tokens; /* bias_values are added to the logits of these n_bias tokens */
    const float* bias_values;
    size_t n_bias;
    const char* const* stops; /* the text ends before the first of these strings, each ending in 0;
                                 the session keeps it */
    size_t n_stops;
    const char* const* choices; /* the text is one of these, each ending in 0, and drawn as a whole
                                   where there are 64 at most; none: anything */
    size_t n_choices;
    int32_t on_overflow; /* a tl_overflow */
    int32_t n_keep;      /* 1 */
    int32_t priority;    /* higher comes first where not all fit */
    double deadline_ms;  /* from now, when it ends in any case; 0: none */
    void* user;          /* comes with its events */
} tl_request_def;

typedef enum tl_finish {
    TL_GOES_ON = 0,
    TL_FINISHED = 1, /* by the model, a stop string, or a choice that is complete */
    TL_LENGTH = 2,   /* max_new_tokens, or the context is full */
    TL_CANCELLED = 3,
    TL_DEADLINE = 4,
    TL_FAILED = 5
} tl_finish;

/* What a step did for one request. Pointers are valid until the scheduler's next step. */
typedef struct tl_event {
    tl_request request;
    void* user;
    const char* text; /* new whole characters, n_text bytes */
    size_t n_text;
    const int32_t* tokens; /* new ones */
    size_t n_tokens;
    tl_finish finish; /* but for TL_GOES_ON this is its last event, and its handle is void */
    tl_status status; /* with TL_FAILED: why */
    const char* error;
} tl_event;

typedef struct tl_stats {
    int64_t n_live, n_waiting;          /* requests; of them those without a token yet */
    int64_t tokens_read, tokens_shared; /* since the beginning; shared: not read, as another
                                           request with the same beginning had */
    int64_t tokens_drawn;
    int64_t kv_bytes;     /* keys and values in use by the model's sessions; what is shared, once */
    double spent_ms;      /* in pieces of work */
    double next_piece_ms; /* what the next is thought to take: a smaller budget does nothing */
} tl_stats;

static inline tl_scheduler_def tl_default_scheduler_def(void) {
    tl_scheduler_def def;
    memset(&def, 0, sizeof(def));
    def.struct_size = sizeof(def);
    def.max_sessions = 64;
    def.max_requests = 256;
    return def;
}
/* Computes for some milliseconds, to learn what its pieces of work cost. */
TL_API tl_status tl_scheduler_create(tl_model* model, const tl_scheduler_def* def,
                                     tl_scheduler** scheduler);
TL_API void tl_scheduler_close(tl_scheduler* scheduler);

static inline tl_request_def tl_default_request_def(void) {
    tl_request_def def;
    memset(&def, 0, sizeof(def));
    def.struct_size = sizeof(def);
    def.temperature = 1.0f;
    def.top_p = 0.9f;
    def.repetition_penalty = 1.0f;
    def.n_keep = 1;
    return def;
}
/* Queues a text to be continued from the next step on. The session may be used between steps, and
 * has one request at a time. */
TL_API tl_status tl_scheduler_submit(tl_scheduler* scheduler, const tl_request_def* def,
                                     tl_request* request);

/* Works for at most that long; a pass through the model that does not fit goes on in the next step.
 * 0 only ends what was cancelled or is too late. Once a frame. */
TL_API tl_status tl_scheduler_step(tl_scheduler* scheduler, double budget_ms);
/* The next of what the latest step did; false when there is no more. */
TL_API bool tl_scheduler_next_event(tl_scheduler* scheduler, tl_event* event);

/* Takes effect before the next piece of work, also while the session's text is read. */
TL_API tl_status tl_request_cancel(tl_scheduler* scheduler, tl_request request);
/* Lets it rest, or go on. */
TL_API tl_status tl_request_pause(tl_scheduler* scheduler, tl_request request, bool paused);
/* The session with all that the request still has to do; restoring queues it again. The session
 * comes back as well: close it as any other. */
TL_API tl_status tl_request_save(tl_scheduler* scheduler, tl_request request, bool with_cache,
                                 void* blob, size_t capacity, size_t* n);
TL_API tl_status tl_request_restore(tl_scheduler* scheduler, const void* blob, size_t n, void* user,
                                    tl_session** session, tl_request* request);

TL_API tl_status tl_scheduler_get_stats(tl_scheduler* scheduler, tl_stats* stats);

#ifdef __cplusplus
}
#endif

#endif
