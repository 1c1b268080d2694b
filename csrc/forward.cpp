// The page to read first: a Llama, from tokens to logits.
//
//   x = tok_embed[token]
//   for every layer:
//     h = rms_norm(x);  q, k, v = Wq h, Wk h, Wv h;  q, k are rotated by their position
//     x += Wo attention(q, all keys so far, all values so far)
//     h = rms_norm(x);  x += Wdown (silu(Wgate h) * (Wup h))
//   logits = Whead rms_norm(x)
//
// All threads run the whole of it side by side, each doing its share of every step, and wait for
// one another (barrier) where a step reads what others wrote.

#include "forward.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <initializer_list>

#include "packing.h"
#include "parallel.h"

namespace tinyllama {
namespace {

// Below this many multiply-adds a second thread costs more than it saves.
constexpr std::int64_t min_work_per_thread = 1 << 19;
// Queries that attention is given at once.
constexpr std::int64_t max_queries = 32;
// Panels of the output head computed before their logits are handed out: they stay in a near cache.
constexpr std::int64_t head_panels = 8;
// A block of logits, whose largest is found by one thread.
constexpr std::int64_t block_panels = weigh_block / panel_rows;

std::int64_t round_up(std::int64_t n, std::int64_t unit) { return (n + unit - 1) / unit * unit; }

std::int64_t n_panels(const Matrix& w) { return (w.rows + panel_rows - 1) / panel_rows; }

}  // namespace

// The forms of one input that the matrices reading it ask for, beside floats.
struct Pass::Asked {
    bool f32 = false;
    bool bf16 = false;
    bool q8 = false;
    Asked(std::initializer_list<const Matrix*> readers) {
        for (const Matrix* w : readers) {
            f32 = f32 || w->dtype == DType::f32;
            bf16 = bf16 || w->dtype == DType::bf16;
            q8 = q8 || w->dtype == DType::q8_0 || w->dtype == DType::q4_0;
        }
    }

