/* A crowd in a frame, in C: thirty-two villagers speak at once, for two milliseconds of each of
 * sixty frames per second, on one thread. Every second one of them decides what to do next.
 *
 *     python -c "import tinyllama; print(tinyllama.get_cmake_dir())"    # where CMake finds it
 *     cc -std=c11 game_loop.c -I"$(python -c 'import tinyllama; print(tinyllama.get_include())')" \
 *        -L... -ltinyllama -Wl,-rpath,... -o game_loop
 *     ./game_loop model.gguf [frames]
 */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "tinyllama.h"

enum { N_VILLAGERS = 32, MAX_TEXT = 160 };

typedef struct villager {
    tl_session* session;
    tl_request speaking; /* 0: nothing is under way */
    bool deciding;
    bool said_all;         /* the next words begin the bubble anew */
    char bubble[MAX_TEXT]; /* what stands above its head */
    size_t n_bubble;
} villager;

static const char* const names[] = {"Tom", "Lily", "Ben", "Mia", "Sam", "Anna", "Max", "Sue"};
static const char* const actions[] = {" run.", " hide.", " sing.", " wave."};

static void check(tl_status status) {
    if (status == TL_OK) return;
    fprintf(stderr, "game_loop: %s\n", tl_last_error());
    exit(1);
}

static double now_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return 1e3 * (double)t.tv_sec + 1e-6 * (double)t.tv_nsec;
}

static void say(tl_session* session, const char* text) {
    check(tl_session_append(session, text, strlen(text)));
}

static size_t length(tl_session* session) {
    size_t n = 0;
    check(tl_session_get_tokens(session, NULL, 0, &n));
    return n;
}

/* Lets a villager go on: with some words, or with one of the actions. */
static void ask(tl_scheduler* scheduler, villager* v, bool decide) {
    tl_request_def def = tl_default_request_def();
    def.session = v->session;
    def.user = v;
    def.temperature = 0.8f;
    if (decide) {
        def.choices = actions;
        def.n_choices = sizeof(actions) / sizeof(actions[0]);
    } else {
        def.max_new_tokens = 24;
    }
    check(tl_scheduler_submit(scheduler, &def, &v->speaking));
    v->deciding = decide;
}

static void show(villager* v, const tl_event* event) {
    if (v->said_all && event->n_text > 0) {
        v->n_bubble = 0;
        v->said_all = false;
    }
    size_t n = event->n_text;
    if (n > MAX_TEXT - 1 - v->n_bubble) n = MAX_TEXT - 1 - v->n_bubble;
    memcpy(v->bubble + v->n_bubble, event->text, n);
    v->n_bubble += n;
    v->bubble[v->n_bubble] = '\0';
    if (event->finish == TL_FAILED) fprintf(stderr, "game_loop: %s\n", event->error);
    if (event->finish != TL_GOES_ON) {
        v->speaking = 0;
        v->said_all = true;
    }
}

static int by_size(const void* a, const void* b) {
    const double x = *(const double*)a, y = *(const double*)b;
    return (x > y) - (x < y);
}

int main(int argc, char** argv) {
    if (argc < 2) {
        fprintf(stderr, "usage: game_loop model.gguf [frames]\n");
        return 2;
    }
    const int n_frames = argc > 2 ? atoi(argv[2]) : 600;
    const double budget_ms = 2.0;

    tl_model_def model_def = tl_default_model_def(); /* one thread: no other is ever started */
    model_def.path = argv[1];
    model_def.kv_dtype = "int8";
    tl_model* model = NULL;
    check(tl_model_open(&model_def, &model));
    tl_scheduler_def crowd = tl_default_scheduler_def();
    crowd.reserve_tokens = N_VILLAGERS * 512; /* all that they can remember */
    tl_scheduler* scheduler = NULL;
    check(tl_scheduler_create(model, &crowd, &scheduler));

    /* The scene is read once; every villager begins as a copy of it. */
    tl_session* scene = NULL;
    check(tl_session_create(model, 0, &scene));
    say(scene,
        "Once upon a time there was a little village by a river. One day there was a storm.");
    const size_t n_scene = length(scene);
    tl_model_info info;
    check(tl_model_get_info(model, &info));
    villager* villagers = calloc(N_VILLAGERS, sizeof(villager));
    double* times = calloc((size_t)n_frames + 1, sizeof(double));
    if (villagers == NULL || times == NULL || n_frames < 1) return 1;
    for (int i = 0; i < N_VILLAGERS; ++i) {
        villager* v = &villagers[i];
        check(tl_session_fork(scene, (uint64_t)i + 1, &v->session));
        char line[64];
        snprintf(line, sizeof(line), " %s looked up and said, \"", names[i % 8]);
        say(v->session, line);
        ask(scheduler, v, false);
    }

    for (int frame = 0; frame < n_frames; ++frame) {
        const double start = now_ms();
        check(tl_scheduler_step(scheduler, budget_ms));
        tl_event event;
        while (tl_scheduler_next_event(scheduler, &event))
            show(event.user, &event);
        for (int i = 0; i < N_VILLAGERS; ++i) {
            villager* v = &villagers[i];
            if (v->speaking != 0) continue;
            if (length(v->session) + 100 > (size_t)info.max_seq_len) /* forgets all but the scene */
                check(tl_session_rewind(v->session, n_scene));
            if (v->deciding) {
                say(v->session, " Then somebody said, \"");
            } else {
                char line[96];
                snprintf(line, sizeof(line), "\" %s wanted to", names[i % 8]);
                say(v->session, line);
            }
            ask(scheduler, v, !v->deciding);
        }
        times[frame] = now_ms() - start;
        /* Here the game would draw, and wait for the next frame. */
    }

    tl_stats stats;
    check(tl_scheduler_get_stats(scheduler, &stats));
    for (int i = 0; i < 4; ++i)
        printf("%-5s %s\n", names[i % 8], villagers[i].bubble);
    qsort(times, (size_t)n_frames, sizeof(double), by_size);
    printf(
        "%d frames of %.1f ms: p50 %.2f ms, p99 %.2f ms; %lld tokens, %.1f per frame; keys and "
        "values %.1f MB\n",
        n_frames, budget_ms, times[n_frames / 2], times[n_frames * 99 / 100],
        (long long)stats.tokens_drawn, (double)stats.tokens_drawn / n_frames,
        (double)stats.kv_bytes / 1e6);

    for (int i = 0; i < N_VILLAGERS; ++i)
        tl_session_close(villagers[i].session);
    free(villagers);
    free(times);
    tl_session_close(scene);
    tl_scheduler_close(scheduler);
    tl_model_close(model);
    return 0;
}
