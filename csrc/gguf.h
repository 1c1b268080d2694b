// A bounded reader of GGUF (version 2 and 3): metadata and tensors over a span of bytes.
//
// Parsing never reads outside the span, never allocates more than a small multiple of its size,
// and accepts a file only when every size, offset and count in it is consistent.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "status.h"

namespace tinyllama {

// The numbers are those of the file format (ggml types).
enum class DType : std::uint32_t { f32 = 0, f16 = 1, q4_0 = 2, q8_0 = 8, bf16 = 30 };

const char* dtype_name(DType dtype);
// Bytes of one row of `cols` values; 0 when cols is not a multiple of 32 for q4_0 and q8_0, or when
// the result does not fit.
std::uint64_t row_bytes(DType dtype, std::uint64_t cols);

struct GgufTensor {
    std::string name;
    DType dtype = DType::f32;
    std::uint64_t rows = 1;  // 1 for a vector
    std::uint64_t cols = 0;  // the fastest axis
    int n_dims = 1;          // 1 or 2
    ByteSpan bytes;
};

struct GgufStrings {
    std::vector<std::string> items;
};
struct GgufFloats {
    std::vector<double> items;
};  // arrays of f32 and f64
struct GgufInts {
    std::vector<std::int64_t> items;
};  // arrays of every integer type and bool
// An integer is int64 whenever it fits; uint64 holds only what lies above.
using GgufValue = std::variant<std::int64_t, std::uint64_t, double, bool, std::string, GgufStrings,
                               GgufFloats, GgufInts>;

class GgufFile {
public:
    // `name` stands for the file in messages. The span must outlive the object.
    // Throws Error(format_error).
    static GgufFile parse(ByteSpan bytes, const std::string& name);

    // Keys and names of tensors are UTF-8; of string values nothing is promised.
    using Metadata = std::map<std::string, GgufValue, std::less<>>;

    const std::string& name() const { return name_; }
    bool has(std::string_view key) const { return metadata_.find(key) != metadata_.end(); }
    const Metadata& metadata() const { return metadata_; }
    const std::vector<GgufTensor>& tensors() const { return tensors_; }  // in file order

    // Typed look-ups. Missing key or wrong type: Error(format_error) naming file and key.
    // Integers are accepted from any integer type when the value is in range.
    std::int64_t get_int(std::string_view key) const;
    double get_float(std::string_view key) const;
    bool get_bool(std::string_view key) const;
    const std::string& get_string(std::string_view key) const;
    const std::vector<std::string>& get_strings(std::string_view key) const;
    const std::vector<double>& get_floats(std::string_view key) const;
    const std::vector<std::int64_t>& get_ints(std::string_view key) const;
    // nullptr when there is none of that name.
    const GgufTensor* find_tensor(std::string_view name) const;

private:
    template <typename T>
    const T& get(std::string_view key, const char* type_name) const;

    std::string name_;
    Metadata metadata_;
    std::vector<GgufTensor> tensors_;
    std::map<std::string, std::size_t, std::less<>> tensor_index_;
};

}  // namespace tinyllama
