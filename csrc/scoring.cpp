#include "scoring.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <memory>
#include <string>
#include <utility>

namespace tinyllama {

namespace {

// What was asked of the first n excerpts, in order.
std::vector<Likelihood> likelihoods_of(const Model& model, const std::vector<Excerpt>& excerpts,
                                       std::size_t n) {
    std::vector<std::vector<Likelihood>> of_each(n);
    Threads& threads = model.threads();
    threads.parallel_for(
        threads.size(), static_cast<std::int64_t>(n), [&](std::int64_t begin, std::int64_t end) {
            for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i)
                of_each[i] = excerpts[i].likelihoods(model.kernels());
        });
    std::vector<Likelihood> all;
    for (const std::vector<Likelihood>& some : of_each)
        all.insert(all.end(), some.begin(), some.end());
    return all;
}

// Many texts as a radix tree: what several begin with is read once. Each pass takes the branches
// found last, as many as fill it, so that few caches wait for their children; the last child goes
// on in its parent's.
class TextTree {
public:
    TextTree(const Model& model, const std::vector<std::vector<std::int32_t>>& texts,
             const std::vector<std::int32_t>& n_given)
        : model_(model),
          texts_(texts),
          n_given_(n_given),
          likelihoods_(texts.size()),
          excerpts_(max_rows) {
        for (std::size_t i = 0; i < texts.size(); ++i) {
            if (static_cast<std::size_t>(n_given[i]) < texts[i].size()) order_.push_back(i);
        }
        std::sort(order_.begin(), order_.end(),
                  [&](std::size_t a, std::size_t b) { return texts[a] < texts[b]; });
        n_done_ = texts.size() - order_.size();
        add_children({0, order_.size(), 0, std::make_shared<KvCache>(model.kv_pool())});
    }

    bool is_read() const { return branches_.empty(); }
    std::size_t n_done() const { return n_done_; }  // texts
    const std::vector<Likelihood>& likelihoods() const { return likelihoods_; }

    void read_some();

private:
    // Texts [begin, end) of those in order. All have the n_read tokens that the cache holds, and
    // the next one, in common.
    struct Branch {
        std::size_t begin, end;
        std::size_t n_read;
        std::shared_ptr<KvCache> cache;
    };

    const std::vector<std::int32_t>& text(std::size_t i) const { return texts_[order_[i]]; }
    void add_rows(Branch* branch);
    void ask(const Branch& branch, std::size_t pos);
    void add_children(const Branch& branch);

    const Model& model_;
    const std::vector<std::vector<std::int32_t>>& texts_;
    const std::vector<std::int32_t>& n_given_;
    std::vector<Likelihood> likelihoods_;
    std::size_t n_done_;
    std::vector<std::size_t> order_;  // of the texts, without those of which nothing is asked
    std::vector<Branch> branches_;    // to be read

    // Of the pass that is being made:
    std::vector<Row> rows_;
    std::vector<Excerpt> excerpts_;  // of the rows of which something is asked, in order
    std::size_t n_excerpts_ = 0;
    std::vector<std::size_t> owners_;  // the texts of what is asked
};

void TextTree::read_some() {
    rows_.clear();
    n_excerpts_ = 0;
    owners_.clear();
    std::vector<Branch> read;
    while (!branches_.empty() && rows_.size() < max_rows) {
        read.push_back(std::move(branches_.back()));
        branches_.pop_back();
        add_rows(&read.back());
    }
    read_rows(model_, rows_, nullptr, F32Products::q24);
    const std::vector<Likelihood> found = likelihoods_of(model_, excerpts_, n_excerpts_);
    for (std::size_t i = 0; i < found.size(); ++i) {
        Likelihood& likelihood = likelihoods_[owners_[i]];
        likelihood.logprob += found[i].logprob;
        likelihood.greedy = likelihood.greedy && found[i].greedy;
    }
    for (const Branch& branch : read)
        add_children(branch);
}

// Reads on in what all texts of a branch have in common, as far as there is room. In their order
// the first and the last differ soonest; the last token of a text is never read.
void TextTree::add_rows(Branch* branch) {
    const std::vector<std::int32_t>& first = text(branch->begin);
    const std::vector<std::int32_t>& last = text(branch->end - 1);
    const std::size_t begin = branch->n_read;
    const std::size_t most =
        std::min({first.size(), last.size() - 1, begin + max_rows - rows_.size()});
    std::size_t end = begin + 1;
    while (end < most && first[end] == last[end])
        ++end;
    std::shared_ptr<KvCache>& cache = branch->cache;
    const auto pos_begin = static_cast<std::int32_t>(begin);
    if (cache.use_count() > 1) cache = std::make_shared<KvCache>(cache->share(pos_begin));
    cache->reserve(pos_begin, static_cast<std::int32_t>(end));
    for (std::size_t pos = begin; pos < end; ++pos) {
        rows_.push_back({cache.get(), static_cast<std::int32_t>(pos), first[pos], nullptr});
        ask(*branch, pos);
    }
    branch->n_read = end;
}

// For what follows token pos, which was added last, in the texts of a branch.
void TextTree::ask(const Branch& branch, std::size_t pos) {
    Excerpt& excerpt = excerpts_[n_excerpts_];
    excerpt.clear(static_cast<std::size_t>(model_.config().vocab_size));
    for (std::size_t i = branch.begin; i < branch.end; ++i) {
        const std::size_t next = pos + 1;
        if (next < static_cast<std::size_t>(n_given_[order_[i]]) || next == text(i).size())
            continue;
        excerpt.ask(text(i)[next]);  // ascending, as the texts are in order
        owners_.push_back(order_[i]);
        if (next + 1 == text(i).size()) ++n_done_;
    }
    if (!excerpt.is_asked()) return;
    rows_.back().excerpt = &excerpt;
    ++n_excerpts_;
}

// The branches that a branch parts into where it was read up to.
void TextTree::add_children(const Branch& branch) {
    const std::size_t n = branch.n_read;
    for (std::size_t begin = branch.begin, end; begin < branch.end; begin = end) {
        end = begin + 1;
        if (text(begin).size() < n + 2) continue;  // nothing follows its next token
        while (end < branch.end && text(end)[n] == text(begin)[n])
            ++end;
        branches_.push_back({begin, end, n, branch.cache});
    }
}

}  // namespace

