#include "save.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include "byte_reader.h"
#include "hash.h"
#include "utf8.h"

namespace tinyllama {
namespace {

constexpr std::string_view magic = "TLSAVE";
constexpr std::uint16_t version = 2;
constexpr std::size_t checksum_end = magic.size() + sizeof(version) + sizeof(std::uint64_t);
constexpr std::uint8_t has_decoder = 1, has_request = 2, has_cache = 4;
constexpr std::int32_t most_short_tokens = 1 << 16;

const std::string blob_name = "the saved state";

[[noreturn]] void refuse(const std::string& reason) {
    throw Error(Status::format_error, blob_name + " " + reason);
}

std::size_t token_bytes(const Model& model) {
    return model.config().vocab_size <= most_short_tokens ? 2 : 4;
}

class Writer {
public:
    template <typename T>
    void number(T value) {
        static_assert(std::is_arithmetic_v<T>);
        bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
    }
    void count(std::size_t n) { number(static_cast<std::uint32_t>(n)); }
    void bytes(std::string_view bytes) { bytes_ += bytes; }
    void string(std::string_view text) {
        count(text.size());
        bytes(text);
    }
    void tokens(const std::vector<std::int32_t>& tokens, std::size_t size) {
        count(tokens.size());
        for (const std::int32_t token : tokens)
            bytes_.append(reinterpret_cast<const char*>(&token), size);
    }
    std::string take() { return std::move(bytes_); }

private:
    std::string bytes_;
};

class Reader {
public:
    explicit Reader(ByteSpan bytes) : bytes_(bytes) {}

