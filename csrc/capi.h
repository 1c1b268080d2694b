// What the files of the C face share.
#pragma once

#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "float_mode.h"
#include "include/tinyllama.h"
#include "model.h"
#include "request.h"
#include "session.h"
#include "status.h"
#include "tokenizer.h"

struct tl_model {
    std::shared_ptr<const tinyllama::Model> model;
};

struct tl_session {
    std::shared_ptr<tinyllama::Session> session;
    std::shared_ptr<tinyllama::StreamDecoder> text;  // of what was drawn last, or null
    std::weak_ptr<tinyllama::Request> request;       // the latest on it
};

namespace tinyllama {

// Remembers the message for tl_last_error(), and logs it.
void set_last_error(tl_status status, const char* message) noexcept;
void log_message(tl_status status, const std::string& message);

// The status and the message of what was thrown.
tl_status describe(const std::exception_ptr& error, std::string* message) noexcept;

// Runs what may throw, in the float mode of this library.
template <typename F>
tl_status guarded(const F& call) noexcept {
    try {
        const FloatMode mode;
        call();
        return TL_OK;
    } catch (const Error& error) {
        const auto status = static_cast<tl_status>(error.code());
        set_last_error(status, error.what());
        return status;
    } catch (const std::bad_alloc&) {
        set_last_error(TL_NO_MEMORY, "there is no memory left");
        return TL_NO_MEMORY;
    } catch (const std::length_error& error) {
        set_last_error(TL_INVALID_ARGUMENT, error.what());
        return TL_INVALID_ARGUMENT;
    } catch (const std::exception& error) {
        set_last_error(TL_IO_ERROR, error.what());
        return TL_IO_ERROR;
    } catch (...) {
        set_last_error(TL_IO_ERROR, "something unknown was thrown");
        return TL_IO_ERROR;
    }
}

class BufferTooSmall : public Error {
public:
    BufferTooSmall(std::size_t n, std::size_t capacity)
        : Error(static_cast<Status>(TL_BUFFER_TOO_SMALL),
                std::to_string(n) + " do not fit into a buffer of " + std::to_string(capacity)) {}
};

[[noreturn]] inline void refuse(const std::string& message) {
    throw Error(Status::invalid_argument, message);
}

inline void require(const void* pointer, const char* name) {
    if (pointer == nullptr) refuse(std::string(name) + " is null");
}

// `n` things at `pointer`, which may be null for none.
inline void require(const void* pointer, std::size_t n, const char* name) {
    if (pointer == nullptr && n > 0)
        refuse(std::string(name) + " is null, but " + std::to_string(n) + " are promised");
}

// A definition, perhaps of an earlier version, over the defaults.
template <typename Def>
Def read_def(const Def* def, Def result, const char* name) {
    require(def, name);
    if (def->struct_size < sizeof(std::size_t) || def->struct_size > sizeof(Def))
        refuse(std::string("struct_size of ") + name + " is " + std::to_string(def->struct_size) +
               "; begin with its default, of this version or an earlier one");
    std::memcpy(&result, def, def->struct_size);
    return result;
}

// Fills a buffer of the caller's, if there is one. `n` is written in any case.
template <typename T>
void fill(const T* values, std::size_t n_values, T* buffer, std::size_t capacity, std::size_t* n) {
    *n = n_values;
    if (buffer == nullptr) return;
    if (n_values > capacity) throw BufferTooSmall(n_values, capacity);
    if (n_values > 0) std::memcpy(buffer, values, n_values * sizeof(T));
}

// Whether what a session holds shows no text yet.
bool is_at_start(Session& session);

}  // namespace tinyllama
