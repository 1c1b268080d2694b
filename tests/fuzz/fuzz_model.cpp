// Opens mutated model files and runs those that are accepted. Deterministic: usage
//
//     fuzz_model SEED ITERATIONS [FILE...]
//
// runs the small models made in mutant.cpp and the files as they are, then ITERATIONS mutants of
// them. Build with -DTINYLLAMA_FUZZ=ON: address and undefined-behaviour sanitizers. What must hold:
// nothing crashes or hangs, no memory is used beyond a multiple of the file's size, nothing but
// tinyllama::Error is thrown, and what is accepted computes finite logits or says why not.
// A file that fails is left as fuzz-SEED-I.gguf; `fuzz_model 0 0 fuzz-SEED-I.gguf` runs it again.

#include <malloc.h>
#include <sanitizer/common_interface_defs.h>
#include <signal.h>
#include <sys/time.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <new>
#include <string>
#include <vector>

#include "kernels/cpu.h"
#include "model.h"
#include "mutant.h"
#include "session.h"
#include "utf8.h"

namespace {

// --- memory -------------------------------------------------------------------------------------

std::size_t live_bytes = 0;
std::size_t byte_limit = 0;  // 0: none

void* counted_allocation(std::size_t size) {
    if (byte_limit != 0 && live_bytes + size > byte_limit) {
        std::fprintf(stderr, "allocation of %zu bytes beside %zu: more than %zu\n", size,
                     live_bytes, byte_limit);
        std::abort();
    }
    void* memory = std::malloc(size == 0 ? 1 : size);
    if (memory == nullptr) std::abort();
    live_bytes += malloc_usable_size(memory);
    return memory;
}

void counted_free(void* memory) {
    if (memory == nullptr) return;
    live_bytes -= malloc_usable_size(memory);
    std::free(memory);
}

}  // namespace