    template <typename T>
    T number() {
        static_assert(std::is_arithmetic_v<T>);
        T value;
        std::memcpy(&value, take(sizeof(T)), sizeof(T));
        return value;
    }
    bool boolean() {
        const auto value = number<std::uint8_t>();
        if (value > 1) refuse("holds a wrong value");
        return value == 1;
    }
    // Of things that take so many bytes each at least.
    std::size_t count(std::size_t size) {
        const auto n = number<std::uint32_t>();
        if (n > (bytes_.size - pos_) / size) refuse("ends too soon");
        return n;
    }
    std::string string() {
        const std::size_t n = count(1);
        return {reinterpret_cast<const char*>(take(n)), n};
    }
    std::vector<std::int32_t> tokens(std::size_t size) {
        std::vector<std::int32_t> result(count(size));
        for (std::int32_t& token : result)
            std::memcpy(&token, take(size), size);
        return result;
    }
    const std::uint8_t* take(std::size_t n) {
        if (n > bytes_.size - pos_) refuse("ends too soon");
        pos_ += n;
        return bytes_.data + (pos_ - n);
    }
    void finish() const {
        if (pos_ != bytes_.size) refuse("has more bytes than it should");
    }

private:
    ByteSpan bytes_;
    std::size_t pos_ = 0;
};

void write_strings(Writer& out, const std::vector<std::string>& strings) {
    out.count(strings.size());
    for (const std::string& string : strings)
        out.string(string);
}

std::vector<std::string> read_strings(Reader& in) {
    std::vector<std::string> strings(in.count(4));
    for (std::string& string : strings)
        string = in.string();
    return strings;
}

void write_params(Writer& out, const SamplingParams& p) {
    out.number(p.temperature);
    out.number(p.top_k);
    out.number(p.top_p);
    out.number(p.min_p);
    out.number(p.repetition_penalty);
    out.number(p.presence_penalty);
    out.number(p.frequency_penalty);
    out.number(p.n_prompt_tokens);
    out.count(p.logit_bias.size());
    for (const auto& [token, bias] : p.logit_bias) {
        out.number(token);
        out.number(bias);
    }
    out.tokens(p.banned, 4);
}

SamplingParams read_params(Reader& in) {
    SamplingParams p;
    p.temperature = in.number<float>();
    p.top_k = in.number<std::int32_t>();
    p.top_p = in.number<float>();
    p.min_p = in.number<float>();
    p.repetition_penalty = in.number<float>();
    p.presence_penalty = in.number<float>();
    p.frequency_penalty = in.number<float>();
    p.n_prompt_tokens = in.number<std::int32_t>();
    p.logit_bias.resize(in.count(8));
    for (auto& [token, bias] : p.logit_bias) {
        token = in.number<std::int32_t>();
        bias = in.number<float>();
    }
    p.banned = in.tokens(4);
    return p;
}

void write_limits(Writer& out, const Limits& limits) {
    out.number(limits.max_new_tokens.value_or(-1));
    out.number(limits.min_new_tokens);
    out.tokens(limits.end_tokens, 4);
    write_strings(out, limits.stops);
    out.number(static_cast<std::uint8_t>(limits.on_overflow));
    out.number(limits.n_keep);
}

Limits read_limits(Reader& in) {
    Limits limits;
    const auto max_new_tokens = in.number<std::int32_t>();
    if (max_new_tokens >= 0) limits.max_new_tokens = max_new_tokens;
    limits.min_new_tokens = in.number<std::int32_t>();
    limits.end_tokens = in.tokens(4);
    limits.stops = read_strings(in);
    for (const std::string& stop : limits.stops)
        if (stop.empty()) refuse("holds an empty stop string");
    limits.on_overflow = static_cast<Overflow>(in.number<std::uint8_t>());
    limits.n_keep = in.number<std::int32_t>();
    if (limits.on_overflow > Overflow::error || limits.n_keep < 0) refuse("holds a wrong value");
    return limits;
}

void write_decoder(Writer& out, const StreamDecoder& decoder) {
    out.number(static_cast<std::uint8_t>(decoder.at_start()));
    out.string(decoder.pending());
}

Form read_form(Reader& in) {
    Form form;
    form.kind = in.string();
    form.texts = read_strings(in);
    const std::size_t n = form.texts.size();
    bool known = form.kind.empty() ? n == 0 : form.kind == "choices" && n > 0;
    for (const char* kind : {"regex", "json_schema", "grammar"})
        known = known || (form.kind == kind && n == 1);
    if (!known || !std::all_of(form.texts.begin(), form.texts.end(), is_utf8))
        refuse("holds a form that is not known");
    return form;
}

// Drawn tokens that end the timeline, as they do unless somebody put others there, are counted.
void write_request(Writer& out, const RequestState& state,
                   const std::vector<std::int32_t>& timeline, std::size_t token_size) {
    write_params(out, state.params);
    write_limits(out, state.limits);
    out.string(state.form.kind);
    write_strings(out, state.form.texts);
    out.number(state.priority);
    out.number(state.time_left ? state.time_left->count() : std::nan(""));
    out.number(static_cast<std::uint8_t>(state.at_start));
    out.string(state.pending);
    out.number(state.n_forgotten);
    const std::size_t n = state.tokens.size();
    const bool at_end = n <= timeline.size() &&
                        std::equal(state.tokens.rbegin(), state.tokens.rend(), timeline.rbegin());
    out.number(static_cast<std::uint8_t>(at_end));
    if (at_end) {
        out.count(n);
    } else {
        out.tokens(state.tokens, token_size);
    }
    out.count(state.n_taken);
    out.number(static_cast<std::uint8_t>(state.ending));
    out.count(state.n_reported);
    out.number(static_cast<std::uint8_t>(state.wish));
}

RequestState read_request(Reader& in, const std::vector<std::int32_t>& timeline,
                          std::size_t token_size) {
    RequestState state;
    state.params = read_params(in);
    state.limits = read_limits(in);
    state.form = read_form(in);
    state.priority = in.number<std::int32_t>();
    const auto time_left = in.number<double>();
    if (std::fabs(time_left) < 1e9) state.time_left = Seconds(time_left);
    state.at_start = in.boolean();
    state.pending = in.string();
    state.n_forgotten = in.number<std::int64_t>();
    if (in.boolean()) {
        const auto n = in.number<std::uint32_t>();
        if (n > timeline.size()) refuse("counts more tokens than it has");
        state.tokens.assign(timeline.end() - n, timeline.end());
    } else {
        state.tokens = in.tokens(token_size);
    }
    state.n_taken = in.number<std::uint32_t>();
    state.ending = static_cast<Ending>(in.number<std::uint8_t>());
    if (state.ending >= Ending::error) refuse("holds a wrong value");
    state.n_reported = in.number<std::uint32_t>();
    state.wish = static_cast<Wish>(in.number<std::uint8_t>());
    if (state.wish > Wish::end) refuse("holds a wrong value");
    return state;
}

// Where the text of a request stands.
StreamDecoder decoder_of(const RequestState& state, const Tokenizer& tokenizer) {
    StreamDecoder decoder(tokenizer, state.at_start, state.pending);
    for (const std::int32_t token : state.tokens)
        decoder.push(token);
    return decoder;
}

std::string finished(const Model& model, std::uint8_t parts, const std::string& body) {
    Writer content;
    content.number(model.hash());
    content.number(model.tokenizer().hash());
    content.number(parts);
    content.bytes(body);
    const std::string bytes = content.take();
    Writer out;
    out.bytes(magic);
    out.number(version);
    out.number(hash64({reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size()}));
    out.bytes(bytes);
    return out.take();
}

// What is behind the header, once that is found to be ours and whole.
Reader open_blob(const Model& model, ByteSpan blob) {
    Reader in(blob);
    if (blob.size < checksum_end ||
        std::memcmp(in.take(magic.size()), magic.data(), magic.size()) != 0)
        refuse("is none: it does not begin with " + quoted(magic));
    const auto found = in.number<std::uint16_t>();
    if (found != version)
        refuse("is of version " + std::to_string(found) + "; this tinyllama reads version " +
               std::to_string(version));
    if (in.number<std::uint64_t>() != hash64({blob.data + checksum_end, blob.size - checksum_end}))
        refuse("is damaged: its checksum is wrong");
    if (in.number<std::uint64_t>() != model.hash())
        refuse("was made with another model than " + model.name());
    if (in.number<std::uint64_t>() != model.tokenizer().hash())
        refuse("was made with another tokenizer than that of " + model.name());
    return in;
}

}  // namespace

// The part of a blob that looks into sessions.
class SavedSession {
public:
    static void write(Writer& out, Session& session) {
        out.number(session.random_.seed);
        out.number(session.random_.n_draws);
        out.tokens(session.tokens_, token_bytes(session.model()));
    }

