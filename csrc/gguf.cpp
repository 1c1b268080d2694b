#include "gguf.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "byte_reader.h"
#include "utf8.h"

namespace tinyllama {

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "GGUF is read in place: little-endian");

namespace {

constexpr std::uint64_t max_entries = 65536;  // of metadata, and of tensors
constexpr std::uint64_t max_key_bytes = 65535;
constexpr std::uint64_t max_name_bytes = 1024;
constexpr std::uint64_t max_alignment = 1 << 20;

enum class ValueType : std::uint32_t {
    u8 = 0,
    i8 = 1,
    u16 = 2,
    i16 = 3,
    u32 = 4,
    i32 = 5,
    f32 = 6,
    boolean = 7,
    string = 8,
    array = 9,
    u64 = 10,
    i64 = 11,
    f64 = 12,
};

// Bytes a value of this type takes at least; 0 for a type that does not exist.
std::uint64_t least_bytes(ValueType type) {
    switch (type) {
        case ValueType::u8:
        case ValueType::i8:
        case ValueType::boolean:
            return 1;
        case ValueType::u16:
        case ValueType::i16:
            return 2;
        case ValueType::u32:
        case ValueType::i32:
        case ValueType::f32:
            return 4;
        case ValueType::u64:
        case ValueType::i64:
        case ValueType::f64:
            return 8;
        case ValueType::string:
            return 8;
        case ValueType::array:
            return 12;
    }
    return 0;
}

template <typename Item, typename Read>
std::vector<Item> read_items(std::uint64_t count, Read read) {
    std::vector<Item> items;
    items.reserve(static_cast<std::size_t>(count));
    for (std::uint64_t i = 0; i < count; ++i)
        items.emplace_back(read());
    return items;
}

std::int64_t read_int(ByteReader& reader, ValueType type, const char* what) {
    switch (type) {
        case ValueType::u8:
            return reader.number<std::uint8_t>(what);
        case ValueType::i8:
            return reader.number<std::int8_t>(what);
        case ValueType::u16:
            return reader.number<std::uint16_t>(what);
        case ValueType::i16:
            return reader.number<std::int16_t>(what);
        case ValueType::u32:
            return reader.number<std::uint32_t>(what);
        case ValueType::i32:
            return reader.number<std::int32_t>(what);
        case ValueType::boolean:
            return reader.boolean(what) ? 1 : 0;
        default:
            return reader.number<std::int64_t>(what);
    }
}

double read_float(ByteReader& reader, ValueType type, const char* what) {
    return type == ValueType::f32 ? static_cast<double>(reader.number<float>(what))
                                  : reader.number<double>(what);
}

GgufValue read_array(ByteReader& reader) {
    const auto type = ValueType{reader.number<std::uint32_t>("array type")};
    const auto count = reader.number<std::uint64_t>("array length");
    const std::uint64_t item_bytes = least_bytes(type);
    if (item_bytes == 0) {
        reader.fail(reader.about("array type") + " is " +
                    std::to_string(static_cast<std::uint32_t>(type)) + "; GGUF knows 0 to 12");
    }
    if (type == ValueType::array) reader.fail(reader.about("value") + " is an array of arrays");
    reader.check_count(count, item_bytes, "array length");
    const char* what = "array item";
    switch (type) {
        case ValueType::string:
            return GgufStrings{read_items<std::string>(count, [&] { return reader.string(what); })};
        case ValueType::f32:
        case ValueType::f64:
            return GgufFloats{
                read_items<double>(count, [&] { return read_float(reader, type, what); })};
        default:
            return GgufInts{read_items<std::int64_t>(count, [&] {
                const std::int64_t value = read_int(reader, type, what);
                if (type == ValueType::u64 && value < 0) {
                    reader.fail(reader.about(what) + " is above 2^63");
                }
                return value;
            })};
    }
}

GgufValue read_value(ByteReader& reader) {
    const auto type = ValueType{reader.number<std::uint32_t>("value type")};
    switch (type) {
        case ValueType::boolean:
            return reader.boolean("value");
        case ValueType::string:
            return std::string(reader.string("value"));
        case ValueType::array:
            return read_array(reader);
        case ValueType::f32:
        case ValueType::f64:
            return read_float(reader, type, "value");
        case ValueType::u64: {
            const auto value = reader.number<std::uint64_t>("value");
            if (value > std::uint64_t{std::numeric_limits<std::int64_t>::max()}) return value;
            return static_cast<std::int64_t>(value);
        }
        default:
            break;
    }
    if (least_bytes(type) == 0) {
        reader.fail(reader.about("value type") + " is " +
                    std::to_string(static_cast<std::uint32_t>(type)) + "; GGUF knows 0 to 12");
    }
    return read_int(reader, type, "value");
}

std::string_view read_name(ByteReader& reader, const char* what, std::uint64_t limit) {
    const std::string_view name = reader.string(what, limit);
    if (name.empty()) reader.fail(reader.about(what) + " is empty");
    if (!is_utf8(name)) reader.fail(reader.about(what) + " is not UTF-8: " + quoted(name));
    return name;
}

GgufFile::Metadata read_metadata(ByteReader& reader, std::uint64_t count) {
    GgufFile::Metadata metadata;
    for (std::uint64_t i = 0; i < count; ++i) {
        const std::string ordinal = std::to_string(i);
        reader.set_subject("metadata entry", ordinal);
        const std::string_view key = read_name(reader, "key", max_key_bytes);
        if (metadata.find(key) != metadata.end()) {
            reader.fail("metadata key " + quoted(key) + " appears twice");
        }
        reader.set_subject("metadata key", key);
        metadata.emplace(std::string(key), read_value(reader));
    }
    return metadata;
}

// What a tensor's entry says; its bytes are looked for once all entries are read.
struct Entry {
    GgufTensor tensor;
    std::uint64_t offset = 0;
    std::uint64_t n_bytes = 0;
};

void read_shape(ByteReader& reader, GgufTensor* tensor) {
    const auto n_dims = reader.number<std::uint32_t>("number of dimensions");
    if (n_dims < 1 || n_dims > 4) {
        reader.fail(reader.about("number of dimensions") + " is " + std::to_string(n_dims) +
                    "; it must be 1 to 4");
    }
    std::uint64_t dims[4] = {1, 1, 1, 1};
    for (std::uint32_t i = 0; i < n_dims; ++i) {
        dims[i] = reader.number<std::uint64_t>("dimension");
        if (dims[i] == 0) reader.fail(reader.about("dimension " + std::to_string(i)) + " is 0");
    }
    if (dims[2] != 1 || dims[3] != 1) {
        reader.fail(reader.about("number of dimensions") + " is " + std::to_string(n_dims) +
                    "; only vectors and matrices are known");
    }
    tensor->n_dims = n_dims == 1 ? 1 : 2;
    tensor->cols = dims[0];
    tensor->rows = dims[1];
}

DType read_dtype(ByteReader& reader) {
    const auto number = reader.number<std::uint32_t>("type");
    for (const DType dtype : {DType::f32, DType::f16, DType::q4_0, DType::q8_0, DType::bf16}) {
        if (number == static_cast<std::uint32_t>(dtype)) return dtype;
    }
    reader.fail(reader.about("type") + " is ggml type " + std::to_string(number) +
                "; known are f32 (0), f16 (1), q4_0 (2), q8_0 (8) and bf16 (30)");
}

Entry read_entry(ByteReader& reader, std::uint64_t alignment) {
    Entry entry;
    GgufTensor& tensor = entry.tensor;
    const std::string_view name = read_name(reader, "name", max_name_bytes);
    tensor.name = name;
    reader.set_subject("tensor", name);
    read_shape(reader, &tensor);
    tensor.dtype = read_dtype(reader);
    entry.offset = reader.number<std::uint64_t>("offset");
    const bool in_blocks = tensor.dtype == DType::q4_0 || tensor.dtype == DType::q8_0;
    if (in_blocks && tensor.cols % 32 != 0) {
        reader.fail(reader.about("row length") + " is " + std::to_string(tensor.cols) + "; " +
                    dtype_name(tensor.dtype) + " needs a multiple of 32");
    }
    const std::uint64_t row = row_bytes(tensor.dtype, tensor.cols);
    if (row == 0 || !checked_mul(row, tensor.rows, &entry.n_bytes)) {
        reader.fail(reader.about("size") + " overflows: " + std::to_string(tensor.rows) + " x " +
                    std::to_string(tensor.cols) + " values");
    }
    if (entry.offset % alignment != 0) {
        reader.fail(reader.about("offset") + " is " + std::to_string(entry.offset) +
                    ", not a multiple of the alignment " + std::to_string(alignment));
    }
    return entry;
}

// Gives every tensor its bytes. In order of offset, tensors must follow one another with nothing
// between them but padding to the alignment, as every writer of GGUF lays them out.
void place_tensors(const ByteReader& reader, ByteSpan bytes, std::uint64_t alignment,
                   std::vector<Entry>* entries) {
    std::vector<Entry*> by_offset;
    by_offset.reserve(entries->size());
    for (Entry& entry : *entries)
        by_offset.push_back(&entry);
    std::stable_sort(by_offset.begin(), by_offset.end(),
                     [](const Entry* a, const Entry* b) { return a->offset < b->offset; });

    const std::uint64_t padding = (alignment - reader.pos() % alignment) % alignment;
    const std::uint64_t start = reader.pos() + padding;
    std::uint64_t expected = 0;
    for (Entry* entry : by_offset) {
        const std::string name = "tensor " + quoted(entry->tensor.name);
        if (entry->offset != expected) {
            reader.fail(name + " begins at offset " + std::to_string(entry->offset) + ", " +
                        (entry->offset < expected ? "inside the tensor before it"
                                                  : "after a gap that belongs to no tensor") +
                        ": expected " + std::to_string(expected));
        }
        std::uint64_t begin = 0;
        std::uint64_t end = 0;
        if (!checked_add(start, entry->offset, &begin) ||
            !checked_add(begin, entry->n_bytes, &end) || end > bytes.size) {
            reader.fail("truncated: " + name + " needs " + std::to_string(entry->n_bytes) +
                        " bytes from byte " + std::to_string(start) + " + " +
                        std::to_string(entry->offset) + ", but the file ends at byte " +
                        std::to_string(bytes.size));
        }
        entry->tensor.bytes = {bytes.data + begin, static_cast<std::size_t>(entry->n_bytes)};
        // No overflow: the sum without the padding is at most the file's size.
        expected = (entry->offset + entry->n_bytes + alignment - 1) / alignment * alignment;
    }
}

}  // namespace

