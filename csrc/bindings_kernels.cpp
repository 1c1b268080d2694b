// The kernels on their own, for tests: each function packs, calls and hands back.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "bindings.h"
#include "gguf.h"
#include "hash.h"
#include "kernels/cpu.h"
#include "kv_cache.h"
#include "packing.h"
#include "status.h"

namespace py = pybind11;
using namespace tinyllama;

namespace {

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

std::string join_isas() {
    std::string names;
    for (const char* const* name = supported_isas(); *name != nullptr; ++name) {
        names += names.empty() ? *name : std::string(", ") + *name;
    }
    return names;
}

const KernelTable& kernels_named(const std::string& isa) {
    const KernelTable* kernels = find_kernels(isa.c_str());
    if (kernels == nullptr) {
        throw Error(Status::invalid_argument,
                    "isa is '" + isa + "'; this CPU can run: auto, " + join_isas());
    }
    return *kernels;
}

void require(bool condition, const char* message) {
    if (!condition) throw Error(Status::invalid_argument, message);
}

// Whole lines of 64 bytes, begun on one.
struct Lines {
    explicit Lines(std::int64_t n_bytes) : bytes_(static_cast<std::size_t>(n_bytes) + 63) {}
    std::uint8_t* data() {
        const auto begin = reinterpret_cast<std::uintptr_t>(bytes_.data());
        return bytes_.data() + (64 - begin % 64) % 64;
    }

private:
    std::vector<std::uint8_t> bytes_;
};

DType find_dtype(const std::string& name) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::q8_0, DType::q4_0}) {
        if (name == dtype_name(dtype)) return dtype;
    }
    throw Error(Status::invalid_argument, "dtype must be f32, bf16, q8_0 or q4_0");
}

struct Packed {
    Packed(const KernelTable& k, DType dtype, const py::array& weights, std::int64_t rows,
           std::int64_t cols)
        : n_panels((rows + panel_rows - 1) / panel_rows),
          panel_size(static_cast<std::int64_t>(panel_bytes(dtype, cols))),
          lines(n_panels * panel_size + panels_slack) {
        const auto n_bytes = static_cast<std::uint64_t>(weights.nbytes());
        require((weights.flags() & py::array::c_style) != 0, "weights must be contiguous");
        require(n_bytes == row_bytes(dtype, static_cast<std::uint64_t>(cols)) *
                               static_cast<std::uint64_t>(rows),
                "weights have the wrong size");
        pack_panels(k, dtype, static_cast<const std::uint8_t*>(weights.data()), rows, cols,
                    lines.data(), 0, n_panels);
        panels = {lines.data(), panel_size, rows, cols};
    }
    std::int64_t n_panels, panel_size;
    Lines lines;
    Panels panels;
};

struct Quantized {
    Quantized(const KernelTable& k, const float* x, std::int64_t n_tokens, std::int64_t n)
        : stride((n + 63) / 64 * 64),
          q(static_cast<std::size_t>(n_tokens * stride), std::int8_t{99}),
          scales(static_cast<std::size_t>(n_tokens * n_groups(n))),
          sums(static_cast<std::size_t>(n_tokens * n / block_size)) {
        for (std::int64_t t = 0; t < n_tokens; ++t) {
            k.quantize_q8(q.data() + t * stride, scales.data() + t * n_groups(n),
                          sums.data() + t * (n / block_size), x + t * n, n);
        }
    }
    ActsQ8 acts() const { return {q.data(), scales.data(), sums.data(), stride}; }
    std::int64_t stride;
    std::vector<std::int8_t> q;
    std::vector<float> scales;
    std::vector<std::int32_t> sums;
};

std::vector<std::uint16_t> rounded(const KernelTable& k, const float* x, std::int64_t n_tokens,
                                   std::int64_t n) {
    const std::int64_t stride = (n + block_size - 1) / block_size * block_size;
    std::vector<std::uint16_t> out(static_cast<std::size_t>(n_tokens * stride), 0x7fff);
    for (std::int64_t t = 0; t < n_tokens; ++t)
        k.round_bf16(out.data() + t * stride, x + t * n, n);
    return out;
}

