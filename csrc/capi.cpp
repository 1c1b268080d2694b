// The C face of models and sessions: conversion and error mapping. No logic.

#include "capi.h"

#include <cstdio>
#include <string_view>
#include <vector>

#include "file_bytes.h"
#include "kernels/cpu.h"
#include "memory.h"
#include "save.h"
#include "scoring.h"

using namespace tinyllama;

static_assert(static_cast<int>(Status::io_error) == TL_IO_ERROR);
static_assert(static_cast<int>(Status::busy) == TL_BUSY);
static_assert(static_cast<int>(Status::nonfinite) == TL_NONFINITE);
static_assert(static_cast<int>(Status::context_full) == TL_CONTEXT_FULL);
static_assert(static_cast<int>(Status::invalid_argument) == TL_INVALID_ARGUMENT);

namespace {

thread_local char last_error[1024] = "";

struct Log {
    void (*log)(tl_status status, const char* message, void* user) = nullptr;
    void* user = nullptr;
} the_log;

std::vector<std::int32_t> copy_tokens(const std::int32_t* tokens, std::size_t n) {
    require(tokens, n, "tokens");
    return {tokens, tokens + n};
}

// As Session.append in session.py.
std::vector<std::int32_t> encode_next(Session& session, std::string_view text) {
    const Tokenizer& tokenizer = session.model().tokenizer();
    if (session.n_tokens() > 0) return tokenizer.encode(text, false, false, is_at_start(session));
    std::vector<std::int32_t> tokens =
        tokenizer.encode(text, tokenizer.add_bos() || text.empty(), false);
    if (tokens.empty()) tokens = tokenizer.encode("", true, false);
    return tokens;
}

void add(tl_session* session, const std::vector<std::int32_t>& tokens) {
    if (tokens.empty()) return;
    session->session->append(tokens);
    session->text = nullptr;
}

}  // namespace

namespace tinyllama {

void set_last_error(tl_status status, const char* message) noexcept {
    std::snprintf(last_error, sizeof(last_error), "%s", message);
    if (the_log.log != nullptr) the_log.log(status, last_error, the_log.user);
}

void log_message(tl_status status, const std::string& message) {
    if (the_log.log != nullptr) the_log.log(status, message.c_str(), the_log.user);
}

tl_status describe(const std::exception_ptr& error, std::string* message) noexcept {
    // The message may need memory that there is not: then it stays empty.
    const auto keep = [message](tl_status status, const char* text) {
        try {
            *message = text;
        } catch (const std::bad_alloc&) {
            message->clear();
        }
        return status;
    };
    try {
        std::rethrow_exception(error);
    } catch (const Error& known) {
        return keep(static_cast<tl_status>(known.code()), known.what());
    } catch (const std::bad_alloc&) {
        return keep(TL_NO_MEMORY, "no memory left");
    } catch (const std::exception& other) {
        return keep(TL_IO_ERROR, other.what());
    } catch (...) {
        return keep(TL_IO_ERROR, "unknown");
    }
}

bool is_at_start(Session& session) {
    return session.model().tokenizer().decode(session.tokens(), false).empty();
}

}  // namespace tinyllama

