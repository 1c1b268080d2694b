// Saved sessions and requests: bytes that go on, in another process, exactly where they were.
//
// A blob is little-endian: "TLSAVE", a version (u16), XXH64 of all that follows, the hashes of the
// model and of its tokenizer (u64 each), what is in it (u8: 1 a decoder, 2 a request, 4 a cache),
// then the session, and these parts in this order. Tokens take two bytes each where the vocabulary
// has no more than 65,536, else four; what follows a count of things (u32) are the things.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "request.h"
#include "session.h"
#include "status.h"
#include "tokenizer.h"

namespace tinyllama {

// With its decoder, which may hold a character cut in two, unless null. With the cache of
// whole blocks only the rest is read again after restoring; without it a token takes two bytes.
std::string save(Session& session, const StreamDecoder* decoder, bool with_cache);
// A request with its session. Throws Error(invalid_argument) for one that ended with an error.
std::string save(const Request& request, bool with_cache);

struct Restored {
    std::shared_ptr<Session> session;
    std::optional<StreamDecoder> decoder;
    std::optional<RequestState> request;
};

// Throws Error(format_error) naming the reason when the bytes are not such a blob, or damaged, of
// another version or saved with another model or tokenizer; context_full when the model was opened
// with too short a context. A cache from another kernel set or of another type is not used: what
// it held is read again.
Restored restore(const std::shared_ptr<const Model>& model, ByteSpan blob);

}  // namespace tinyllama
