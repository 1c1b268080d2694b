// Keys and values in blocks, and attention over them: query by query on the generic set, which is
// held against float64; all at once on every set, which must give the same bits.
#include <algorithm>

#include "check.h"
#include "kv_cache.h"

namespace check {
namespace {

using namespace tinyllama;

// The second of two key heads, so that it does not begin where the block does.
struct TestHead {
    KvCache cache;
    KvHead head;
    std::int64_t n_blocks;

    TestHead(KvType type, std::int64_t head_dim, std::int32_t n_positions)
        : cache(std::make_shared<KvPool>(KvLayout{1, 2, head_dim, type})),
          n_blocks((n_positions + kv_block - 1) / kv_block) {
        cache.reserve(0, n_positions);
        head = cache.head(0, 1);
        for (std::int64_t b = 0; b < n_blocks; ++b)
            std::memset(head.blocks[b], 0x11, size(cache.layout().block_bytes()));
    }

    std::vector<std::uint8_t> bytes() const {
        std::vector<std::uint8_t> all;
        for (std::int64_t b = 0; b < n_blocks; ++b)
            all.insert(all.end(), head.blocks[b], head.blocks[b] + cache.layout().block_bytes());
        return all;
    }

    // Element d of the key or the value of a position, read as kernel_table.h lays it out.
    double element(bool value, std::int64_t pos, std::int64_t d) const {
        const std::uint8_t* part = head.blocks[pos / kv_block] + head.offset;
        const std::int64_t n = head.type == KvType::f32 ? 1 : head.type == KvType::bf16 ? 2 : 4;
        const std::int64_t at = pos % kv_block, width = (head.head_dim + 15) / 16 * 16;
        const std::int64_t columns = (head.head_dim + n - 1) / n * n;
        const std::int64_t i = value
                                   ? columns * kv_block + at / n * n * width + d * n + at % n
                                   : at / 16 * 16 * columns + d / n * 16 * n + at % 16 * n + d % n;
        if (head.type == KvType::f32) return read<float>(part, i);
        if (head.type == KvType::bf16) {
            std::uint16_t bits;
            std::memcpy(&bits, part + 2 * i, sizeof(bits));
            return from_bf16(bits);
        }
        return scale(value, pos) * read<std::int8_t>(part + 2 * kv_block * 4, i);
    }

    // Of int8.
    double scale(bool value, std::int64_t pos) const {
        const std::uint8_t* part = head.blocks[pos / kv_block] + head.offset;
        return read<float>(part, pos % kv_block + (value ? kv_block : 0));
    }

