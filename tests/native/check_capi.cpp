// The C interface: what it says is the same however it is cut, every allocation failed in turn,
// every function given nonsense, eight threads at once, other people's threads, and a steady state
// that takes no memory. Meant for -fsanitize=address,undefined and -fsanitize=thread as well.
#include <dirent.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <condition_variable>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <limits>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../fuzz/mutant.h"
#include "include/tinyllama.h"

// --- memory: counted, and failed where asked ----------------------------------------------------

namespace {

std::atomic<long> n_allocations{0}, n_in_use{0};
std::atomic<long> fail_at{-1};  // counts down; at 0 there is no memory

void* take(std::size_t size, std::size_t alignment) {
    n_allocations.fetch_add(1);
    if (fail_at.load() >= 0 && fail_at.fetch_sub(1) == 0) return nullptr;
    void* memory = nullptr;
    if (posix_memalign(&memory, std::max(alignment, sizeof(void*)), std::max<std::size_t>(size, 1)))
        return nullptr;
    n_in_use.fetch_add(1);
    return memory;
}

void give_back(void* memory) {
    if (memory == nullptr) return;
    n_in_use.fetch_sub(1);
    std::free(memory);
}

void* take_or_throw(std::size_t size, std::size_t alignment) {
    void* const memory = take(size, alignment);
    if (memory == nullptr) throw std::bad_alloc();
    return memory;
}

constexpr std::size_t usual = alignof(std::max_align_t);

}  // namespace