    static void write_cache(Writer& out, const Session& session) {
        const KvLayout& layout = session.cache_.layout();
        const std::size_t n = session.n_read_ / static_cast<std::size_t>(kv_block);
        out.string(session.model().kernels().name);
        out.string(kv_type_name(layout.type));
        out.number(layout.block_bytes());
        out.count(n);
        for (std::size_t i = 0; i < n; ++i)
            out.bytes({reinterpret_cast<const char*>(session.cache_.block(i)),
                       static_cast<std::size_t>(layout.block_bytes())});
    }

    static std::shared_ptr<Session> read(Reader& in, const std::shared_ptr<const Model>& model) {
        const auto seed = in.number<std::uint64_t>();
        auto session = std::make_shared<Session>(model, seed);
        session->random_.n_draws = in.number<std::uint64_t>();
        session->append(in.tokens(token_bytes(*model)));
        return session;
    }

    static void read_cache(Reader& in, Session& session) {
        const KvLayout& layout = session.cache_.layout();
        const bool same_kernels = in.string() == session.model().kernels().name;
        const bool same_type = in.string() == kv_type_name(layout.type);
        const auto block_bytes = in.number<std::int64_t>();
        if (block_bytes <= 0) refuse("holds a wrong value");
        const std::size_t n = in.count(static_cast<std::size_t>(block_bytes));
        if (n * static_cast<std::size_t>(kv_block) > session.tokens_.size())
            refuse("has a longer cache than tokens");
        const bool fits = same_kernels && same_type && block_bytes == layout.block_bytes();
        for (std::size_t i = 0; i < n; ++i) {
            const std::uint8_t* block = in.take(static_cast<std::size_t>(block_bytes));
            if (fits) session.cache_.append_copy(block);
        }
        if (fits && n > 0)
            session.n_read_ =
                std::min(n * static_cast<std::size_t>(kv_block), session.tokens_.size() - 1);
    }
};

std::string save(Session& session, const StreamDecoder* decoder, bool with_cache) {
    const SessionLock lock(session);
    Writer out;
    SavedSession::write(out, session);
    if (decoder != nullptr) write_decoder(out, *decoder);
    if (with_cache) SavedSession::write_cache(out, session);
    const int parts = (decoder != nullptr ? has_decoder : 0) | (with_cache ? has_cache : 0);
    return finished(session.model(), static_cast<std::uint8_t>(parts), out.take());
}

std::string save(const Request& request, bool with_cache) {
    const RequestState state = request.state();
    if (state.ending == Ending::error)
        throw Error(Status::invalid_argument, "a request that ended with an error is not saved");
    Session& session = request.session();
    const std::vector<std::int32_t> timeline = session.tokens();
    const SessionLock lock(session);
    Writer out;
    SavedSession::write(out, session);
    write_request(out, state, timeline, token_bytes(session.model()));
    if (with_cache) SavedSession::write_cache(out, session);
    const int parts = has_request | (with_cache ? has_cache : 0);
    return finished(session.model(), static_cast<std::uint8_t>(parts), out.take());
}

Restored restore(const std::shared_ptr<const Model>& model, ByteSpan blob) {
    Reader in = open_blob(*model, blob);
    const auto parts = in.number<std::uint8_t>();
    if (parts > (has_decoder | has_request | has_cache)) refuse("holds a part that is not known");
    Restored result;
    result.session = SavedSession::read(in, model);
    if ((parts & has_decoder) != 0) {
        const bool at_start = in.boolean();
        result.decoder.emplace(model->tokenizer(), at_start, in.string());
    }
    if ((parts & has_request) != 0) {
        result.request = read_request(in, result.session->tokens(), token_bytes(*model));
        result.decoder = decoder_of(*result.request, model->tokenizer());
    }
    if ((parts & has_cache) != 0) SavedSession::read_cache(in, *result.session);
    in.finish();
    return result;
}

}  // namespace tinyllama
