#include "file_bytes.h"

#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

#if defined(__unix__) || defined(__APPLE__)
#define TINYLLAMA_MMAP 1
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>
#endif

namespace tinyllama {
namespace {

[[noreturn]] void fail(const std::string& path, int error) {
    throw Error(Status::io_error, path + ": " + std::strerror(error));
}

}  // namespace

FileBytes FileBytes::map(const std::string& path) {
    FileBytes file;
#ifdef TINYLLAMA_MMAP
    const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (descriptor < 0) fail(path, errno);
    struct stat info{};
    if (::fstat(descriptor, &info) != 0 || S_ISDIR(info.st_mode)) {
        const int error = S_ISDIR(info.st_mode) ? EISDIR : errno;
        ::close(descriptor);
        fail(path, error);
    }
    const auto size = static_cast<std::size_t>(info.st_size);
    if (size > 0) {
        void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor, 0);
        const int error = errno;
        ::close(descriptor);
        if (address == MAP_FAILED) fail(path, error);
        file.span_ = {static_cast<const std::uint8_t*>(address), size};
        file.mapped_ = true;
    } else {
        ::close(descriptor);
    }
#else
    std::ifstream stream(path, std::ios::binary);
    if (!stream) fail(path, errno);
    file.owned_.assign(std::istreambuf_iterator<char>(stream), std::istreambuf_iterator<char>());
    file.span_ = {file.owned_.data(), file.owned_.size()};
#endif
    return file;
}

FileBytes FileBytes::view(ByteSpan bytes) {
    FileBytes result;
    result.span_ = bytes;
    return result;
}

FileBytes FileBytes::copy_of(ByteSpan bytes) {
    FileBytes file;
    file.owned_.assign(bytes.data, bytes.data + bytes.size);
    file.span_ = {file.owned_.data(), file.owned_.size()};
    return file;
}

FileBytes::FileBytes(FileBytes&& other) noexcept
    : span_(std::exchange(other.span_, {})),
      mapped_(std::exchange(other.mapped_, false)),
      owned_(std::move(other.owned_)) {}

FileBytes::~FileBytes() {
#ifdef TINYLLAMA_MMAP
    if (mapped_) ::munmap(const_cast<std::uint8_t*>(span_.data), span_.size);
#endif
}

}  // namespace tinyllama