extern "C" {

// --- the library --------------------------------------------------------------------------------

const char* tl_version(void) { return TINYLLAMA_VERSION; }

const char* tl_last_error(void) { return last_error; }

tl_status tl_set_allocator(void* (*allocate)(size_t, size_t, void*),
                           void (*release)(void*, size_t, size_t, void*), void* user) {
    return guarded([&] {
        if ((allocate == nullptr) != (release == nullptr))
            refuse("of allocate and release one is null");
        if (!set_allocator({allocate, release, user}))
            throw Error(Status::busy, "memory of the allocator before is in use");
    });
}

void tl_set_log(void (*log)(tl_status, const char*, void*), void* user) { the_log = {log, user}; }

// --- models -------------------------------------------------------------------------------------

tl_status tl_model_open(const tl_model_def* def, tl_model** model) {
    return guarded([&] {
        const tl_model_def d = read_def(def, tl_default_model_def(), "tl_model_def");
        require(model, "model");
        if ((d.path == nullptr) == (d.data == nullptr)) refuse("give either path or data");
        const std::string name = d.path != nullptr ? d.path : "model";
        const ByteSpan data{static_cast<const std::uint8_t*>(d.data), d.n_data};
        const FileBytes bytes = d.path != nullptr ? FileBytes::map(d.path) : FileBytes::view(data);
        ModelOptions options;
        options.n_threads = d.n_threads;
        options.max_seq_len = d.max_seq_len;
        if (d.kv_dtype != nullptr) options.kv_dtype = d.kv_dtype;
        if (d.isa != nullptr) options.isa = d.isa;
        options.tasks = {d.enqueue, d.enqueue_user};
        auto opened = std::make_unique<tl_model>();
        opened->model = Model::open(bytes, name, options);
        log_message(TL_OK, "opened " + name + ": kernels " + opened->model->kernels().name + ", " +
                               std::to_string(opened->model->threads().size()) + " threads");
        *model = opened.release();
    });
}

void tl_model_close(tl_model* model) { delete model; }

tl_status tl_model_get_info(const tl_model* model, tl_model_info* info) {
    return guarded([&] {
        require(model, "model");
        require(info, "info");
        const Model& m = *model->model;
        tl_model_info result = {};
        result.vocab_size = m.config().vocab_size;
        result.max_seq_len = m.config().max_seq_len;
        result.bos_id = m.tokenizer().bos_id();
        result.eos_id = m.tokenizer().eos_id();
        result.n_threads = m.threads().size();
        result.n_parameters = static_cast<std::int64_t>(m.weights().n_parameters);
        result.weight_bytes = static_cast<std::int64_t>(m.weights().n_bytes);
        result.kv_bytes_per_token = m.kv_layout().bytes_per_position();
        result.isa = m.kernels().name;
        *info = result;
    });
}

tl_status tl_model_encode(const tl_model* model, const char* text, size_t n_text, bool bos,
                          int32_t* tokens, size_t capacity, size_t* n) {
    return guarded([&] {
        require(model, "model");
        require(text, n_text, "text");
        require(tokens, capacity, "tokens");
        require(n, "n");
        const std::vector<std::int32_t> found =
            model->model->tokenizer().encode({text, n_text}, bos, false);
        fill(found.data(), found.size(), tokens, capacity, n);
    });
}

tl_status tl_model_decode(const tl_model* model, const int32_t* tokens, size_t n_tokens, char* text,
                          size_t capacity, size_t* n) {
    return guarded([&] {
        require(model, "model");
        require(text, capacity, "text");
        require(n, "n");
        const std::string found =
            model->model->tokenizer().decode(copy_tokens(tokens, n_tokens), true);
        fill(found.data(), found.size(), text, capacity, n);
    });
}

// --- sessions -----------------------------------------------------------------------------------

tl_status tl_session_create(tl_model* model, uint64_t seed, tl_session** session) {
    return guarded([&] {
        require(model, "model");
        require(session, "session");
        auto made = std::make_unique<tl_session>();
        made->session = std::make_shared<Session>(model->model, seed);
        *session = made.release();
    });
}

void tl_session_close(tl_session* session) { delete session; }

tl_status tl_session_append(tl_session* session, const char* text, size_t n_text) {
    return guarded([&] {
        require(session, "session");
        require(text, n_text, "text");
        add(session, encode_next(*session->session, {text, n_text}));
    });
}

tl_status tl_session_append_tokens(tl_session* session, const int32_t* tokens, size_t n) {
    return guarded([&] {
        require(session, "session");
        add(session, copy_tokens(tokens, n));
    });
}

tl_status tl_session_get_tokens(tl_session* session, int32_t* tokens, size_t capacity, size_t* n) {
    return guarded([&] {
        require(session, "session");
        require(tokens, capacity, "tokens");
        require(n, "n");
        const std::vector<std::int32_t> found = session->session->tokens();
        fill(found.data(), found.size(), tokens, capacity, n);
    });
}

tl_status tl_session_rewind(tl_session* session, size_t n_tokens) {
    return guarded([&] {
        require(session, "session");
        if (n_tokens > INT32_MAX) refuse("n_tokens is " + std::to_string(n_tokens));
        session->session->rewind(static_cast<std::int32_t>(n_tokens));
        session->text = nullptr;
    });
}

tl_status tl_session_fork(tl_session* session, uint64_t seed, tl_session** fork) {
    return guarded([&] {
        require(session, "session");
        require(fork, "fork");
        auto made = std::make_unique<tl_session>();
        if (session->text != nullptr) made->text = std::make_shared<StreamDecoder>(*session->text);
        made->session = session->session->fork(seed);
        *fork = made.release();
    });
}

tl_status tl_session_drop_cache(tl_session* session) {
    return guarded([&] {
        require(session, "session");
        session->session->drop_cache();
    });
}

tl_status tl_session_save(tl_session* session, bool with_cache, void* blob, size_t capacity,
                          size_t* n) {
    return guarded([&] {
        require(session, "session");
        require(blob, capacity, "blob");
        require(n, "n");
        const std::string saved = save(*session->session, session->text.get(), with_cache);
        fill(saved.data(), saved.size(), static_cast<char*>(blob), capacity, n);
    });
}

tl_status tl_session_restore(tl_model* model, const void* blob, size_t n, tl_session** session) {
    return guarded([&] {
        require(model, "model");
        require(blob, n, "blob");
        require(session, "session");
        Restored restored = restore(model->model, {static_cast<const std::uint8_t*>(blob), n});
        auto made = std::make_unique<tl_session>();
        if (restored.decoder) made->text = std::make_shared<StreamDecoder>(*restored.decoder);
        made->session = std::move(restored.session);
        *session = made.release();
    });
}

tl_status tl_session_score(tl_session* session, const char* const* texts, size_t n,
                           double* logprobs) {
    return guarded([&] {
        require(session, "session");
        require(texts, n, "texts");
        require(logprobs, n, "logprobs");
        if (n > 1'000'000) refuse("n is " + std::to_string(n));
        Session& s = *session->session;
        const bool at_start = is_at_start(s);
        std::vector<std::vector<std::int32_t>> ways;
        for (std::size_t i = 0; i < n; ++i) {
            require(texts[i], "one of the texts");
            ways.push_back(s.model().token_trie().spell(texts[i], at_start));
            if (ways.back().empty())
                refuse("the vocabulary has no tokens for '" + std::string(texts[i]) + "'");
        }
        const std::vector<double> scores = score_ways(s, ways, [] {});
        if (n > 0) std::memcpy(logprobs, scores.data(), n * sizeof(double));
    });
}

}  // extern "C"
