// The bytes of a model: a memory-mapped file, or a buffer handed over.
#pragma once

#include <string>
#include <vector>

#include "status.h"

namespace tinyllama {

class FileBytes {
public:
    // Maps the file read-only. Throws Error(io_error) naming it.
    static FileBytes map(const std::string& path);
    static FileBytes copy_of(ByteSpan bytes);
    // Bytes that somebody else keeps alive for as long.
    static FileBytes view(ByteSpan bytes);

    FileBytes(FileBytes&& other) noexcept;
    FileBytes(const FileBytes&) = delete;
    FileBytes& operator=(const FileBytes&) = delete;
    ~FileBytes();

    ByteSpan span() const { return span_; }

private:
    FileBytes() = default;
    ByteSpan span_;
    bool mapped_ = false;
    std::vector<std::uint8_t> owned_;
};

}  // namespace tinyllama
