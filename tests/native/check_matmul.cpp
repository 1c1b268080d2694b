// Products of packed matrices: token by token and panel by panel on the generic set, which is held
// against float64; all at once on every set, which must give the same bits.
#include <memory>

#include "check.h"
#include "packing.h"
#include "weights.h"

namespace check {
namespace {

using namespace tinyllama;

bool in_blocks(DType dtype) { return dtype == DType::q8_0 || dtype == DType::q4_0; }

struct TestMatrix {
    DType dtype;
    std::vector<double> values;  // (rows, cols)
    std::unique_ptr<AlignedBytes> packed;
    Panels panels;
};

template <typename T>
void append(std::vector<std::uint8_t>* bytes, T value) {
    std::uint8_t raw[sizeof(T)];
    std::memcpy(raw, &value, sizeof(T));
    bytes->insert(bytes->end(), raw, raw + sizeof(T));
}

double from_f16(std::uint16_t x) {
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(mantissa + 1024, exponent - 25);
    return (x & 0x8000) != 0 ? -magnitude : magnitude;
}

// A block of 32 as the file holds it: any finite scale, any numbers.
void append_block(Random& random, DType dtype, std::vector<std::uint8_t>* bytes,
                  std::vector<double>* values) {
    const auto scale = static_cast<std::uint16_t>(random.below(0x7c00) | random.below(2) << 15);
    append(bytes, scale);
    int q[32];
    for (int& x : q) {
        x = dtype == DType::q8_0 ? static_cast<int>(random.below(256)) - 128
                                 : static_cast<int>(random.below(16)) - 8;
        values->push_back(from_f16(scale) * x);
    }
    for (int i = 0; i < (dtype == DType::q8_0 ? 32 : 16); ++i) {
        const int byte = dtype == DType::q8_0 ? q[i] : (q[i] + 8) + 16 * (q[i + 16] + 8);
        bytes->push_back(static_cast<std::uint8_t>(byte));
    }
}

// Blocks of 32 become groups of 1,024: every set makes the same, and each value is rounded once.
void compare_regrouped(Run& run, const std::vector<std::uint8_t>& bytes, TestMatrix* w) {
    const Panels& panels = w->panels;
    const std::int64_t n_panels = (panels.rows + panel_rows - 1) / panel_rows;
    const std::vector<std::uint8_t> want(panels.data, panels.data + n_panels * panels.panel_bytes);
    AlignedBytes again(want.size());
    for (const KernelTable* set : run.sets) {
        pack_panels(*set, w->dtype, bytes.data(), panels.rows, panels.cols, again.data(), 0,
                    n_panels);
        run.expect_same(std::string(set->name) + " regroup_q8_0",
                        std::vector<std::uint8_t>(again.data(), again.data() + want.size()), want);
    }
    std::vector<float> row(size(panels.cols));
    for (std::int64_t r = 0; r < panels.rows; ++r) {
        double* const values = w->values.data() + r * panels.cols;
        unpack_row(w->dtype, panels, r, row.data());
        for (std::int64_t begin = 0; begin < panels.cols; begin += group_size) {
            const std::int64_t end = std::min(begin + group_size, panels.cols);
            double largest = 0.0;
            for (std::int64_t i = begin; i < end; ++i)
                largest = std::max(largest, std::fabs(values[i]));
            for (std::int64_t i = begin; i < end; ++i) {
                const auto got = static_cast<double>(row[size(i)]);
                run.expect_near("regroup_q8_0", size(r * panels.cols + i), got, values[i],
                                largest / 127 * (0.5 + 127 * 4 * u));
                values[i] = got;
            }
        }
    }
}

TestMatrix draw_matrix(Run& run, Random& random, DType dtype, Kind kind, std::int64_t rows,
                       std::int64_t cols) {
    std::vector<std::uint8_t> bytes;
    TestMatrix result{dtype, {}, nullptr, {}};
    while (result.values.size() < size(rows * cols)) {
        if (in_blocks(dtype)) {
            append_block(random, dtype, &bytes, &result.values);
            continue;
        }
        const float x = draw(random, kind);
        std::uint32_t bits;
        std::memcpy(&bits, &x, sizeof(bits));
        if (dtype == DType::f32) {
            append(&bytes, bits);
            result.values.push_back(static_cast<double>(x));
        } else {
            append(&bytes, static_cast<std::uint16_t>(bits >> 16));
            result.values.push_back(from_bf16(static_cast<std::uint16_t>(bits >> 16)));
        }
    }
    const std::int64_t n_panels = (rows + panel_rows - 1) / panel_rows;
    const std::size_t panel_size = panel_bytes(dtype, cols);
    result.packed = std::make_unique<AlignedBytes>(panel_size * size(n_panels) + panels_slack);
    pack_panels(*run.generic, dtype, bytes.data(), rows, cols, result.packed->data(), 0, n_panels);
    result.panels = {result.packed->data(), static_cast<std::int64_t>(panel_size), rows, cols};
    if (dtype == DType::q8_0) compare_regrouped(run, bytes, &result);
    return result;
}

// Activations (n_tokens, cols) in the form that a matrix of this type asks for.
struct TestActs {
    DType dtype;
    std::int64_t cols, padded;
    std::vector<float> x;
    std::vector<std::uint16_t> bf16;
    std::vector<std::int8_t> q;
    std::vector<float> scales;
    std::vector<std::int32_t> sums;