void* operator new(std::size_t size) { return counted_allocation(size); }
void* operator new[](std::size_t size) { return counted_allocation(size); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept {
    return counted_allocation(size);
}
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept {
    return counted_allocation(size);
}
void operator delete(void* memory) noexcept { counted_free(memory); }
void operator delete[](void* memory) noexcept { counted_free(memory); }
void operator delete(void* memory, std::size_t) noexcept { counted_free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { counted_free(memory); }
void operator delete(void* memory, const std::nothrow_t&) noexcept { counted_free(memory); }
void operator delete[](void* memory, const std::nothrow_t&) noexcept { counted_free(memory); }

namespace {

using namespace tinyllama;

// --- what failed --------------------------------------------------------------------------------

std::string current_bytes;
char current_name[64] = "";

// Called however the process dies: by a sanitizer, by abort(), or for want of progress.
void keep_current_file() {
    std::fprintf(stderr, "failed: %s\n", current_name);
    if (FILE* file = std::fopen(current_name, "wb")) {
        std::fwrite(current_bytes.data(), 1, current_bytes.size(), file);
        std::fclose(file);
    }
}

void on_signal(int number) {
    std::fprintf(stderr, number == SIGPROF ? "no progress\n" : "aborted\n");
    keep_current_file();
    std::_Exit(1);
}

// Ten seconds of processor time for the next files, whatever else the machine does.
void rearm_watchdog() {
    const itimerval limit{{0, 0}, {10, 0}};
    setitimer(ITIMER_PROF, &limit, nullptr);
}

[[noreturn]] void broken(const char* promise) {
    std::fprintf(stderr, "broken promise: %s\n", promise);
    std::abort();
}

// --- one file -----------------------------------------------------------------------------------

// Text through the tokenizer and back, three tokens through the model, one drawn.
void exercise(const std::shared_ptr<const Model>& model, fuzz::Random& random) {
    const Tokenizer& tokenizer = model->tokenizer();
    std::string text;
    const char* const parts[] = {"a",    "ab",       " ",   "  ", "b", "\xe7\x8b\x90",
                                 "<go>", "\xf0\x9f", "\xff"};
    for (std::size_t n = random.below(12); n > 0; --n)
        text += parts[random.below(9)];
    std::vector<std::int32_t> tokens = tokenizer.encode(text, true, random.one_in(2));
    StreamDecoder stream(tokenizer, true);
    std::string streamed;
    for (const std::int32_t token : tokens) {
        if (token < 0 || token >= tokenizer.vocab_size()) broken("tokens lie in the vocabulary");
        streamed += stream.push(token);
    }
    streamed += stream.finish();
    const std::string whole = tokenizer.decode(tokens);
    if (!is_utf8(streamed)) broken("a stream is UTF-8");
    if (is_utf8(whole) && streamed != whole) broken("a stream is the whole text");

    Session session(model, random.next());
    tokens.resize(std::min<std::size_t>(tokens.size(), 3));
    tokens.push_back(
        static_cast<std::int32_t>(random.below(static_cast<std::size_t>(tokenizer.vocab_size()))));
    feed({{&session, tokens, nullptr}}, [] {});
    for (const float logit : session.logits()) {
        if (!std::isfinite(logit)) broken("logits are finite");
    }
    session.sample(SamplingParams());
}

// What became of a file: "accepted", or the message with names and numbers left out.
std::string outcome_of(const std::string& bytes, fuzz::Random& random) {
    std::vector<std::string> isas;
    for (const char* const* name = supported_isas(); *name != nullptr; ++name) {
        isas.push_back(*name);
    }
    std::vector<std::string> kv_dtypes = {"f32", "bf16", "int8"};
    const ModelOptions options{1, random.pick(isas), random.pick(kv_dtypes), 0};
    const char* stage = "opened: ";
    byte_limit = live_bytes + 16 * bytes.size() + (1 << 20);
    try {
        const ByteSpan span{reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()};
        const std::shared_ptr<const Model> model =
            Model::open(FileBytes::copy_of(span), "mutant", options);
        stage = "run: ";
        exercise(model, random);
        byte_limit = 0;
        return "accepted";
    } catch (const Error& error) {
        byte_limit = 0;
        std::string reason = std::string(stage) + "status ";
        reason += std::to_string(static_cast<int>(error.code())) + ": ";
        bool in_quotes = false;
        for (const char c : std::string(error.what())) {
            if (c == '\'') in_quotes = !in_quotes;
            if (!in_quotes && (c < '0' || c > '9')) reason += c;
        }
        return reason;
    }
}

std::string read_file(const char* path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) {
        std::fprintf(stderr, "cannot read %s\n", path);
        std::exit(2);
    }
    return {std::istreambuf_iterator<char>(file), {}};
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 3) {
        std::fprintf(stderr, "usage: fuzz_model SEED ITERATIONS [FILE...]\n");
        return 2;
    }
    const std::uint64_t seed = std::strtoull(argv[1], nullptr, 10);
    const std::uint64_t n = std::strtoull(argv[2], nullptr, 10);
    __sanitizer_set_death_callback(keep_current_file);
    signal(SIGPROF, on_signal);
    signal(SIGABRT, on_signal);

    const std::vector<fuzz::Tree> trees = fuzz::seed_models();
    std::vector<std::string> files;
    for (int i = 3; i < argc; ++i)
        files.push_back(read_file(argv[i]));
    std::map<std::string, std::uint64_t> outcomes;
    const auto run = [&](const std::string& bytes, std::uint64_t i, fuzz::Random& random) {
        current_bytes = bytes;
        std::snprintf(current_name, sizeof(current_name), "fuzz-%llu-%llu.gguf",
                      static_cast<unsigned long long>(seed), static_cast<unsigned long long>(i));
        return outcome_of(current_bytes, random);
    };
    fuzz::Random unused(seed, 0);
    for (const fuzz::Tree& tree : trees) {
        const std::string outcome = run(fuzz::write(tree), 0, unused);
        if (outcome != "accepted") {
            std::fprintf(stderr, "a model made here is refused: %s\n", outcome.c_str());
            return 1;
        }
    }
    for (const std::string& file : files) {
        std::printf("%s\n", run(file, 0, unused).c_str());
    }
    for (std::uint64_t i = 0; i < n; ++i) {
        if (i % 100 == 0) rearm_watchdog();
        fuzz::Random random(seed, i + 1);
        const std::size_t which = random.below(trees.size() + files.size());
        const std::string bytes = which < trees.size()
                                      ? fuzz::mutate(trees[which], random)
                                      : fuzz::mutate_bytes(files[which - trees.size()], random);
        ++outcomes[run(bytes, i, random)];
    }
    for (const auto& [reason, count] : outcomes) {
        std::printf("%8llu %s\n", static_cast<unsigned long long>(count), reason.c_str());
    }
    std::printf("ok %llu\n", static_cast<unsigned long long>(n));
    return 0;
}