const char* dtype_name(DType dtype) {
    switch (dtype) {
        case DType::f32:
            return "f32";
        case DType::f16:
            return "f16";
        case DType::q4_0:
            return "q4_0";
        case DType::q8_0:
            return "q8_0";
        case DType::bf16:
            return "bf16";
    }
    return "unknown";
}

std::uint64_t row_bytes(DType dtype, std::uint64_t cols) {
    constexpr std::uint64_t block = 32;       // values of q4_0 and q8_0 that share an f16 scale
    constexpr std::uint64_t q4_0_bytes = 18;  // the scale and 32 numbers of 4 bits
    constexpr std::uint64_t q8_0_bytes = 34;  // the scale and 32 int8
    std::uint64_t result = 0;
    bool fits = false;
    switch (dtype) {
        case DType::f32:
            fits = checked_mul(cols, 4, &result);
            break;
        case DType::f16:
        case DType::bf16:
            fits = checked_mul(cols, 2, &result);
            break;
        case DType::q4_0:
            fits = cols % block == 0 && checked_mul(cols / block, q4_0_bytes, &result);
            break;
        case DType::q8_0:
            fits = cols % block == 0 && checked_mul(cols / block, q8_0_bytes, &result);
            break;
    }
    return fits ? result : 0;
}

GgufFile GgufFile::parse(ByteSpan bytes, const std::string& name) {
    ByteReader reader(bytes, name);
    const std::string_view magic = reader.take(4, "magic");
    if (magic != "GGUF") reader.fail("not a GGUF file: it begins with " + quoted(magic));
    const auto version = reader.number<std::uint32_t>("version");
    if (version == 0x02000000 || version == 0x03000000) {
        reader.fail("a big-endian GGUF file; only little-endian ones can be read");
    }
    if (version != 2 && version != 3) {
        reader.fail("GGUF version " + std::to_string(version) + "; known are 2 and 3");
    }
    const auto n_tensors = reader.number<std::uint64_t>("tensor count");
    const auto n_metadata = reader.number<std::uint64_t>("metadata count");
    if (n_tensors > max_entries || n_metadata > max_entries) {
        reader.fail("the header claims " + std::to_string(n_tensors) + " tensors and " +
                    std::to_string(n_metadata) + " metadata entries; at most " +
                    std::to_string(max_entries) + " of each are allowed");
    }

    GgufFile file;
    file.name_ = name;
    file.metadata_ = read_metadata(reader, n_metadata);
    const std::int64_t alignment =
        file.has("general.alignment") ? file.get_int("general.alignment") : 32;
    if (alignment < 1 || alignment > static_cast<std::int64_t>(max_alignment) ||
        (alignment & (alignment - 1)) != 0) {
        reader.fail("general.alignment is " + std::to_string(alignment) +
                    "; it must be a power of two up to " + std::to_string(max_alignment));
    }

    std::vector<Entry> entries;
    for (std::uint64_t i = 0; i < n_tensors; ++i) {
        const std::string ordinal = std::to_string(i);
        reader.set_subject("tensor entry", ordinal);
        entries.push_back(read_entry(reader, static_cast<std::uint64_t>(alignment)));
        const std::string& tensor_name = entries.back().tensor.name;
        if (!file.tensor_index_.emplace(tensor_name, i).second) {
            reader.fail("tensor " + quoted(tensor_name) + " appears twice");
        }
    }
    place_tensors(reader, bytes, static_cast<std::uint64_t>(alignment), &entries);
    file.tensors_.reserve(entries.size());
    for (Entry& entry : entries)
        file.tensors_.push_back(std::move(entry.tensor));
    return file;
}