std::vector<double> score(Session& session, const std::vector<std::int32_t>& tokens,
                          const std::function<void()>& between_chunks) {
    const Model& model = session.model();
    const auto n_logits = static_cast<std::size_t>(model.config().vocab_size);
    std::vector<Excerpt> excerpts(std::min(tokens.size(), max_rows));
    std::vector<double> scores(tokens.size(), std::numeric_limits<double>::quiet_NaN());
    if (tokens.empty()) return scores;
    session.check(tokens.data(), tokens.size());
    const std::int32_t n_before = session.n_tokens();
    if (n_before > 0) scores[0] = session.log_probability(tokens[0]);
    try {
        for (std::size_t begin = 0; begin < tokens.size(); begin += max_rows) {
            const std::size_t end = std::min(tokens.size(), begin + max_rows);
            for (std::size_t i = begin; i < end; ++i) {
                excerpts[i - begin].clear(n_logits);
                if (i + 1 < tokens.size()) excerpts[i - begin].ask(tokens[i + 1]);
            }
            feed({{&session, TokenSpan(tokens.data() + begin, end - begin), nullptr,
                   excerpts.data()}},
                 between_chunks);
            const std::vector<Likelihood> found = likelihoods_of(model, excerpts, end - begin);
            for (std::size_t i = 0; i < found.size(); ++i)
                scores[begin + 1 + i] = found[i].logprob;
            between_chunks();
        }
    } catch (...) {
        session.rewind(n_before);
        throw;
    }
    return scores;
}

std::vector<Likelihood> score_texts(const std::shared_ptr<const Model>& model,
                                    const std::vector<std::vector<std::int32_t>>& texts,
                                    const std::vector<std::int32_t>& n_given,
                                    const std::function<void(std::size_t n_done)>& between_passes) {
    if (texts.size() != n_given.size())
        throw Error(Status::invalid_argument, "n_given has another length than texts");
    const Session empty(model, 0);
    for (std::size_t i = 0; i < texts.size(); ++i) {
        if (n_given[i] < 1 || static_cast<std::size_t>(n_given[i]) > texts[i].size())
            throw Error(Status::invalid_argument,
                        "text " + std::to_string(i) + " has " + std::to_string(texts[i].size()) +
                            " tokens; " + std::to_string(n_given[i]) + " cannot be given");
        empty.check(texts[i].data(), texts[i].size() - 1);
        empty.check(&texts[i].back(), 1);  // it is never read
    }
    TextTree tree(*model, texts, n_given);
    for (between_passes(tree.n_done()); !tree.is_read(); between_passes(tree.n_done()))
        tree.read_some();
    return tree.likelihoods();
}

std::vector<double> score_ways(Session& session, const std::vector<std::vector<std::int32_t>>& ways,
                               const std::function<void()>& between_chunks) {
    const Model& model = session.model();
    const auto n_logits = static_cast<std::size_t>(model.config().vocab_size);
    std::vector<double> scores;
    for (const std::vector<std::int32_t>& way : ways) {
        if (way.empty()) throw Error(Status::invalid_argument, "a way to go on has no tokens");
        session.check(way.data(), way.size());
        scores.push_back(session.log_probability(way[0]));
    }
    // As many as fit into one pass. Of each way's tokens all but the last are read.
    for (std::size_t begin = 0, end = 0; begin < ways.size(); begin = end) {
        std::size_t n_rows = 0;
        do {
            n_rows += ways[end++].size() - 1;
        } while (end < ways.size() && n_rows + ways[end].size() - 1 <= max_rows);
        std::vector<std::shared_ptr<Session>> forks;
        std::vector<Excerpt> excerpts(n_rows);
        std::vector<Feed> feeds;
        std::size_t n = 0;
        for (std::size_t i = begin; i < end; ++i) {
            forks.push_back(session.fork(0));
            feeds.push_back({forks.back().get(), TokenSpan(ways[i].data(), ways[i].size() - 1),
                             nullptr, excerpts.data() + n});
            for (std::size_t k = 1; k < ways[i].size(); ++k, ++n) {
                excerpts[n].clear(n_logits);
                excerpts[n].ask(ways[i][k]);
            }
        }
        feed(feeds, between_chunks);
        const std::vector<Likelihood> found = likelihoods_of(model, excerpts, n_rows);
        for (std::size_t i = begin, row = 0; i < end; ++i) {
            for (std::size_t k = 1; k < ways[i].size(); ++k)
                scores[i] += found[row++].logprob;
        }
    }
    return scores;
}

}  // namespace tinyllama