void* operator new(std::size_t n) { return take_or_throw(n, usual); }
void* operator new[](std::size_t n) { return take_or_throw(n, usual); }
void* operator new(std::size_t n, std::align_val_t a) {
    return take_or_throw(n, static_cast<std::size_t>(a));
}
void* operator new(std::size_t n, const std::nothrow_t&) noexcept { return take(n, usual); }
void* operator new(std::size_t n, std::align_val_t a, const std::nothrow_t&) noexcept {
    return take(n, static_cast<std::size_t>(a));
}
void operator delete(void* p) noexcept { give_back(p); }
void operator delete[](void* p) noexcept { give_back(p); }
void operator delete(void* p, std::size_t) noexcept { give_back(p); }
void operator delete[](void* p, std::size_t) noexcept { give_back(p); }
void operator delete(void* p, std::align_val_t) noexcept { give_back(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { give_back(p); }

namespace {

#define EXPECT(condition) expect((condition), #condition, __LINE__)
#define OK(call) expect((call) == TL_OK, #call, __LINE__)

void expect(bool holds, const char* what, int line) {
    if (holds) return;
    std::fprintf(stderr, "check_capi:%d: %s: %s\n", line, what, tl_last_error());
    std::exit(1);
}

// --- a model, and texts made with it ------------------------------------------------------------

// Its texts are long enough to say something, and it has tokens for every byte.
std::string model_bytes() {
    std::vector<fuzz::Tree> trees = fuzz::seed_models();
    std::string best;
    std::int32_t longest = 0;
    for (const fuzz::Tree& tree : trees) {
        const std::string bytes = fuzz::write(tree);
        tl_model_def def = tl_default_model_def();
        def.data = bytes.data();
        def.n_data = bytes.size();
        tl_model* model = nullptr;
        OK(tl_model_open(&def, &model));
        tl_model_info info;
        OK(tl_model_get_info(model, &info));
        if (info.max_seq_len > longest && info.vocab_size > 256) {
            longest = info.max_seq_len;
            best = bytes;
        }
        tl_model_close(model);
    }
    EXPECT(longest >= 16);
    return best;
}

tl_model_def definition(const std::string& bytes) {
    tl_model_def def = tl_default_model_def();
    def.data = bytes.data();
    def.n_data = bytes.size();
    return def;
}

tl_model* open(const std::string& bytes) {
    const tl_model_def def = definition(bytes);
    tl_model* model = nullptr;
    OK(tl_model_open(&def, &model));
    return model;
}

using Texts = std::vector<std::string>;
using Timeline = std::vector<std::int32_t>;

Timeline tokens_of(tl_session* session) {
    std::size_t n = 0;
    OK(tl_session_get_tokens(session, nullptr, 0, &n));
    Timeline tokens(n);
    OK(tl_session_get_tokens(session, tokens.data(), n, &n));
    return tokens;
}

std::string saved(tl_session* session) {
    std::size_t n = 0;
    tl_session_save(session, true, nullptr, 0, &n);
    std::string blob(n, '\0');
    OK(tl_session_save(session, true, blob.data(), n, &n));
    return blob;
}

// Steps until nothing is left, and returns what each said, in the order of `user`.
Texts step_all(tl_scheduler* scheduler, std::size_t n, double budget_ms) {
    Texts texts(n);
    for (;;) {
        tl_stats stats;
        OK(tl_scheduler_get_stats(scheduler, &stats));
        if (stats.n_live == 0) return texts;
        OK(tl_scheduler_step(scheduler, budget_ms));
        tl_event event;
        while (tl_scheduler_next_event(scheduler, &event))
            texts[reinterpret_cast<std::size_t>(event.user)].append(event.text, event.n_text);
    }
}

struct Character {
    tl_session* session = nullptr;
    tl_request request = 0;
};

Character join(tl_model* model, tl_scheduler* scheduler, std::size_t i) {
    Character character;
    OK(tl_session_create(model, 7 + i, &character.session));
    const std::string prompt = "ab" + std::string(i % 3, 'c');
    OK(tl_session_append(character.session, prompt.data(), prompt.size()));
    tl_request_def def = tl_default_request_def();
    def.session = character.session;
    def.temperature = 1.5f;
    def.max_new_tokens = 6 + static_cast<std::int32_t>(i % 3);
    def.user = reinterpret_cast<void*>(i);
    const char* const choices[] = {"ab", "abc", "ba"};
    if (i % 4 == 3) {
        def.choices = choices;
        def.n_choices = 3;
    }
    OK(tl_scheduler_submit(scheduler, &def, &character.request));
    return character;
}

Texts tell(tl_model* model, std::size_t n, double budget_ms) {
    const tl_scheduler_def def = tl_default_scheduler_def();
    tl_scheduler* scheduler = nullptr;
    OK(tl_scheduler_create(model, &def, &scheduler));
    std::vector<Character> characters;
    for (std::size_t i = 0; i < n; ++i)
        characters.push_back(join(model, scheduler, i));
    Texts texts = step_all(scheduler, n, budget_ms);
    tl_scheduler_close(scheduler);
    for (const Character& character : characters)
        tl_session_close(character.session);
    return texts;
}

void however_it_is_cut(const std::string& bytes) {
    tl_model* const model = open(bytes);
    const Texts all = tell(model, 12, 1e9);
    EXPECT(all == tell(model, 12, 0.01));
    for (std::size_t i = 0; i < 12; ++i)
        EXPECT(!all[i].empty());
    for (std::size_t i = 3; i < 12; i += 4)
        EXPECT(all[i] == "ab" || all[i] == "abc" || all[i] == "ba");
    tl_model_close(model);
    // Other threads say the same.
    tl_model_def def = definition(bytes);
    def.n_threads = 3;
    tl_model* many = nullptr;
    OK(tl_model_open(&def, &many));
    EXPECT(all == tell(many, 12, 0.05));
    tl_model_close(many);
}

void sessions(const std::string& bytes) {
    tl_model* const model = open(bytes);
    tl_session *session = nullptr, *fork = nullptr, *again = nullptr;
    OK(tl_session_create(model, 3, &session));
    OK(tl_session_append(session, "abc", 3));
    OK(tl_session_append(session, "de", 2));
    const char* const ways[] = {"a", "bc", "hello"};
    double before[3], after[3];
    OK(tl_session_score(session, ways, 3, before));
    OK(tl_session_fork(session, 4, &fork));
    const std::string blob = saved(session);
    OK(tl_session_restore(model, blob.data(), blob.size(), &again));
    OK(tl_session_append(session, "xy", 2));
    const Timeline timeline = tokens_of(session);
    OK(tl_session_rewind(session, tokens_of(fork).size()));
    EXPECT(tokens_of(session) == tokens_of(fork));
    EXPECT(tokens_of(again) == tokens_of(fork));
    for (tl_session* one : {session, fork, again}) {
        OK(tl_session_score(one, ways, 3, after));
        EXPECT(std::memcmp(before, after, sizeof(before)) == 0);
        OK(tl_session_drop_cache(one));
        OK(tl_session_score(one, ways, 3, after));
        EXPECT(std::memcmp(before, after, sizeof(before)) == 0);
    }
    // Whatever the host has done to the float mode, and it finds it as it left it.
    std::fesetround(FE_UPWARD);
    OK(tl_session_drop_cache(fork));
    OK(tl_session_score(fork, ways, 3, after));
    EXPECT(std::fegetround() == FE_UPWARD);
    std::fesetround(FE_TONEAREST);
    EXPECT(std::memcmp(before, after, sizeof(before)) == 0);
    std::int32_t few[2];
    std::size_t n = 0;
    EXPECT(tl_session_get_tokens(session, few, 2, &n) == TL_BUFFER_TOO_SMALL);
    EXPECT(n == tokens_of(session).size());
    char text[64];
    OK(tl_model_decode(model, timeline.data(), timeline.size(), text, sizeof(text), &n));
    EXPECT(std::string(text, n) == "abcdexy");
    for (std::size_t i = 0; i < blob.size(); ++i) {
        std::string damaged = blob;
        damaged[i] = static_cast<char>(damaged[i] ^ 1);
        tl_session* none = nullptr;
        EXPECT(tl_session_restore(model, damaged.data(), damaged.size(), &none) == TL_FORMAT_ERROR);
        EXPECT(none == nullptr);
    }
    for (tl_session* one : {session, fork, again})
        tl_session_close(one);
    tl_model_close(model);
}

void requests(const std::string& bytes) {
    tl_model* const model = open(bytes);
    tl_scheduler_def def = tl_default_scheduler_def();
    def.max_requests = 4;
    tl_scheduler *scheduler = nullptr, *other = nullptr;
    OK(tl_scheduler_create(model, &def, &scheduler));
    OK(tl_scheduler_create(model, &def, &other));
    const Texts alone = tell(model, 2, 1e9);
    // Saved in the middle, and restored elsewhere.
    const Character character = join(model, scheduler, 1);
    std::string text;
    tl_event event;
    while (text.empty()) {
        OK(tl_scheduler_step(scheduler, 0.01));
        while (tl_scheduler_next_event(scheduler, &event))
            text.append(event.text, event.n_text);
    }
    std::size_t n = 0;
    tl_request_save(scheduler, character.request, false, nullptr, 0, &n);
    std::string blob(n, '\0');
    OK(tl_request_save(scheduler, character.request, false, blob.data(), n, &n));
    OK(tl_request_cancel(scheduler, character.request));
    OK(tl_scheduler_step(scheduler, 0));
    EXPECT(tl_scheduler_next_event(scheduler, &event) && event.finish == TL_CANCELLED);
    EXPECT(!tl_scheduler_next_event(scheduler, &event));
    EXPECT(tl_request_cancel(scheduler, character.request) == TL_INVALID_ARGUMENT);
    Character restored;
    OK(tl_request_restore(other, blob.data(), blob.size(), nullptr, &restored.session,
                          &restored.request));
    OK(tl_request_pause(other, restored.request, true));
    OK(tl_scheduler_step(other, 5));
    EXPECT(!tl_scheduler_next_event(other, &event));
    OK(tl_request_pause(other, restored.request, false));
    EXPECT(text + step_all(other, 1, 0.01)[0] == alone[1]);
    // As many as there may be.
    std::vector<Character> crowd;
    for (std::size_t i = 0; i < 4; ++i)
        crowd.push_back(join(model, scheduler, i));
    tl_request_def one_more = tl_default_request_def();
    one_more.session = restored.session;
    EXPECT(tl_scheduler_submit(scheduler, &one_more, nullptr) == TL_NO_MEMORY);
    step_all(scheduler, 4, 1e9);
    OK(tl_scheduler_submit(scheduler, &one_more, nullptr));
    // Everything may be closed in any order.
    tl_model_close(model);
    for (const Character& one : crowd)
        tl_session_close(one.session);
    tl_session_close(restored.session);
    tl_session_close(character.session);
    OK(tl_scheduler_step(scheduler, 1));
    tl_scheduler_close(other);
    tl_scheduler_close(scheduler);
}

// --- what is wrong ------------------------------------------------------------------------------

void nonsense(const std::string& bytes) {
    constexpr std::size_t huge = std::numeric_limits<std::size_t>::max();
    const double nan = std::nan("");
    tl_model* const model = open(bytes);
    tl_session* session = nullptr;
    OK(tl_session_create(model, 1, &session));
    OK(tl_session_append(session, "ab", 2));
    const tl_scheduler_def crowd = tl_default_scheduler_def();
    tl_scheduler* scheduler = nullptr;
    OK(tl_scheduler_create(model, &crowd, &scheduler));
    const Timeline timeline = tokens_of(session);
    const std::string blob = saved(session);
    std::size_t n = 77;
    char text[4];
    std::int32_t tokens[4];
    double score;
    tl_session* made = nullptr;
    tl_event event;
    tl_request request;
    const auto refused = [](tl_status status) {
        return status == TL_INVALID_ARGUMENT && tl_last_error()[0] != '\0';
    };
    EXPECT(refused(tl_set_allocator([](size_t, size_t, void*) -> void* { return nullptr; }, nullptr,
                                    nullptr)));
    EXPECT(tl_set_allocator(nullptr, nullptr, nullptr) == TL_BUSY);
    EXPECT(refused(tl_model_open(nullptr, nullptr)));
    {
        tl_model* none = nullptr;
        tl_model_def def = tl_default_model_def();
        EXPECT(refused(tl_model_open(&def, &none)));
        def.path = "there is no such file";
        EXPECT(tl_model_open(&def, &none) == TL_IO_ERROR);
        EXPECT(refused(tl_model_open(&def, nullptr)));
        def = definition(bytes);
        for (const std::size_t size : {std::size_t{0}, std::size_t{4}, sizeof(def) + 8, huge}) {
            def.struct_size = size;
            EXPECT(refused(tl_model_open(&def, &none)));
        }
        def = definition(bytes);
        def.n_threads = -1;
        EXPECT(refused(tl_model_open(&def, &none)));
        def.n_threads = 1 << 30;
        EXPECT(refused(tl_model_open(&def, &none)));
        def = definition(bytes);
        def.max_seq_len = 1 << 30;
        EXPECT(refused(tl_model_open(&def, &none)));
        def.max_seq_len = 0;
        def.kv_dtype = "f64";
        EXPECT(refused(tl_model_open(&def, &none)));
        def.kv_dtype = nullptr;
        def.isa = "no such set";
        EXPECT(refused(tl_model_open(&def, &none)));
        def = definition(bytes);
        def.n_data = 0;
        EXPECT(tl_model_open(&def, &none) == TL_FORMAT_ERROR);
        EXPECT(none == nullptr);
    }
    tl_model_info info;
    EXPECT(refused(tl_model_get_info(nullptr, &info)));
    EXPECT(refused(tl_model_get_info(model, nullptr)));
    EXPECT(refused(tl_model_encode(nullptr, "a", 1, true, tokens, 4, &n)));
    EXPECT(refused(tl_model_encode(model, nullptr, 1, true, tokens, 4, &n)));
    EXPECT(refused(tl_model_encode(model, "a", 1, true, nullptr, 4, &n)));
    EXPECT(refused(tl_model_encode(model, "a", 1, true, tokens, 4, nullptr)));
    EXPECT(refused(tl_model_encode(model, nullptr, huge, true, tokens, 4, &n)));
    OK(tl_model_encode(model, nullptr, 0, true, tokens, 4, &n));
    EXPECT(refused(tl_model_decode(nullptr, tokens, 1, text, 4, &n)));
    EXPECT(refused(tl_model_decode(model, nullptr, 1, text, 4, &n)));
    EXPECT(refused(tl_model_decode(model, tokens, 1, nullptr, 4, &n)));
    EXPECT(refused(tl_model_decode(model, tokens, 1, text, 4, nullptr)));
    const std::int32_t outside[] = {-1, std::numeric_limits<std::int32_t>::max()};
    EXPECT(refused(tl_model_decode(model, outside, 1, text, 4, &n)));
    EXPECT(refused(tl_model_decode(model, outside + 1, 1, text, 4, &n)));

    EXPECT(refused(tl_session_create(nullptr, 1, &made)));
    EXPECT(refused(tl_session_create(model, 1, nullptr)));
    EXPECT(refused(tl_session_append(nullptr, "a", 1)));
    EXPECT(refused(tl_session_append(session, nullptr, 1)));
    EXPECT(refused(tl_session_append_tokens(nullptr, tokens, 1)));
    EXPECT(refused(tl_session_append_tokens(session, nullptr, 1)));
    EXPECT(refused(tl_session_append_tokens(session, outside, 2)));
    const std::string too_long(100'000, 'a');
    EXPECT(tl_session_append(session, too_long.data(), too_long.size()) == TL_CONTEXT_FULL);
    EXPECT(refused(tl_session_get_tokens(nullptr, tokens, 4, &n)));
    EXPECT(refused(tl_session_get_tokens(session, nullptr, 4, &n)));
    EXPECT(refused(tl_session_get_tokens(session, tokens, 4, nullptr)));
    EXPECT(refused(tl_session_rewind(nullptr, 0)));
    EXPECT(refused(tl_session_rewind(session, huge)));
    EXPECT(refused(tl_session_rewind(session, timeline.size() + 1)));
    EXPECT(refused(tl_session_fork(nullptr, 1, &made)));
    EXPECT(refused(tl_session_fork(session, 1, nullptr)));
    EXPECT(refused(tl_session_drop_cache(nullptr)));
    EXPECT(refused(tl_session_save(nullptr, false, text, 4, &n)));
    EXPECT(refused(tl_session_save(session, false, nullptr, 4, &n)));
    EXPECT(refused(tl_session_save(session, false, text, 4, nullptr)));
    EXPECT(tl_session_save(session, false, text, 4, &n) == TL_BUFFER_TOO_SMALL && n > 4);
    EXPECT(refused(tl_session_restore(nullptr, text, 4, &made)));
    EXPECT(refused(tl_session_restore(model, nullptr, 4, &made)));
    EXPECT(refused(tl_session_restore(model, nullptr, huge, &made)));
    EXPECT(refused(tl_session_restore(model, text, 4, nullptr)));
    EXPECT(tl_session_restore(model, nullptr, 0, &made) == TL_FORMAT_ERROR);
    const char* const ways[] = {"a", nullptr};
    const char* const empty[] = {""};
    EXPECT(refused(tl_session_score(nullptr, ways, 1, &score)));
    EXPECT(refused(tl_session_score(session, nullptr, 1, &score)));
    EXPECT(refused(tl_session_score(session, ways, 2, &score)));
    EXPECT(refused(tl_session_score(session, empty, 1, &score)));
    EXPECT(refused(tl_session_score(session, ways, 1, nullptr)));
    EXPECT(refused(tl_session_score(session, ways, huge, &score)));
    OK(tl_session_score(session, nullptr, 0, nullptr));

    {
        tl_scheduler* none = nullptr;
        tl_scheduler_def def = crowd;
        EXPECT(refused(tl_scheduler_create(nullptr, &def, &none)));
        EXPECT(refused(tl_scheduler_create(model, nullptr, &none)));
        EXPECT(refused(tl_scheduler_create(model, &def, nullptr)));
        for (const std::int32_t wrong : {0, -1, std::numeric_limits<std::int32_t>::max()}) {
            def = crowd;
            def.max_sessions = wrong;
            EXPECT(refused(tl_scheduler_create(model, &def, &none)));
            def = crowd;
            def.max_requests = wrong;
            EXPECT(refused(tl_scheduler_create(model, &def, &none)));
        }
        def = crowd;
        def.reserve_tokens = -1;
        EXPECT(refused(tl_scheduler_create(model, &def, &none)));
        def.reserve_tokens = std::numeric_limits<std::int64_t>::max();
        EXPECT(tl_scheduler_create(model, &def, &none) == TL_NO_MEMORY);
        EXPECT(none == nullptr);
    }
    tl_request_def good = tl_default_request_def();
    good.session = session;
    const auto refuses = [&](void (*change)(tl_request_def*)) {
        tl_request_def def = good;
        change(&def);
        return refused(tl_scheduler_submit(scheduler, &def, &request)) &&
               tokens_of(session) == timeline;
    };
    EXPECT(refused(tl_scheduler_submit(nullptr, &good, &request)));
    EXPECT(refused(tl_scheduler_submit(scheduler, nullptr, &request)));
    EXPECT(refuses([](tl_request_def* d) { d->struct_size = 0; }));
    EXPECT(refuses([](tl_request_def* d) { d->session = nullptr; }));
    EXPECT(refuses([](tl_request_def* d) { d->max_new_tokens = -1; }));
    EXPECT(refuses([](tl_request_def* d) { d->min_new_tokens = -1; }));
    EXPECT(refuses([](tl_request_def* d) { d->temperature = -1; }));
    EXPECT(refuses([](tl_request_def* d) { d->temperature = std::nanf(""); }));
    EXPECT(refuses([](tl_request_def* d) { d->top_k = -1; }));
    EXPECT(refuses([](tl_request_def* d) { d->top_p = 2; }));
    EXPECT(refuses([](tl_request_def* d) { d->min_p = HUGE_VALF; }));
    EXPECT(refuses([](tl_request_def* d) { d->repetition_penalty = 0; }));
    EXPECT(refuses([](tl_request_def* d) { d->n_bias = 1; }));
    EXPECT(refuses([](tl_request_def* d) { d->n_bias = huge; }));
    EXPECT(refuses([](tl_request_def* d) { d->n_stops = 1; }));
    EXPECT(refuses([](tl_request_def* d) { d->n_choices = huge; }));
    EXPECT(refuses([](tl_request_def* d) {
        static const char* const none[] = {""};
        d->choices = none;
        d->n_choices = 1;
    }));
    EXPECT(refuses([](tl_request_def* d) { d->on_overflow = 9; }));
    EXPECT(refuses([](tl_request_def* d) {
        d->on_overflow = TL_SHIFT;
        d->n_keep = std::numeric_limits<std::int32_t>::max();
    }));
    EXPECT(refuses([](tl_request_def* d) { d->deadline_ms = -1; }));
    EXPECT(refuses([](tl_request_def* d) { d->deadline_ms = std::nan(""); }));
    EXPECT(refused(tl_scheduler_step(nullptr, 1)));
    EXPECT(refused(tl_scheduler_step(scheduler, -1)));
    EXPECT(refused(tl_scheduler_step(scheduler, nan)));
    OK(tl_scheduler_step(scheduler, HUGE_VAL));
    EXPECT(!tl_scheduler_next_event(nullptr, &event));
    EXPECT(!tl_scheduler_next_event(scheduler, nullptr));
    EXPECT(!tl_scheduler_next_event(scheduler, &event));
    for (const tl_request wrong : {tl_request{0}, tl_request{1}, ~tl_request{0}}) {
        EXPECT(refused(tl_request_cancel(scheduler, wrong)));
        EXPECT(refused(tl_request_pause(scheduler, wrong, true)));
        EXPECT(refused(tl_request_save(scheduler, wrong, false, text, 4, &n)));
    }
    EXPECT(refused(tl_request_cancel(nullptr, 1)));
    EXPECT(refused(tl_request_pause(nullptr, 1, true)));
    EXPECT(refused(tl_request_save(nullptr, 1, false, text, 4, &n)));
    EXPECT(refused(tl_request_restore(nullptr, text, 4, nullptr, &made, &request)));
    EXPECT(refused(tl_request_restore(scheduler, nullptr, 4, nullptr, &made, &request)));
    EXPECT(refused(tl_request_restore(scheduler, text, 4, nullptr, nullptr, &request)));
    EXPECT(
        refused(tl_request_restore(scheduler, blob.data(), blob.size(), nullptr, &made, &request)));
    tl_stats stats;
    EXPECT(refused(tl_scheduler_get_stats(nullptr, &stats)));
    EXPECT(refused(tl_scheduler_get_stats(scheduler, nullptr)));
    EXPECT(made == nullptr);
    EXPECT(tokens_of(session) == timeline);
    tl_model_close(nullptr);
    tl_session_close(nullptr);
    tl_scheduler_close(nullptr);
    // A session of another model; and one that has its request.
    tl_model* const another = open(bytes);
    tl_session* stranger = nullptr;
    OK(tl_session_create(another, 1, &stranger));
    OK(tl_session_append(stranger, "a", 1));
    tl_request_def def = good;
    def.session = stranger;
    EXPECT(refused(tl_scheduler_submit(scheduler, &def, &request)));
    OK(tl_scheduler_submit(scheduler, &good, &request));
    EXPECT(refused(tl_scheduler_submit(scheduler, &good, &request)));
    tl_session_close(stranger);
    tl_model_close(another);
    tl_scheduler_close(scheduler);
    tl_session_close(session);
    tl_model_close(model);
}

// --- no memory ----------------------------------------------------------------------------------

// All of a program's life; returns whether everything went well. Nothing is left either way.
bool life(const std::string& bytes) {
    const tl_model_def def = definition(bytes);
    tl_model* model = nullptr;
    if (tl_model_open(&def, &model) != TL_OK) return false;
    tl_scheduler_def crowd = tl_default_scheduler_def();
    crowd.max_requests = 4;
    crowd.max_sessions = 2;
    crowd.reserve_tokens = 40;
    tl_scheduler* scheduler = nullptr;
    tl_session *session = nullptr, *fork = nullptr, *again = nullptr, *third = nullptr;
    bool well = tl_scheduler_create(model, &crowd, &scheduler) == TL_OK &&
                tl_session_create(model, 1, &session) == TL_OK &&
                tl_session_append(session, "abab", 4) == TL_OK &&
                tl_session_fork(session, 2, &fork) == TL_OK;
    const char* const words[] = {"ab", "ba"};
    double scores[2];
    well = well && tl_session_score(fork, words, 2, scores) == TL_OK;
    char blob[16384];
    std::size_t n = 0;
    well = well && tl_session_save(fork, true, blob, sizeof(blob), &n) == TL_OK &&
           tl_session_restore(model, blob, n, &again) == TL_OK;
    tl_request_def request = tl_default_request_def();
    request.max_new_tokens = 4;
    request.top_k = 5;
    request.frequency_penalty = 0.5f;
    request.stops = words;
    request.n_stops = 1;
    tl_request handle = 0;
    request.session = session;
    well = well && tl_scheduler_submit(scheduler, &request, &handle) == TL_OK;
    request.choices = words;
    request.n_choices = 2;
    request.session = again;
    well = well && tl_scheduler_submit(scheduler, &request, nullptr) == TL_OK;
    // Also after something failed, with steps in which several end, and one fails.
    for (int i = 0; scheduler != nullptr && i < 40; ++i) {
        if (tl_scheduler_step(scheduler, i % 2 == 0 ? 0.02 : 1e9) != TL_OK) well = false;
        if (i == 3 && tl_request_save(scheduler, handle, false, blob, sizeof(blob), &n) == TL_OK)
            well =
                well && tl_request_restore(scheduler, blob, n, nullptr, &third, nullptr) == TL_OK;
        tl_event event;
        while (tl_scheduler_next_event(scheduler, &event))
            well = well && event.finish != TL_FAILED;
    }
    tl_scheduler_close(scheduler);
    for (tl_session* one : {session, fork, again, third})
        tl_session_close(one);
    tl_model_close(model);
    return well;
}

void every_allocation_failed(const std::string& bytes) {
    EXPECT(life(bytes));
    const long before = n_in_use.load();
    long i = 0;
    for (bool reached = true; reached; ++i) {
        fail_at.store(i);
        const bool well = life(bytes);
        reached = fail_at.exchange(-1) < 0;
        if (!reached) EXPECT(well);
        EXPECT(n_in_use.load() <= before);
    }
    EXPECT(i > 500);
    EXPECT(life(bytes));
    std::printf("check_capi: %ld allocations, each failed once\n", i - 1);
}

// --- threads ------------------------------------------------------------------------------------

// A task system such as an engine has: two threads, and a queue.
class Tasks {
public:
    explicit Tasks(bool punctual) : punctual_(punctual) {
        for (std::thread& thread : threads_)
            thread = std::thread([this] { work(); });
    }
    ~Tasks() {
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            ending_ = true;
            changed_.notify_all();
        }
        for (std::thread& thread : threads_)
            thread.join();
    }
    static void enqueue(void (*task)(void*), void* context, void* user) {
        auto* const self = static_cast<Tasks*>(user);
        const std::lock_guard<std::mutex> lock(self->mutex_);
        self->n_enqueued += 1;
        self->queue_.emplace_back(task, context);
        expect(self->queue_.size() <= 2, "more tasks than threads", __LINE__);
        self->changed_.notify_one();
    }

    long n_enqueued = 0;

private:
    void work() {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            changed_.wait(lock, [&] { return ending_ || (punctual_ && !queue_.empty()); });
            if (queue_.empty()) return;
            const auto [task, context] = queue_.front();
            queue_.pop_front();
            lock.unlock();
            task(context);
            lock.lock();
        }
    }

    bool punctual_;
    bool ending_ = false;
    std::mutex mutex_;
    std::condition_variable changed_;
    std::deque<std::pair<void (*)(void*), void*>> queue_;
    std::thread threads_[2];
};

void other_peoples_threads(const std::string& bytes) {
    long n_enqueued = 0;
    tl_model* const model = open(bytes);
    const Texts expected = tell(model, 8, 1e9);
    tl_model_close(model);
    for (const bool punctual : {true, false}) {  // the late ones come after the model was closed
        Tasks tasks(punctual);
        tl_model_def def = definition(bytes);
        def.n_threads = 3;
        def.enqueue = &Tasks::enqueue;
        def.enqueue_user = &tasks;
        tl_model* busy = nullptr;
        OK(tl_model_open(&def, &busy));
        EXPECT(tell(busy, 8, 2.0) == expected);
        tl_model_close(busy);
        n_enqueued += tasks.n_enqueued;
    }
    EXPECT(n_enqueued > 20);
}

void eight_threads(const std::string& bytes) {
    tl_model_def def = definition(bytes);
    def.n_threads = 2;
    tl_model* model = nullptr;
    OK(tl_model_open(&def, &model));
    const Texts expected = tell(model, 6, 1e9);
    tl_session* shared = nullptr;
    OK(tl_session_create(model, 1, &shared));
    OK(tl_session_append(shared, "ab", 2));
    std::atomic<int> n_wrong{0}, n_busy{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 8; ++t) {
        threads.emplace_back([&] {
            for (int round = 0; round < 3; ++round) {
                if (tell(model, 6, 2.0) != expected) ++n_wrong;
                for (int i = 0; i < 50; ++i) {
                    const char* const ways[] = {"a", "b"};
                    double scores[2];
                    const tl_status status = tl_session_score(shared, ways, 2, scores);
                    if (status == TL_BUSY) ++n_busy;
                    if (status != TL_BUSY && status != TL_OK) ++n_wrong;
                }
            }
        });
    }
    for (std::thread& thread : threads)
        thread.join();
    EXPECT(n_wrong == 0);
    tl_session_close(shared);
    tl_model_close(model);
    std::printf("check_capi: eight threads, %d times one was told that a session is in use\n",
                n_busy.load());
}

// The second one is told; nothing is torn.
void one_scheduler_for_two_threads(const std::string& bytes) {
    tl_model* const model = open(bytes);
    const tl_scheduler_def def = tl_default_scheduler_def();
    tl_scheduler* scheduler = nullptr;
    OK(tl_scheduler_create(model, &def, &scheduler));
    std::atomic<int> n_wrong{0}, n_ended{0}, n_busy{0};
    std::vector<std::thread> threads;
    for (int t = 0; t < 3; ++t) {
        threads.emplace_back([&, t] {
            const auto told = [&](tl_status status) {
                if (status == TL_BUSY) ++n_busy;
                return status == TL_BUSY;
            };
            for (int i = 0; i < 200; ++i) {
                tl_session* session = nullptr;
                OK(tl_session_create(model, static_cast<std::uint64_t>(t), &session));
                OK(tl_session_append(session, "ab", 2));
                tl_request_def request = tl_default_request_def();
                request.session = session;
                request.max_new_tokens = 2;
                tl_request handle = 0;
                tl_status status = tl_scheduler_submit(scheduler, &request, &handle);
                if (status != TL_OK && !told(status) && status != TL_NO_MEMORY) ++n_wrong;
                status = tl_scheduler_step(scheduler, 0.1);
                if (status != TL_OK && !told(status)) ++n_wrong;
                tl_event event;
                while (tl_scheduler_next_event(scheduler, &event))
                    n_ended += event.finish != TL_GOES_ON;
                if (handle != 0 && i % 3 == 0) told(tl_request_cancel(scheduler, handle));
                tl_session_close(session);
            }
        });
    }
    for (std::thread& thread : threads)
        thread.join();
    EXPECT(n_wrong == 0);
    EXPECT(n_ended > 0);
    step_all(scheduler, 1, 1e9);
    // Handles of one scheduler are none of another's; a session has one request, wherever.
    tl_scheduler* other = nullptr;
    OK(tl_scheduler_create(model, &def, &other));
    const Character character = join(model, scheduler, 0);
    EXPECT(tl_request_cancel(other, character.request) == TL_INVALID_ARGUMENT);
    tl_request_def request = tl_default_request_def();
    request.session = character.session;
    EXPECT(tl_scheduler_submit(other, &request, nullptr) == TL_INVALID_ARGUMENT);
    tl_scheduler_close(other);
    tl_scheduler_close(scheduler);
    tl_session_close(character.session);
    tl_model_close(model);
}

// --- a steady state -----------------------------------------------------------------------------

long count_entries(const char* folder) {
    long n = 0;
    if (DIR* const dir = opendir(folder)) {
        while (readdir(dir) != nullptr)
            ++n;
        closedir(dir);
    }
    return n;
}

// Kilobytes of memory that is no file's.
long anonymous_memory() {
    long total = 0;
    if (std::FILE* const file = std::fopen("/proc/self/smaps_rollup", "r")) {
        char line[256];
        while (std::fgets(line, sizeof(line), file) != nullptr)
            if (std::sscanf(line, "Anonymous: %ld kB", &total) == 1) break;
        std::fclose(file);
    }
    return total;
}

void steady_state(const std::string& bytes, long n_steps) {
    tl_model_def def = definition(bytes);
    def.n_threads = 2;
    tl_model* model = nullptr;
    OK(tl_model_open(&def, &model));
    const tl_scheduler_def crowd = tl_default_scheduler_def();
    tl_scheduler* scheduler = nullptr;
    OK(tl_scheduler_create(model, &crowd, &scheduler));
    std::vector<tl_session*> sessions(16);
    tl_request_def request = tl_default_request_def();
    request.on_overflow = TL_SHIFT;
    request.top_k = 40;
    request.repetition_penalty = 1.1f;
    request.frequency_penalty = 0.1f;
    const std::int32_t ends[] = {1, 2};  // begin and end: these texts go on for ever
    const float never[] = {-HUGE_VALF, -HUGE_VALF};
    request.bias_tokens = ends;
    request.bias_values = never;
    request.n_bias = 2;
    for (std::size_t i = 0; i < sessions.size(); ++i) {
        OK(tl_session_create(model, i, &sessions[i]));
        OK(tl_session_append(sessions[i], "ab", 2));
        request.session = sessions[i];
        request.top_p = i % 2 == 0 ? 0.9f : 1.0f;
        request.temperature = i % 4 == 3 ? 0.0f : 1.0f;
        OK(tl_scheduler_submit(scheduler, &request, nullptr));
    }
    const auto step = [&](long n, double milliseconds) {
        std::size_t n_text = 0;
        for (long i = 0; i < n; ++i) {
            OK(tl_scheduler_step(scheduler, milliseconds));
            tl_event event;
            while (tl_scheduler_next_event(scheduler, &event)) {
                EXPECT(event.finish == TL_GOES_ON);
                n_text += event.n_text;
            }
        }
        return n_text;
    };
    step(n_steps / 20 + 100, 0.02);
    const long memory = anonymous_memory(), threads = count_entries("/proc/self/task"),
               handles = count_entries("/proc/self/fd"), allocations = n_allocations.load();
    std::size_t n_text = step(n_steps, 0.1);
    n_text += step(n_steps / 100, 1);  // more than there ever was time for
    const long taken = n_allocations.load() - allocations, grown = anonymous_memory() - memory;
    std::printf(
        "check_capi: %ld steps, %zu bytes of text: %ld allocations, %ld kB more memory, "
        "%ld more threads, %ld more handles\n",
        n_steps, n_text, taken, grown, count_entries("/proc/self/task") - threads,
        count_entries("/proc/self/fd") - handles);
    EXPECT(n_text > 0);
    EXPECT(taken == 0);
    EXPECT(grown <= 64);
    EXPECT(count_entries("/proc/self/task") == threads);
    EXPECT(count_entries("/proc/self/fd") == handles);
    tl_scheduler_close(scheduler);
    for (tl_session* session : sessions)
        tl_session_close(session);
    tl_model_close(model);
}

}  // namespace

int main(int n_arguments, char** arguments) {
    OK(tl_set_allocator([](size_t size, size_t alignment, void*) { return take(size, alignment); },
                        [](void* memory, size_t, size_t, void*) { give_back(memory); }, nullptr));
    long n_logged = 0;
    tl_set_log([](tl_status, const char*, void* user) { ++*static_cast<long*>(user); }, &n_logged);
    const std::string bytes = model_bytes();
    EXPECT(n_logged > 0);
    nonsense(bytes);
    tl_set_log(nullptr, nullptr);
    however_it_is_cut(bytes);
    sessions(bytes);
    requests(bytes);
    every_allocation_failed(bytes);
    const std::string large = fuzz::write(fuzz::large_model());
    however_it_is_cut(large);
    other_peoples_threads(large);
    eight_threads(large);
    one_scheduler_for_two_threads(bytes);
    // Sanitizers make it slow, and have memory of their own: 0 leaves it out.
    const long n_steps = n_arguments > 1 ? std::atol(arguments[1]) : 100'000;
    if (n_steps > 0) steady_state(bytes, n_steps);
    std::printf("check_capi: all well\n");
    return 0;
}