template <typename T>
const T& GgufFile::get(std::string_view key, const char* type_name) const {
    const auto found = metadata_.find(key);
    if (found == metadata_.end()) {
        throw Error(Status::format_error, name_ + ": metadata key " + quoted(key) + " is missing");
    }
    const T* value = std::get_if<T>(&found->second);
    if (value == nullptr) {
        throw Error(Status::format_error,
                    name_ + ": metadata key " + quoted(key) + " is not " + type_name);
    }
    return *value;
}

std::int64_t GgufFile::get_int(std::string_view key) const {
    return get<std::int64_t>(key, "an integer below 2^63");
}
double GgufFile::get_float(std::string_view key) const { return get<double>(key, "a float"); }
bool GgufFile::get_bool(std::string_view key) const { return get<bool>(key, "a bool"); }
const std::string& GgufFile::get_string(std::string_view key) const {
    return get<std::string>(key, "a string");
}
const std::vector<std::string>& GgufFile::get_strings(std::string_view key) const {
    return get<GgufStrings>(key, "an array of strings").items;
}
const std::vector<double>& GgufFile::get_floats(std::string_view key) const {
    return get<GgufFloats>(key, "an array of floats").items;
}
const std::vector<std::int64_t>& GgufFile::get_ints(std::string_view key) const {
    return get<GgufInts>(key, "an array of integers").items;
}

const GgufTensor* GgufFile::find_tensor(std::string_view name) const {
    const auto found = tensor_index_.find(name);
    return found == tensor_index_.end() ? nullptr : &tensors_[found->second];
}

}  // namespace tinyllama