    template <typename T>
    static double read(const std::uint8_t* at, std::int64_t i) {
        T x;
        std::memcpy(&x, at + i * static_cast<std::int64_t>(sizeof(T)), sizeof(T));
        return static_cast<double>(x);
    }
};

struct Case {
    Kind kind;
    KvType type;
    std::int64_t head_dim;
    std::int32_t n_positions;
    std::vector<float> keys, values, queries;  // (n, head_dim)
    std::vector<std::int32_t> ends;            // one for each query
};

Case draw_case(Random& random, KvType type, Kind kind) {
    Case c{kind, type, 2 * (1 + below(random, 70)), 0, {}, {}, {}, {}};
    c.n_positions = static_cast<std::int32_t>(1 + random.below(random.one_in(2) ? 400 : 40));
    c.keys = draws(random, kind, c.n_positions * c.head_dim);
    c.values = draws(random, kind, c.n_positions * c.head_dim);
    c.ends.resize(1 + random.below(40));
    for (std::int32_t& end : c.ends)
        end = static_cast<std::int32_t>(1 + random.below(size(c.n_positions)));
    c.queries = draws(random, kind, static_cast<std::int64_t>(c.ends.size()) * c.head_dim);
    return c;
}

void store(const KernelTable& kernels, const Case& c, const TestHead& to) {
    for (std::int32_t pos = 0; pos < c.n_positions; ++pos) {
        kernels.store_kv(to.head, pos, c.keys.data() + pos * c.head_dim,
                         c.values.data() + pos * c.head_dim);
    }
}

// Queries [begin, end).
void attend(const KernelTable& kernels, const Case& c, const TestHead& head, std::size_t begin,
            std::size_t end, std::vector<float>* out) {
    std::vector<float*> outs;
    std::vector<const float*> queries;
    for (std::size_t i = begin; i < end; ++i) {
        outs.push_back(out->data() + i * size(c.head_dim));
        queries.push_back(c.queries.data() + i * size(c.head_dim));
    }
    kernels.attend(outs.data(), queries.data(), c.ends.data() + begin,
                   static_cast<std::int64_t>(end - begin), head.head);
}

// What is stored lies within half a step of what was given.
void compare_stored(Run& run, const Case& c, const TestHead& head) {
    for (std::int64_t i = 0; i < c.n_positions * c.head_dim; ++i) {
        const std::int64_t pos = i / c.head_dim;
        for (const bool value : {false, true}) {
            const float* const row = (value ? c.values : c.keys).data() + pos * c.head_dim;
            double largest = 0.0;
            for (std::int64_t d = 0; d < c.head_dim; ++d)
                largest = std::max(largest, std::fabs(static_cast<double>(row[d])));
            const double given = static_cast<double>(row[i % c.head_dim]);
            const double bound = c.type == KvType::f32    ? 0.0
                                 : c.type == KvType::bf16 ? std::fabs(given) * 0x1p-8
                                                          : largest / 127 * (0.5 + 127 * 4 * u);
            run.expect_near("store_kv", size(i), head.element(value, pos, i % c.head_dim), given,
                            bound);
        }
    }
}

// A query as bf16 or int8 hold it, where keys and values are of such.
std::vector<double> as_attended(Run& run, const Case& c, std::size_t query) {
    const float* const q = c.queries.data() + query * size(c.head_dim);
    std::vector<double> result(q, q + c.head_dim);
    if (c.type == KvType::bf16) {
        std::vector<std::uint16_t> near(size((c.head_dim + 31) / 32 * 32));
        run.generic->round_bf16(near.data(), q, c.head_dim);
        std::transform(near.begin(), near.begin() + c.head_dim, result.begin(), from_bf16);
    } else if (c.type == KvType::int8) {
        float largest = 0.0f;
        for (std::int64_t d = 0; d < c.head_dim; ++d)
            largest = std::max(largest, std::fabs(q[d]));
        const float scale = largest / 127.0f, inverse = 1.0f / scale;
        for (std::int64_t d = 0; d < c.head_dim; ++d)
            result[size(d)] = static_cast<double>(scale) * std::nearbyint(q[d] * inverse);
    }
    return result;
}

// By how much rounding the weights of each span to 127 steps can change an element of the result.
double lost_in_steps(const Case& c, const TestHead& head, const std::vector<double>& weights,
                     std::int64_t d) {
    if (c.type != KvType::int8) return 0.0;
    double lost = 0.0;
    const auto n = static_cast<std::int64_t>(weights.size());
    for (std::int64_t start = 0; start < n; start += 128) {
        double largest = 0.0, bytes = 0.0;
        for (std::int64_t pos = start; pos < std::min(start + 128, n); ++pos) {
            const double scale = head.scale(true, pos);
            largest = std::max(largest, weights[size(pos)] * scale);
            bytes += scale == 0.0 ? 0.0 : std::fabs(head.element(true, pos, d)) / scale;
        }
        lost += largest / 127 * 0.5001 * bytes;
    }
    return lost;
}

void compare_with_float64(Run& run, const Case& c, const TestHead& head, std::size_t query,
                          const float* got) {
    const std::int64_t n = c.ends[query];
    const double scale = 1.0 / std::sqrt(static_cast<double>(c.head_dim));
    const std::vector<double> q = as_attended(run, c, query);
    std::vector<double> scores(size(n));
    double largest = -HUGE_VAL, wrong = 0.0;  // the most by which a score can be wrong
    for (std::int64_t pos = 0; pos < n; ++pos) {
        double magnitudes = 0.0;
        for (std::int64_t d = 0; d < c.head_dim; ++d) {
            const double product = q[size(d)] * head.element(false, pos, d) * scale;
            scores[size(pos)] += product;
            magnitudes += std::fabs(product);
        }
        largest = std::max(largest, scores[size(pos)]);
        wrong = std::max(wrong, static_cast<double>(c.head_dim + 5) * u * magnitudes);
    }
    double total = 0.0;
    for (double& score : scores)
        total += score = std::exp(score - largest);
    for (double& score : scores)
        score /= total;
    // e^x is right to 1.02 units; an old span shrinks once for each new one; then two long sums.
    // With bf16 weights are rounded, too.
    const double spans = static_cast<double>(n / 128 + 1);
    const double relative = std::expm1(4 * wrong) + (8 * spans + 2.0 * static_cast<double>(n)) * u +
                            (c.type == KvType::bf16 ? 0x1p-8 : 0.0);
    for (std::int64_t d = 0; d < c.head_dim; ++d) {
        double mean = 0.0, magnitudes = 0.0;
        for (std::int64_t pos = 0; pos < n; ++pos) {
            const double part = scores[size(pos)] * head.element(true, pos, d);
            mean += part;
            magnitudes += std::fabs(part);
        }
        run.expect_near("attend", size(d), static_cast<double>(got[d]), mean,
                        relative * magnitudes + lost_in_steps(c, head, scores, d) + 1e-30);
    }
}

void check_case(Run& run, const Case& c) {
    const std::string name = kv_type_name(c.type);
    const TestHead head(c.type, c.head_dim, c.n_positions);
    store(*run.generic, c, head);
    run.note(head.bytes());
    if (c.kind == Kind::plain) compare_stored(run, c, head);
    std::vector<float> want(c.queries.size());
    for (std::size_t i = 0; i < c.ends.size(); ++i) {
        attend(*run.generic, c, head, i, i + 1, &want);
        if (c.kind != Kind::plain) continue;
        compare_with_float64(run, c, head, i, want.data() + i * size(c.head_dim));
    }
    run.note(want);
    for (const KernelTable* set : run.sets) {
        const TestHead own(c.type, c.head_dim, c.n_positions);
        store(*set, c, own);
        run.expect_same(std::string(set->name) + " store_kv " + name, own.bytes(), head.bytes());
        std::vector<float> got(want.size());
        attend(*set, c, head, 0, c.ends.size(), &got);
        run.expect_same(std::string(set->name) + " attend " + name, got, want);
    }
}

// A sum that vanishes from below is -0, and whether it stays so depends on whether the zeros of
// positions that are not seen are added, as tiles do: the result is 0 either way.
Case sum_that_vanishes() {
    Case c{Kind::wild, KvType::bf16, 32, 96, {}, {}, {}, {66, 66, 66, 66}};
    c.keys.resize(96 * 32);
    c.values.resize(96 * 32, -1.0f);
    c.queries.resize(4 * 32);
    for (std::size_t i = 0; i < 4; ++i)
        c.queries[i * 32] = 1.0f;
    for (std::size_t pos = 0; pos < 96; ++pos)
        c.keys[pos * 32] = pos % 32 == 0 && pos < 64 ? 0.0f : pos < 64 ? -2000.0f : -40.0f;
    c.values[0] = 0x1.1p-126f;         // weight 1
    c.values[32 * 32] = -0x1.2p-126f;  // weight 1: together less than a normal number
    c.values[64 * 32] = c.values[65 * 32] = -0x1p-126f;  // weights of a thousandth
    return c;
}

}  // namespace

void check_attention(Run& run, Random& random) {
    check_case(run, sum_that_vanishes());
    for (const KvType type : {KvType::f32, KvType::bf16, KvType::int8}) {
        for (int i = 0; i < 24; ++i) {
            const Kind kind = i % 3 == 0 ? Kind::plain : i % 3 == 1 ? Kind::tiny : Kind::wild;
            check_case(run, draw_case(random, type, kind));
        }
    }
}

}  // namespace check