// Panels [begin, end). A row has place for whole panels and begins as NaN, or where the products
// are added, as 1.
py::array_t<float> kernel_matmul(const std::string& isa, const std::string& dtype_text,
                                 const py::array& weights, std::int64_t rows, std::int64_t cols,
                                 const Array<float>& x, std::int64_t begin, std::int64_t end,
                                 bool add) {
    const KernelTable& k = kernels_named(isa);
    const bool q24 = dtype_text == "q24";
    const DType dtype = q24 ? DType::f32 : find_dtype(dtype_text);
    Packed w(k, dtype, weights, rows, cols);
    if (end < 0) end = w.n_panels;
    require(x.ndim() == 2 && x.shape(1) == cols, "x must be (n_tokens, cols)");
    require(0 <= begin && begin <= end && end <= w.n_panels, "begin and end count panels");
    const std::int64_t n_tokens = x.shape(0), width = w.n_panels * panel_rows;
    py::array_t<float> out({n_tokens, width});
    std::fill(out.mutable_data(), out.mutable_data() + out.size(),
              add ? 1.0f : std::numeric_limits<float>::quiet_NaN());
    const Output y = {out.mutable_data(), width, add};
    if (q24) {
        require(k.matmul_q24 != nullptr, "this set has no q24");
        const std::int64_t stride = (cols + 63) / 64 * 64;
        std::vector<std::int8_t> digits(static_cast<std::size_t>(3 * n_tokens * stride), 99);
        std::vector<float> scales(static_cast<std::size_t>(n_tokens * n_groups(cols)));
        for (std::int64_t t = 0; t < n_tokens; ++t) {
            k.quantize_q24(digits.data() + 3 * t * stride, scales.data() + t * n_groups(cols),
                           x.data() + t * cols, cols);
        }
        k.matmul_q24(y, w.panels, {digits.data(), scales.data(), stride}, n_tokens, begin, end);
    } else if (dtype == DType::f32) {
        k.matmul_f32(y, w.panels, x.data(), cols, n_tokens, begin, end);
    } else if (dtype == DType::bf16) {
        const std::vector<std::uint16_t> near = rounded(k, x.data(), n_tokens, cols);
        k.matmul_bf16(y, w.panels, near.data(), (cols + block_size - 1) / block_size * block_size,
                      n_tokens, begin, end);
    } else {
        const Quantized q(k, x.data(), n_tokens, cols);
        (dtype == DType::q8_0 ? k.matmul_q8_0 : k.matmul_q4_0)(y, w.panels, q.acts(), n_tokens,
                                                               begin, end);
    }
    return out;
}

py::array_t<float> kernel_unpack(const std::string& isa, const std::string& dtype,
                                 const py::array& weights, std::int64_t rows, std::int64_t cols) {
    const Packed w(kernels_named(isa), find_dtype(dtype), weights, rows, cols);
    py::array_t<float> out({rows, cols});
    for (std::int64_t row = 0; row < rows; ++row)
        unpack_row(find_dtype(dtype), w.panels, row, out.mutable_data() + row * cols);
    return out;
}

