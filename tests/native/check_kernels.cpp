// Every set of kernels that this CPU can run, on random shapes and numbers: the generic set against
// float64, within what its roundings can add up to, and each set against the generic one, bit for
// bit and however the work is cut. Then whole models. Deterministic; -DTINYLLAMA_CHECK=ON builds
// it. The digest it prints is of what the generic set computed: the same on every kind of machine.
#include <algorithm>
#include <iterator>
#include <memory>
#include <utility>

#include "check.h"
#include "kernels/cpu.h"
#include "session.h"

namespace check {
namespace {

using namespace tinyllama;

// A kernel that makes n numbers; exact(i) is element i in float64 and how far off it may be.
template <typename T, typename Kernel, typename Exact>
void check_row(Run& run, const std::string& name, Kind kind, std::int64_t n, const Kernel& kernel,
               const Exact& exact) {
    std::vector<T> want(size(n), T{1});
    kernel(*run.generic, want.data());
    run.note(want);
    for (std::int64_t i = 0; i < n && kind == Kind::plain; ++i) {
        const auto value = static_cast<double>(want[size(i)]);
        const std::pair<double, double> near = exact(i);
        run.expect_near(name, size(i), value, near.first, near.second);
    }
    for (const KernelTable* set : run.sets) {
        std::vector<T> got(size(n), T{1});
        kernel(*set, got.data());
        run.expect_same(std::string(set->name) + " " + name, got, want);
    }
}

void check_swiglu(Run& run, Random& random, Kind kind) {
    const std::int64_t n = 1 + below(random, 100);
    const std::vector<float> gate = draws(random, kind, n), up = draws(random, kind, n);
    check_row<float>(
        run, "swiglu", kind, n,
        [&](const KernelTable& set, float* out) { set.swiglu(out, gate.data(), up.data(), n); },
        [&](std::int64_t i) {
            const auto x = static_cast<double>(gate[size(i)]);
            const double exact = x / (1 + std::exp(-x)) * static_cast<double>(up[size(i)]);
            // 1.02 units of e^x, which are twice 1.02 u, and three roundings.
            return std::pair(exact, 6 * u * std::fabs(exact));
        });
}

void check_weigh(Run& run, Random& random, Kind kind) {
    const std::int64_t n_blocks = 1 + below(random, 3), n = n_blocks * weigh_block;
    std::vector<float> x = draws(random, kind, n);
    for (float& value : x)
        value = value <= 4.0f ? value : 4.0f;
    // The sums stand behind the weights.
    check_row<float>(
        run, "weigh", kind, n + n_blocks,
        [&](const KernelTable& set, float* out) {
            set.weigh(out, out + n, x.data(), n_blocks, 4.0f, 1.5f);
        },
        [&](std::int64_t i) {
            const auto weight = [&](std::int64_t k) {
                const float less = x[size(k)] - 4.0f;
                return less < -125.0f / 1.5f ? 0.0 : std::exp2(static_cast<double>(less) * 1.5);
            };
            double exact = i < n ? weight(i) : 0.0;
            for (std::int64_t k = 0; i >= n && k < weigh_block; ++k)
                exact += weight((i - n) * weigh_block + k);
            return std::pair(exact, (i < n ? 2e-7 : 2e-7 + 8 * u) * exact);
        });
}

void check_rms_norm(Run& run, Random& random, Kind kind) {
    const std::int64_t n = 1 + below(random, 100);
    const std::vector<float> x = draws(random, kind, n), weight = draws(random, kind, n);
    double squares = 0.0;
    for (const float value : x)
        squares += static_cast<double>(value) * static_cast<double>(value);
    const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + 1e-5);
    check_row<float>(
        run, "rms_norm", kind, n,
        [&](const KernelTable& set, float* out) {
            set.rms_norm(out, x.data(), weight.data(), n, 1e-5f);
        },
        [&](std::int64_t i) {
            const double exact =
                static_cast<double>(x[size(i)]) * scale * static_cast<double>(weight[size(i)]);
            return std::pair(exact, 4 * u * std::fabs(exact));  // three roundings, and eps
        });
}

void check_rope(Run& run, Random& random, Kind kind) {
    const std::int64_t head_dim = 2 * (1 + below(random, 40)), n = 3 * head_dim;
    const std::vector<float> x = draws(random, kind, n);
    std::vector<float> cos = draws(random, kind, head_dim), sin = draws(random, kind, head_dim);
    for (std::int64_t i = 0; i < head_dim; i += 2) {
        cos[size(i + 1)] = cos[size(i)];
        sin[size(i)] = -sin[size(i + 1)];
    }
    check_row<float>(
        run, "rope", kind, n,
        [&](const KernelTable& set, float* out) {
            std::copy(x.begin(), x.end(), out);
            set.rope(out, cos.data(), sin.data(), 3, head_dim);
        },
        [&](std::int64_t i) {
            const auto same = static_cast<double>(x[size(i)]);
            const auto other = static_cast<double>(x[size(i ^ 1)]);
            const double a = same * static_cast<double>(cos[size(i % head_dim)]);
            const double b = other * static_cast<double>(sin[size(i % head_dim)]);
            return std::pair(a + b, 3 * u * (std::fabs(a) + std::fabs(b)));
        });
}

void check_round_bf16(Run& run, Random& random, Kind kind) {
    const std::int64_t n = 1 + below(random, 100), padded = (n + 31) / 32 * 32;
    std::vector<float> x = draws(random, kind, n);
    // Ties go to even, which is down and up; a NaN must not be rounded to infinity, nor to zero.
    const std::vector<std::uint32_t> plain = {0x3f808000, 0x3f818000};
    const std::vector<std::uint32_t> nans = {0x7f800001, 0xffffffff};
    for (std::size_t i = 0; i < 2 && i < x.size(); ++i)
        x[i] = from_bits((kind == Kind::wild ? nans : plain)[i]);
    check_row<std::uint16_t>(
        run, "round_bf16", kind, padded,
        [&](const KernelTable& set, std::uint16_t* out) { set.round_bf16(out, x.data(), n); },
        [&](std::int64_t i) {
            const float given = i < n ? x[size(i)] : 0.0f;
            std::uint32_t bits;
            std::memcpy(&bits, &given, sizeof(bits));
            const std::uint32_t down = bits >> 16, rest = bits & 0xffff;
            const bool up = rest > 0x8000 || (rest == 0x8000 && down % 2 == 1);
            return std::pair(static_cast<double>(down + (up ? 1 : 0)), 0.0);
        });
}

void check_quantize(Run& run, Random& random, Kind kind) {
    const std::int64_t n = 32 * (1 + below(random, 40)), padded = (n + 63) / 64 * 64;
    std::vector<float> x = draws(random, kind, n);
    const float ties[] = {127.0f, 0.5f, 1.5f, -2.5f, -3.5f};  // at a scale of 1
    if (random.one_in(2)) std::copy(std::begin(ties), std::end(ties), x.begin());
    std::vector<float> scales(size(n_groups(n)));
    std::vector<std::int32_t> sums(size(n / 32));
    const auto quantize = [&](const KernelTable& set, std::int8_t* q) {
        set.quantize_q8(q, scales.data(), sums.data(), x.data(), n);
    };
    std::vector<std::int8_t> q(size(padded));
    quantize(*run.generic, q.data());
    const std::vector<float> want_scales = scales;
    const std::vector<std::int32_t> want_sums = sums;
    run.note(scales);
    for (std::int64_t b = 0; b < n / 32; ++b) {
        std::int32_t sum = 0;
        for (std::int64_t i = 0; i < 32; ++i)
            sum += q[size(32 * b + i)];
        if (sum != sums[size(b)]) run.fail("quantize_q8 sums", size(b), sums[size(b)], sum);
    }
    // Zeros up to whole lines of 64; the last 32 lie beyond and stay as they were.
    check_row<std::int8_t>(run, "quantize_q8", kind, padded + 32, quantize, [&](std::int64_t i) {
        if (i >= n) return std::pair(i < padded ? 0.0 : 1.0, 0.0);
        // Scale, inverse and product are rounded, then to a whole number.
        const double scale = static_cast<double>(want_scales[size(i / group_size)]);
        return std::pair(static_cast<double>(x[size(i)]) / scale, 0.5 + 127 * 4 * u);
    });
    for (const KernelTable* set : run.sets) {
        std::fill(scales.begin(), scales.end(), -1.0f);
        std::fill(sums.begin(), sums.end(), -1);
        quantize(*set, q.data());
        run.expect_same(std::string(set->name) + " quantize_q8 scales", scales, want_scales);
        run.expect_same(std::string(set->name) + " quantize_q8 sums", sums, want_sums);
    }
}

// Logits (n tokens, vocab_size), the tokens fed at once or one after another.
std::vector<float> logits_of(const std::string& file, const char* isa, KvType type, bool at_once) {
    const ByteSpan bytes{reinterpret_cast<const std::uint8_t*>(file.data()), file.size()};
    const ModelOptions options{1, isa, kv_type_name(type), 0};
    const std::shared_ptr<const Model> model =
        Model::open(FileBytes::copy_of(bytes), "model", options);
    const auto vocab_size = static_cast<std::size_t>(model->tokenizer().vocab_size());
    const std::vector<std::int32_t> tokens = {1, 5, 3, 8, 4, 4, 7, 9, 0, 6};
    std::vector<float> logits(tokens.size() * vocab_size);
    Session session(model, 1);
    if (at_once) {
        feed({{&session, tokens, logits.data()}}, [] {});
        return logits;
    }
    for (std::size_t i = 0; i < tokens.size(); ++i)
        feed({{&session, std::vector<std::int32_t>{tokens[i]}, logits.data() + i * vocab_size}},
             [] {});
    return logits;
}

void check_models(Run& run) {
    for (const fuzz::Tree& tree : fuzz::seed_models()) {
        const std::string file = fuzz::write(tree);
        for (const KvType type : {KvType::f32, KvType::bf16, KvType::int8}) {
            const std::vector<float> want = logits_of(file, "generic", type, false);
            run.n_results += want.size();
            for (const KernelTable* set : run.sets) {
                const std::string what =
                    std::string(set->name) + " logits, cache " + kv_type_name(type);
                run.expect_same(what, logits_of(file, set->name, type, true), want);
            }
        }
    }
}

int check_all() {
    Run run;
    run.generic = find_kernels("generic");
    std::string names;
    for (const char* const* name = supported_isas(); *name != nullptr; ++name) {
        run.sets.push_back(find_kernels(*name));
        names += std::string(" ") + *name;
    }
    Random random(1, 0);
    for (int i = 0; i < 150; ++i) {
        const Kind kind = i % 3 == 0 ? Kind::plain : i % 3 == 1 ? Kind::tiny : Kind::wild;
        check_swiglu(run, random, kind);
        check_weigh(run, random, kind);
        check_rms_norm(run, random, kind);
        check_rope(run, random, kind);
        check_round_bf16(run, random, kind);
        check_quantize(run, random, kind);
    }
    check_matmuls(run, random);
    check_attention(run, random);
    check_models(run);
    std::printf("sets:%s\nresults: %llu\ndigest: %016llx\n", names.c_str(),
                static_cast<unsigned long long>(run.n_results),
                static_cast<unsigned long long>(run.digest));
    if (run.n_failures != 0) std::printf("%d failures\n", run.n_failures);
    return run.n_failures == 0 ? 0 : 1;
}

}  // namespace
}  // namespace check

int main() { return check::check_all(); }