    // Makes room for n rows.
    void fit(Forms* forms, std::int64_t n, std::int64_t width, bool f32_as_q24) const {
        const auto size = [n](std::int64_t per_row) {
            return static_cast<std::size_t>(n * per_row);
        };
        if (bf16) forms->bf16.resize(size(round_up(width, block_size)));
        if (f32 && f32_as_q24) {
            forms->q24.resize(size(3 * round_up(width, 64)));
            forms->q24_scales.resize(size(n_groups(width)));
        }
        if (!q8) return;
        forms->q8.resize(size(round_up(width, 64)));
        forms->scales.resize(size(n_groups(width)));
        forms->sums.resize(size(width / block_size));
    }
};

// What a product reads: rows of floats, and the forms of them that its weights ask for.
struct Pass::Input {
    const float* values;
    const Forms* forms;
};

struct Pass::Product {
    const Matrix* w;
    float* y;  // (n, w->rows)
};

Pass::Pass(const Model& model) : model_(model), c_(model.config()), k_(model.kernels()) {
    // A piece of the head is about as much work as half a layer.
    const std::int64_t half_layer = (c_.q_dim() + c_.kv_dim()) * c_.dim + c_.hidden_dim * c_.dim;
    const std::int64_t head = std::int64_t{c_.vocab_size} * c_.dim;
    n_output_pieces_ = std::clamp<std::int64_t>(head / half_layer, 1, n_blocks());
    n_pieces_ = n_done_ = 2 * c_.n_layers + n_output_pieces_;
}

void Pass::begin(const std::vector<Row>& rows, const Tap* tap, F32Products f32) {
    rows_ = rows;
    tap_ = tap;
    f32_as_q24_ = f32 == F32Products::q24 && k_.matmul_q24 != nullptr;
    n_ = static_cast<std::int64_t>(rows.size());
    n_positions_ = 0;
    wanted_.clear();
    places_.clear();
    timelines_.clear();
    for (std::int64_t row = 0; row < n_; ++row) {
        n_positions_ += at(row).pos + 1;
        places_.push_back(n_wanted());
        if (at(row).is_wanted()) wanted_.push_back(row);
        if (row == 0 || at(row).cache != at(row - 1).cache) timelines_.push_back({row, row});
        timelines_.back().end = row + 1;
    }
    allocate();
    all_finite_.store(true, std::memory_order_relaxed);
    n_done_ = 0;
}

Work Pass::next(std::int64_t i) const {
    const std::int64_t piece_index = n_done_ + i, layer = piece_index / 2;
    if (layer >= c_.n_layers) return piece(Work::Kind::output, n_wanted(), 0);
    const bool first_half = piece_index % 2 == 0;
    return first_half ? piece(Work::Kind::attention, n_, n_positions_)
                      : piece(Work::Kind::feed_forward, n_after(layer), 0);
}

Work Pass::piece(Work::Kind kind, std::int64_t n, std::int64_t n_positions) const {
    std::int64_t per_row = 0;
    switch (kind) {
        case Work::Kind::attention:
            per_row = 2 * (c_.q_dim() + c_.kv_dim()) * c_.dim;
            break;
        case Work::Kind::feed_forward:
            per_row = 3 * std::int64_t{c_.hidden_dim} * c_.dim;
            break;
        default:
            per_row = std::int64_t{c_.vocab_size} * c_.dim / n_output_pieces_;
    }
    return {kind, n, n * per_row + 2 * n_positions * c_.q_dim()};
}

std::int64_t Pass::n_pieces(Work::Kind kind) const {
    return kind == Work::Kind::output ? n_output_pieces_ : c_.n_layers;
}

void Pass::advance(std::int64_t n) {
    const std::int64_t end = std::min(n_done_ + n, n_pieces_);
    if (end == n_done_) return;
    std::int64_t amount = 0;
    for (std::int64_t i = 0; i < end - n_done_; ++i)
        amount += next(i).amount;
    const std::chrono::microseconds patience(std::clamp<std::int64_t>(amount >> 19, 20, 200));
    model_.threads().run_team(
        n_threads(), [&](const Team& team) { do_pieces(team, end); }, patience);
    n_done_ = end;
}

void Pass::drop(const KvCache& cache) {
    for (Range& timeline : timelines_) {
        if (at(timeline.begin).cache != &cache) continue;
        for (auto row = static_cast<std::size_t>(timeline.begin);
             row < static_cast<std::size_t>(timeline.end); ++row) {
            rows_[row].logits = nullptr;
            rows_[row].excerpt = nullptr;
        }
        timeline.end = timeline.begin;
    }
}

bool Pass::run(const std::vector<Row>& rows, const Tap* tap, F32Products f32) {
    begin(rows, tap, f32);
    advance(n_left());
    return all_finite();
}

void Pass::do_pieces(const Team& team, std::int64_t end) {
    const std::int64_t n_layer_pieces = 2 * c_.n_layers;
    for (std::int64_t piece = n_done_; piece < std::min(end, n_layer_pieces); ++piece) {
        if (piece == 0) embed(team);
        const auto layer = static_cast<std::int32_t>(piece / 2);
        const LayerWeights& w = model_.weights().layers[static_cast<std::size_t>(layer)];
        if (piece % 2 == 0) {
            attention(team, layer, w, n_after(layer));
        } else if (n_after(layer) > 0) {
            feed_forward(team, layer, w, n_after(layer));
        }
    }
    if (end > n_layer_pieces && n_wanted() > 0)
        output(team, std::max(n_done_, n_layer_pieces) - n_layer_pieces, end - n_layer_pieces);
}

int Pass::n_threads() const {
    if (tap_ != nullptr) return 1;
    const int most = n_ == 1 ? model_.n_threads_alone() : model_.threads().size();
    const auto work = n_ * static_cast<std::int64_t>(model_.weights().n_parameters);
    return static_cast<int>(std::clamp<std::int64_t>(work / min_work_per_thread, 1, most));
}

// Rows that go on from a layer: of most rows of a prompt the last one owes only keys and values.
std::int64_t Pass::n_after(std::int64_t layer) const {
    return layer + 1 == c_.n_layers && tap_ == nullptr ? n_wanted() : n_;
}

std::int64_t Pass::n_blocks() const {
    return round_up(n_panels(model_.weights().lm_head), block_panels) / block_panels;
}

void Pass::embed(const Team& team) {
    const Matrix& table = model_.weights().tok_embed;
    const std::int64_t n_pairs = c_.head_dim / 2;
    const std::vector<double>& frequencies = model_.rope_frequencies();
    const Range mine = team.share(n_);
    for (std::int64_t row = mine.begin; row < mine.end; ++row) {
        unpack_row(table.dtype, table.panels, at(row).token, x(row));
        for (std::int64_t i = 0; i < n_pairs; ++i) {
            const double angle = at(row).pos * frequencies[static_cast<std::size_t>(i)];
            const auto to = static_cast<std::size_t>(row * c_.head_dim + 2 * i);
            cos_[to] = cos_[to + 1] = static_cast<float>(std::cos(angle));
            sin_[to + 1] = static_cast<float>(std::sin(angle));
            sin_[to] = -sin_[to + 1];
        }
    }
    team.barrier();
    show("tok_embed", x_, c_.dim);
}

// From all n_ rows to the first n of them: those that go on, which have then moved there.
void Pass::attention(const Team& team, std::int32_t layer, const LayerWeights& w, std::int64_t n) {
    const Input h = norm(team, w.attn_norm, {&w.wq, &w.wk, &w.wv}, n_);
    show("attn_norm", normed_[0], c_.dim, layer);
    matmuls(team, h, {{&w.wq, q_.data()}, {&w.wk, keys_.data()}, {&w.wv, values_.data()}});
    team.barrier();
    const auto n_timelines = static_cast<std::int64_t>(timelines_.size());
    const Range mine = team.share(n_timelines * c_.n_kv_heads);
    for (std::int64_t unit = mine.begin; unit < mine.end; ++unit) {
        attend(layer, timelines_[static_cast<std::size_t>(unit / c_.n_kv_heads)],
               unit % c_.n_kv_heads, n < n_);
    }
    if (n < n_ && team.thread() == 0) {
        for (std::int64_t i = 0; i < n; ++i)
            std::copy_n(x(wanted_[static_cast<std::size_t>(i)]), c_.dim, x(i));
    }
    team.barrier();
    show("q", q_, c_.q_dim(), layer);
    show("k", keys_, c_.kv_dim(), layer);
    show("v", values_, c_.kv_dim(), layer);
    show("attn", heads_, c_.q_dim(), layer);
    if (n > 0) add_product(team, w.wo, heads_, c_.q_dim(), n);
    show("attn_out", x_, c_.dim, layer);
}

// One key head of one timeline, and the n_heads / n_kv_heads query heads that share it (Ainslie
// et al., arXiv 2305.13245): keys and values of the new rows go into the cache, then every
// query looks back over all positions up to its own; or only those of the rows that are wanted,
// which then move to their places.
void Pass::attend(std::int32_t layer, const Range& timeline, std::int64_t kv_head,
                  bool only_wanted) {
    if (timeline.begin == timeline.end) return;  // dropped
    const std::int64_t group = c_.n_heads / c_.n_kv_heads;
    const KvHead cache = at(timeline.begin).cache->head(layer, static_cast<std::int32_t>(kv_head));
    for (std::int64_t row = timeline.begin; row < timeline.end; ++row) {
        const float* cos = cos_.data() + row * c_.head_dim;
        const float* sin = sin_.data() + row * c_.head_dim;
        const std::int64_t kv = row * c_.kv_dim() + kv_head * c_.head_dim;
        k_.rope(query(row, kv_head * group), cos, sin, group, c_.head_dim);
        k_.rope(keys_.data() + kv, cos, sin, 1, c_.head_dim);
        k_.store_kv(cache, at(row).pos, keys_.data() + kv, values_.data() + kv);
    }
    const float* q[max_queries];
    float* out[max_queries];
    std::int32_t n_positions[max_queries];
    std::int64_t n = 0;
    for (std::int64_t row = timeline.begin; row < timeline.end; ++row) {
        if (only_wanted && !at(row).is_wanted()) continue;
        const std::int64_t place = only_wanted ? places_[static_cast<std::size_t>(row)] : row;
        for (std::int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
            q[n] = query(row, head);
            out[n] = heads_.data() + place * c_.q_dim() + head * c_.head_dim;
            n_positions[n] = at(row).pos + 1;
            if (++n < max_queries) continue;
            k_.attend(out, q, n_positions, n, cache);
            n = 0;
        }
    }
    if (n > 0) k_.attend(out, q, n_positions, n, cache);
}

// silu(Wgate h) * (Wup h), each thread its units.
void Pass::feed_forward(const Team& team, std::int32_t layer, const LayerWeights& w,
                        std::int64_t n) {
    const Input h = norm(team, w.ffn_norm, {&w.w_gate, &w.w_up}, n);
    show("ffn_norm", normed_[0], c_.dim, layer);
    const Range mine = team.share(n_panels(w.w_gate));
    matmul(w.w_gate, h, {hidden_.data(), c_.hidden_dim, false}, n, mine);
    matmul(w.w_up, h, {up_.data(), c_.hidden_dim, false}, n, mine);
    const std::int64_t begin = mine.begin * panel_rows;
    const std::int64_t end = std::min<std::int64_t>(mine.end * panel_rows, c_.hidden_dim);
    for (std::int64_t row = 0; row < n && begin < end; ++row) {
        float* gate = hidden_.data() + row * c_.hidden_dim + begin;
        k_.swiglu(gate, gate, up_.data() + row * c_.hidden_dim + begin, end - begin);
    }
    team.barrier();
    show("ffn_hidden", hidden_, c_.hidden_dim, layer);
    add_product(team, w.w_down, hidden_, c_.hidden_dim, n);
    show("ffn_out", x_, c_.dim, layer);
}

// Only rows whose logits somebody asked for take part. Pieces [first, last) of the head.
void Pass::output(const Team& team, std::int64_t first, std::int64_t last) {
    const std::int64_t n = n_wanted();
    const Matrix& head = model_.weights().lm_head;
    // With a tap the rows have stayed where they were.
    const Input h = norm(team, model_.weights().final_norm, {&head}, n, tap_ != nullptr);
    show("final_norm", normed_[0], c_.dim);
    const std::int64_t n_all = n_panels(head);
    const std::int64_t begin_block = n_blocks() * first / n_output_pieces_;
    const Range blocks = team.share(n_blocks() * last / n_output_pieces_ - begin_block);
    const Range mine{(begin_block + blocks.begin) * block_panels,
                     std::min((begin_block + blocks.end) * block_panels, n_all)};
    const std::int64_t width = head_panels * panel_rows;
    float* tile = logits_.data() + team.thread() * n * width;
    std::int32_t largest = 0;
    for (std::int64_t panel = mine.begin; panel < mine.end; panel += head_panels) {
        const Range some{panel, std::min(panel + head_panels, mine.end)};
        const std::int64_t begin = panel * panel_rows;
        const std::int64_t end = std::min<std::int64_t>(some.end * panel_rows, head.rows);
        // A kernel writes row r at y + r, and the tile begins with row `begin`.
        matmul(head, h, {tile - begin, width, false}, n, some);
        for (std::int64_t i = 0; i < n; ++i) {
            const Row& row = at(wanted_[static_cast<std::size_t>(i)]);
            largest = std::max(largest, hand_out(row, begin, tile + i * width, end - begin));
        }
    }
    if (largest >= 0x7f800000) all_finite_.store(false, std::memory_order_relaxed);
    if (tap_ == nullptr || last < n_output_pieces_) return;
    AlignedVector<float> logits;
    for (const std::int64_t row : wanted_)
        if (at(row).logits != nullptr)
            logits.insert(logits.end(), at(row).logits, at(row).logits + c_.vocab_size);
    show("logits", logits, c_.vocab_size);
}

// Logits [begin, begin + n) go where they are asked for, to nowhere if their row was dropped.
// Returns the bits of the largest magnitude.
std::int32_t Pass::hand_out(const Row& row, std::int64_t begin, float* logits, std::int64_t n) {
    std::int32_t largest = 0;
    if (row.logits != nullptr) {
        float* const maxima = row.maxima == nullptr ? nullptr : row.maxima + begin / weigh_block;
        largest = k_.hand_out(row.logits + begin, maxima, logits, n);
    }
    if (row.excerpt == nullptr) return largest;
    return std::max(largest, row.excerpt->take(k_, begin, logits, n));
}

// rms_norm of the first n rows of x, or of those wanted, in the forms their readers ask for. A
// single row costs less to compute on every thread than to wait for.
Pass::Input Pass::norm(const Team& team, const float* weight, const Asked& asked, std::int64_t n,
                       bool of_wanted) {
    const bool alone = n == 1;
    const auto slot = static_cast<std::size_t>(alone ? team.thread() : 0);
    float* const values = normed_[slot].data();
    const Range mine = alone ? Range{0, 1} : team.share(n);
    for (std::int64_t i = mine.begin; i < mine.end; ++i) {
        const std::int64_t row = of_wanted ? wanted_[static_cast<std::size_t>(i)] : i;
        k_.rms_norm(values + i * c_.dim, x(row), weight, c_.dim, c_.norm_eps);
        convert(&forms_[slot], i, values + i * c_.dim, c_.dim, asked);
    }
    if (!alone) team.barrier();
    return {values, &forms_[slot]};
}

// n rows that all threads can read, likewise.
Pass::Input Pass::converted(const Team& team, const AlignedVector<float>& rows, std::int64_t width,
                            const Asked& asked, std::int64_t n) {
    const bool alone = n == 1;
    const auto slot = static_cast<std::size_t>(alone ? team.thread() : 0);
    const Range mine = alone ? Range{0, 1} : team.share(n);
    for (std::int64_t row = mine.begin; row < mine.end; ++row)
        convert(&forms_[slot], row, rows.data() + row * width, width, asked);
    if (!alone && (asked.bf16 || asked.q8 || (asked.f32 && f32_as_q24_))) team.barrier();
    return {rows.data(), &forms_[slot]};
}

void Pass::convert(Forms* forms, std::int64_t row, const float* values, std::int64_t width,
                   const Asked& asked) {
    if (asked.bf16) {
        k_.round_bf16(forms->bf16.data() + row * round_up(width, block_size), values, width);
    }
    if (asked.f32 && f32_as_q24_) {
        k_.quantize_q24(forms->q24.data() + row * 3 * round_up(width, 64),
                        forms->q24_scales.data() + row * n_groups(width), values, width);
    }
    if (!asked.q8) return;
    k_.quantize_q8(forms->q8.data() + row * round_up(width, 64),
                   forms->scales.data() + row * n_groups(width),
                   forms->sums.data() + row * (width / block_size), values, width);
}

// Several matrices of one input, shared out as if they were one.
void Pass::matmuls(const Team& team, const Input& h, std::initializer_list<Product> products) {
    std::int64_t total = 0;
    for (const Product& product : products)
        total += n_panels(*product.w);
    const Range mine = team.share(total);
    std::int64_t first = 0;
    for (const Product& product : products) {
        const std::int64_t n = n_panels(*product.w);
        const Range some{std::clamp<std::int64_t>(mine.begin - first, 0, n),
                         std::clamp<std::int64_t>(mine.end - first, 0, n)};
        matmul(*product.w, h, {product.y, product.w->rows, false}, n_, some);
        first += n;
    }
}

// x += W rows
void Pass::add_product(const Team& team, const Matrix& w, const AlignedVector<float>& rows,
                       std::int64_t width, std::int64_t n) {
    const Input h = converted(team, rows, width, {&w}, n);
    matmul(w, h, {x_.data(), c_.dim, true}, n, team.share(n_panels(w)));
    team.barrier();
}

void Pass::matmul(const Matrix& w, const Input& h, const Output& y, std::int64_t n,
                  const Range& panels) {
    if (panels.begin >= panels.end) return;
    const std::int64_t cols = w.cols;
    const Forms& f = *h.forms;
    if (w.dtype == DType::f32 && f32_as_q24_) {
        k_.matmul_q24(y, w.panels, {f.q24.data(), f.q24_scales.data(), round_up(cols, 64)}, n,
                      panels.begin, panels.end);
    } else if (w.dtype == DType::f32) {
        k_.matmul_f32(y, w.panels, h.values, cols, n, panels.begin, panels.end);
    } else if (w.dtype == DType::bf16) {
        k_.matmul_bf16(y, w.panels, f.bf16.data(), round_up(cols, block_size), n, panels.begin,
                       panels.end);
    } else {
        const auto kernel = w.dtype == DType::q8_0 ? k_.matmul_q8_0 : k_.matmul_q4_0;
        kernel(y, w.panels, {f.q8.data(), f.scales.data(), f.sums.data(), round_up(cols, 64)}, n,
               panels.begin, panels.end);
    }
}

void Pass::show(const char* stage, const AlignedVector<float>& values, std::int64_t width,
                std::int32_t layer) const {
    if (tap_ == nullptr) return;
    const std::string prefix = layer < 0 ? "" : "layers." + std::to_string(layer) + ".";
    (*tap_)(prefix + stage, values.data(), static_cast<std::int64_t>(values.size()) / width, width);
}

void Pass::allocate() {
    const auto n_teammates = static_cast<std::size_t>(model_.threads().size());
    const auto size = [this](std::int64_t width) { return static_cast<std::size_t>(n_ * width); };
    x_.resize(size(c_.dim));
    q_.resize(size(c_.q_dim()));
    keys_.resize(size(c_.kv_dim()));
    values_.resize(size(c_.kv_dim()));
    heads_.resize(size(c_.q_dim()));
    hidden_.resize(size(c_.hidden_dim));
    up_.resize(size(c_.hidden_dim));
    cos_.resize(size(c_.head_dim));
    sin_.resize(size(c_.head_dim));
    logits_.resize(n_teammates * static_cast<std::size_t>(n_wanted() * head_panels * panel_rows));
    normed_.resize(n_teammates);
    forms_.resize(n_teammates);
    const Asked all = asked_by_model();
    const std::int64_t widest = std::max<std::int64_t>({c_.dim, c_.q_dim(), c_.hidden_dim});
    for (std::size_t i = 0; i < n_teammates; ++i) {
        const std::int64_t n = i == 0 ? n_ : 1;
        normed_[i].resize(static_cast<std::size_t>(n * c_.dim));
        all.fit(&forms_[i], n, widest, f32_as_q24_);
    }
}

Pass::Asked Pass::asked_by_model() const {
    Asked all{&model_.weights().lm_head};
    for (const LayerWeights& w : model_.weights().layers) {
        const Asked of_layer{&w.wq, &w.wk, &w.wv, &w.wo, &w.w_gate, &w.w_up, &w.w_down};
        all.f32 = all.f32 || of_layer.f32;
        all.bf16 = all.bf16 || of_layer.bf16;
        all.q8 = all.q8 || of_layer.q8;
    }
    return all;
}

float* Pass::query(std::int64_t row, std::int64_t head) {
    return q_.data() + row * c_.q_dim() + head * c_.head_dim;
}

}  // namespace tinyllama