template <typename T>
py::array_t<T> to_array(const std::vector<T>& values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::tuple kernel_quantize_q8(const std::string& isa, const Array<float>& x) {
    require(x.size() % block_size == 0, "x must be whole blocks of 32");
    const Quantized q(kernels_named(isa), x.data(), 1, x.size());
    return py::make_tuple(to_array(q.q), to_array(q.scales), to_array(q.sums));
}

py::tuple kernel_hand_out(const std::string& isa, const Array<float>& x) {
    const auto n = static_cast<std::size_t>(x.size());
    std::vector<float> copy(n), maxima((n + weigh_block - 1) / weigh_block);
    const std::int32_t bits =
        kernels_named(isa).hand_out(copy.data(), maxima.data(), x.data(), x.size());
    return py::make_tuple(to_array(copy), to_array(maxima), bits);
}

py::array_t<std::uint16_t> kernel_round_bf16(const std::string& isa, const Array<float>& x) {
    return to_array(rounded(kernels_named(isa), x.data(), 1, x.size()));
}

py::array_t<float> kernel_unary(const std::string& isa, const std::string& name,
                                const py::args& arrays, float scalar) {
    const KernelTable& k = kernels_named(isa);
    std::vector<Array<float>> in;
    for (const py::handle& array : arrays)
        in.push_back(py::cast<Array<float>>(array));
    require(!in.empty(), "no input");
    py::array_t<float> out(std::vector<py::ssize_t>(in[0].shape(), in[0].shape() + in[0].ndim()));
    std::copy(in[0].data(), in[0].data() + in[0].size(), out.mutable_data());
    const std::int64_t n = in[0].size();
    if (name == "rms_norm") {
        require(in.size() == 2 && in[1].size() == n, "rms_norm takes x, weight");
        k.rms_norm(out.mutable_data(), in[0].data(), in[1].data(), n, scalar);
    } else if (name == "rope") {
        require(in.size() == 3 && in[0].ndim() == 2 && in[1].size() == in[0].shape(1) &&
                    in[2].size() == in[1].size(),
                "rope takes x (n_heads, head_dim), cos, sin");
        k.rope(out.mutable_data(), in[1].data(), in[2].data(), in[0].shape(0), in[0].shape(1));
    } else {
        require(name == "swiglu", "kernels are rms_norm, rope and swiglu");
        require(in.size() == 2 && in[1].size() == n, "swiglu takes gate, up");
        k.swiglu(out.mutable_data(), in[0].data(), in[1].data(), n);
    }
    return out;
}

py::tuple kernel_weigh(const std::string& isa, const Array<float>& x, float best, float scale) {
    require(x.size() % weigh_block == 0, "x must be whole blocks of 64");
    const std::int64_t n = x.size() / weigh_block;
    std::vector<float> weights(static_cast<std::size_t>(x.size()));
    std::vector<float> sums(static_cast<std::size_t>(n));
    kernels_named(isa).weigh(weights.data(), sums.data(), x.data(), n, best, scale);
    return py::make_tuple(to_array(weights), to_array(sums));
}

// Attention of one key head over positions stored one by one. Every other byte of the cache, of
// this head and of its neighbours, is 0xff, which as a float and as a scale is NaN.
py::array_t<float> kernel_attend(const std::string& isa, const std::string& kv_dtype,
                                 const Array<float>& q, const Array<std::int32_t>& n_positions,
                                 const Array<float>& k, const Array<float>& v) {
    const KernelTable& kernels = kernels_named(isa);
    require(q.ndim() == 2 && n_positions.ndim() == 1 && n_positions.size() == q.shape(0) &&
                q.shape(1) % 2 == 0,
            "q must be (n_queries, head_dim), head_dim even, n_positions (n_queries,)");
    require(k.ndim() == 2 && k.shape(1) == q.shape(1) && v.ndim() == 2 && v.size() == k.size() &&
                v.shape(1) == k.shape(1),
            "k and v must be (positions, head_dim)");
    const std::int64_t n = q.shape(0), head_dim = q.shape(1), n_stored = k.shape(0);
    const KvLayout layout{2, 3, head_dim, find_kv_type(kv_dtype)};
    KvCache cache(std::make_shared<KvPool>(layout));
    cache.reserve(0, static_cast<std::int32_t>(n_stored));
    const KvHead head = cache.head(1, 1);
    for (std::int64_t block = 0; block * kv_block < n_stored; ++block) {
        std::memset(head.blocks[block], 0xff,
                    static_cast<std::size_t>(cache.layout().block_bytes()));
    }
    for (std::int64_t pos = 0; pos < n_stored; ++pos)
        kernels.store_kv(head, pos, k.data() + pos * head_dim, v.data() + pos * head_dim);
    py::array_t<float> out({n, head_dim});
    std::vector<float*> outs;
    std::vector<const float*> queries;
    for (std::int64_t i = 0; i < n; ++i) {
        const std::int32_t seen = n_positions.data()[i];
        require(1 <= seen && seen <= n_stored, "n_positions must lie in [1, positions]");
        outs.push_back(out.mutable_data() + i * head_dim);
        queries.push_back(q.data() + i * head_dim);
    }
    kernels.attend(outs.data(), queries.data(), n_positions.data(), n, head);
    return out;
}

}  // namespace

void bind_kernels(py::module_& m) {
    m.def(
        "hash64",
        [](const std::string& data, std::uint64_t seed) {
            return hash64({reinterpret_cast<const std::uint8_t*>(data.data()), data.size()}, seed);
        },
        py::arg("data"), py::arg("seed") = 0);
    m.def("kernel_matmul", &kernel_matmul, py::arg("isa"), py::arg("dtype"), py::arg("weights"),
          py::arg("rows"), py::arg("cols"), py::arg("x"), py::arg("begin") = 0, py::arg("end") = -1,
          py::arg("add") = false);
    m.def("kernel_unpack", &kernel_unpack, py::arg("isa"), py::arg("dtype"), py::arg("weights"),
          py::arg("rows"), py::arg("cols"));
    m.def("kernel_quantize_q8", &kernel_quantize_q8, py::arg("isa"), py::arg("x"));
    m.def("kernel_hand_out", &kernel_hand_out, py::arg("isa"), py::arg("x"));
    m.def("kernel_round_bf16", &kernel_round_bf16, py::arg("isa"), py::arg("x"));
    m.def("kernel_weigh", &kernel_weigh, py::arg("isa"), py::arg("x"), py::arg("best"),
          py::arg("scale"));
    m.def("kernel_attend", &kernel_attend, py::arg("isa"), py::arg("kv_dtype"), py::arg("q"),
          py::arg("n_positions"), py::arg("k"), py::arg("v"));
    m.def("kernel_unary", &kernel_unary, py::arg("isa"), py::arg("name"), py::kw_only(),
          py::arg("scalar") = 0.0f);
}