    TestActs(const Run& run, Random& random, DType type, Kind kind, std::int64_t n_tokens,
             std::int64_t n_cols)
        : dtype(type),
          cols(n_cols),
          padded((n_cols + 63) / 64 * 64),
          x(draws(random, kind, n_tokens * n_cols)),
          bf16(size(dtype == DType::bf16 ? n_tokens * padded : 0)),
          q(size(in_blocks(dtype) ? n_tokens * padded : 0)),
          scales(size(n_tokens * n_groups(cols))),
          sums(size(n_tokens * cols / 32)) {
        for (std::int64_t t = 0; t < n_tokens; ++t) {
            const float* const row = x.data() + t * cols;
            if (dtype == DType::bf16) {
                run.generic->round_bf16(bf16.data() + t * padded, row, cols);
            } else if (in_blocks(dtype)) {
                run.generic->quantize_q8(q.data() + t * padded, scales.data() + t * n_groups(cols),
                                         sums.data() + t * cols / 32, row, cols);
            }
        }
    }

    double value(std::int64_t t, std::int64_t i) const {
        if (dtype == DType::f32) return static_cast<double>(x[size(t * cols + i)]);
        if (dtype == DType::bf16) return from_bf16(bf16[size(t * padded + i)]);
        const float scale = scales[size(t * n_groups(cols) + i / group_size)];
        return static_cast<double>(scale) * q[size(t * padded + i)];
    }
};

// Tokens [t, t + n) by panels [begin, end).
void multiply(const KernelTable& kernels, const TestMatrix& w, const TestActs& x, Output y,
              std::int64_t t, std::int64_t n, std::int64_t begin, std::int64_t end) {
    y.y += t * y.stride;
    if (w.dtype == DType::f32) {
        kernels.matmul_f32(y, w.panels, x.x.data() + t * x.cols, x.cols, n, begin, end);
    } else if (w.dtype == DType::bf16) {
        kernels.matmul_bf16(y, w.panels, x.bf16.data() + t * x.padded, x.padded, n, begin, end);
    } else {
        const ActsQ8 acts{x.q.data() + t * x.padded, x.scales.data() + t * n_groups(x.cols),
                          x.sums.data() + t * x.cols / 32, x.padded};
        const auto matmul = w.dtype == DType::q8_0 ? kernels.matmul_q8_0 : kernels.matmul_q4_0;
        matmul(y, w.panels, acts, n, begin, end);
    }
}

// The roundings that follow one another in a sum, each of at most u of the sum of magnitudes; and
// what may be lost where a product falls below the normal numbers.
double bound(DType dtype, std::int64_t cols, double magnitudes) {
    const std::int64_t blocks = (cols + 31) / 32, groups = n_groups(cols);
    const std::int64_t chain = dtype == DType::f32    ? cols
                               : dtype == DType::bf16 ? 16 + 1 + blocks
                               : dtype == DType::q8_0 ? 1 + groups
                                                      : 17 + groups;
    const double growth = static_cast<double>(chain + 1) * u;  // and the sum with what was there
    return growth / (1 - growth) * magnitudes + static_cast<double>(cols) * smallest;
}

struct Case {
    DType dtype;
    Kind kind;
    std::int64_t rows, cols, n_tokens, stride, begin, end;
    bool add;
};

Case draw_case(Random& random, DType dtype, Kind kind, bool large) {
    Case c{};
    c.dtype = dtype;
    c.kind = kind;
    c.rows = 1 + below(random, large ? 20 : 150);
    c.cols = 1 + below(random, large ? 2300 : 200);
    if (in_blocks(dtype)) c.cols = (c.cols + 31) / 32 * 32;
    c.n_tokens = 1 + below(random, large ? 70 : 20);
    c.stride = c.rows + below(random, 20);
    const std::int64_t n_panels = (c.rows + panel_rows - 1) / panel_rows;
    c.begin = below(random, n_panels);
    c.end = c.begin + 1 + below(random, n_panels - c.begin);
    c.add = random.one_in(2);
    return c;
}

void compare_with_float64(Run& run, const Case& c, const TestMatrix& w, const TestActs& x,
                          const std::vector<float>& before, const std::vector<float>& after) {
    for (std::int64_t i = 0; i < c.n_tokens * c.stride; ++i) {
        const std::int64_t t = i / c.stride, row = i % c.stride, panel = row / panel_rows;
        const bool written = row < c.rows && panel >= c.begin && panel < c.end;
        double sum = written && !c.add ? 0.0 : static_cast<double>(before[size(i)]);
        double magnitudes = std::fabs(sum);
        for (std::int64_t col = 0; written && col < c.cols; ++col) {
            const double product = w.values[size(row * c.cols + col)] * x.value(t, col);
            sum += product;
            magnitudes += std::fabs(product);
        }
        run.expect_near(std::string("matmul ") + dtype_name(c.dtype), size(i),
                        static_cast<double>(after[size(i)]), sum,
                        written ? bound(c.dtype, c.cols, magnitudes) : 0.0);
    }
}

void check_matmul(Run& run, Random& random, const Case& c) {
    const TestMatrix w = draw_matrix(run, random, c.dtype, c.kind, c.rows, c.cols);
    const TestActs x(run, random, c.dtype, c.kind, c.n_tokens, c.cols);
    const std::vector<float> before = draws(random, c.kind, c.n_tokens * c.stride);
    std::vector<float> want = before;
    for (std::int64_t t = 0; t < c.n_tokens; ++t) {
        for (std::int64_t panel = c.begin; panel < c.end; ++panel) {
            multiply(*run.generic, w, x, {want.data(), c.stride, c.add}, t, 1, panel, panel + 1);
        }
    }
    run.note(want);
    if (c.kind == Kind::plain) compare_with_float64(run, c, w, x, before, want);
    for (const KernelTable* set : run.sets) {
        std::vector<float> got = before;
        multiply(*set, w, x, {got.data(), c.stride, c.add}, 0, c.n_tokens, c.begin, c.end);
        run.expect_same(std::string(set->name) + " matmul " + dtype_name(c.dtype), got, want);
    }
}

// Panels of f32 as whole numbers of 24 bits, on the sets that do that: near float64, and the same
// bits token by token and panel by panel.
void check_q24(Run& run, Random& random, const Case& c) {
    const TestMatrix w = draw_matrix(run, random, DType::f32, c.kind, c.rows, c.cols);
    const std::vector<float> x = draws(random, c.kind, c.n_tokens * c.cols);
    const std::vector<float> before = draws(random, c.kind, c.n_tokens * c.stride);
    const std::int64_t padded = (c.cols + 63) / 64 * 64, groups = n_groups(c.cols);
    for (const KernelTable* set : run.sets) {
        if (set->matmul_q24 == nullptr) continue;
        std::vector<std::int8_t> digits(size(3 * c.n_tokens * padded), std::int8_t{99});
        std::vector<float> scales(size(c.n_tokens * groups));
        for (std::int64_t t = 0; t < c.n_tokens; ++t) {
            set->quantize_q24(digits.data() + 3 * t * padded, scales.data() + t * groups,
                              x.data() + t * c.cols, c.cols);
        }
        std::vector<float> want = before, got = before;
        for (std::int64_t t = 0; t < c.n_tokens; ++t) {
            const ActsQ24 one = {digits.data() + 3 * t * padded, scales.data() + t * groups,
                                 padded};
            const Output y = {want.data() + t * c.stride, c.stride, c.add};
            for (std::int64_t panel = c.begin; panel < c.end; ++panel)
                set->matmul_q24(y, w.panels, one, 1, panel, panel + 1);
        }
        set->matmul_q24({got.data(), c.stride, c.add}, w.panels,
                        {digits.data(), scales.data(), padded}, c.n_tokens, c.begin, c.end);
        run.expect_same(std::string(set->name) + " matmul q24", got, want);
        if (c.kind == Kind::wild) continue;
        for (std::int64_t i = 0; i < c.n_tokens * c.stride; ++i) {
            const std::int64_t t = i / c.stride, row = i % c.stride, panel = row / panel_rows;
            const bool written = row < c.rows && panel >= c.begin && panel < c.end;
            double sum = written && !c.add ? 0.0 : static_cast<double>(before[size(i)]);
            double allowed = 8 * u * std::fabs(sum);
            for (std::int64_t first = 0; written && first < c.cols; first += group_size) {
                const std::int64_t end = std::min(first + group_size, c.cols);
                double part = 0.0, magnitudes = 0.0, largest_x = 0.0, largest_w = 0.0;
                for (std::int64_t col = first; col < end; ++col) {
                    const double a = static_cast<double>(x[size(t * c.cols + col)]);
                    const double b = w.values[size(row * c.cols + col)];
                    part += a * b;
                    magnitudes += std::fabs(a * b);
                    largest_x = std::max(largest_x, std::fabs(a));
                    largest_w = std::max(largest_w, std::fabs(b));
                }
                sum += part;
                // What is rounded off and left out, and what is too small for a scale.
                allowed += 16 * u * magnitudes + static_cast<double>(end - first) *
                                                     (0x1p-22 * largest_x * largest_w + smallest +
                                                      127 * smallest * (largest_x + largest_w));
            }
            run.expect_near(std::string(set->name) + " matmul q24", size(i),
                            static_cast<double>(got[size(i)]), sum, written ? allowed : 0.0);
        }
    }
}

}  // namespace

void check_matmuls(Run& run, Random& random) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::q8_0, DType::q4_0}) {
        for (int i = 0; i < 90; ++i) {
            const Kind kind = i % 3 == 0 ? Kind::plain : i % 3 == 1 ? Kind::tiny : Kind::wild;
            check_matmul(run, random, draw_case(random, dtype, kind, i % 15 == 0));
        }
    }
    for (int i = 0; i < 90; ++i) {
        const Kind kind = i % 3 == 0 ? Kind::plain : i % 3 == 1 ? Kind::tiny : Kind::wild;
        check_q24(run, random, draw_case(random, DType::f32, kind, i % 15 == 0));
    }
}

}  // namespace check
