#include "scoring.h"

#include <algorithm>
#include <cstddef>
#include <limits>
#include <string>

namespace tinyllama {

namespace {

// How likely each token is by its row of logits (tokens.size(), vocab_size).
std::vector<Likelihood> by_rows(const Model& model, const std::vector<float>& logits,
                                const std::vector<std::int32_t>& tokens) {
    const auto n_logits = static_cast<std::size_t>(model.config().vocab_size);
    std::vector<Likelihood> found(tokens.size());
    Threads& threads = model.threads();
    const auto n = static_cast<std::int64_t>(tokens.size());
    threads.parallel_for(threads.size(), n, [&](std::int64_t begin, std::int64_t end) {
        Logits one;
        one.resize(n_logits);
        for (auto i = static_cast<std::size_t>(begin); i < static_cast<std::size_t>(end); ++i) {
            const float* row = logits.data() + i * n_logits;
            std::copy(row, row + n_logits, one.values.begin());
            one.find_maxima();
            found[i] = {log_probability(model.kernels(), one, tokens[i]),
                        one.values[static_cast<std::size_t>(tokens[i])] == one.largest()};
        }
    });
    return found;
}

// Tokens [begin, end) of a text, read at once.
struct Excerpt {
    std::size_t text, begin, end;
};

// Reads excerpts together and adds how likely what follows their tokens is, from n_given on.
void score_excerpts(const std::vector<Excerpt>& excerpts,
                    const std::vector<std::vector<std::int32_t>>& texts,
                    const std::vector<std::int32_t>& n_given,
                    const std::vector<std::shared_ptr<Session>>& sessions,
                    const std::function<void()>& between_chunks,
                    std::vector<Likelihood>* likelihoods) {
    const Model& model = sessions[excerpts.front().text]->model();
    const auto n_logits = static_cast<std::size_t>(model.config().vocab_size);
    std::vector<std::size_t> owners;
    std::vector<std::int32_t> targets;
    std::vector<Feed> feeds;
    for (const Excerpt& e : excerpts) {
        const std::vector<std::int32_t>& text = texts[e.text];
        const auto given = static_cast<std::size_t>(n_given[e.text]);
        const std::size_t first = std::clamp(given - 1, e.begin, e.end);
        for (std::size_t i = first; i < e.end; ++i) {
            owners.push_back(e.text);
            targets.push_back(text[i + 1]);
        }
        feeds.push_back({sessions[e.text].get(), TokenSpan(text.data() + e.begin, e.end - e.begin),
                         nullptr, first - e.begin});
    }
    std::vector<float> logits(targets.size() * n_logits);
    float* next = logits.data();
    for (Feed& one : feeds) {
        if (one.first == one.tokens.size) continue;
        one.all_logits = next;
        next += (one.tokens.size - one.first) * n_logits;
    }
    feed(feeds, between_chunks);
    const std::vector<Likelihood> found = by_rows(model, logits, targets);
    for (std::size_t i = 0; i < found.size(); ++i) {
        Likelihood& likelihood = (*likelihoods)[owners[i]];
        likelihood.logprob += found[i].logprob;
        likelihood.greedy = likelihood.greedy && found[i].greedy;
    }
}

}  // namespace

std::vector<double> score(Session& session, const std::vector<std::int32_t>& tokens,
                          const std::function<void()>& between_chunks) {
    const Model& model = session.model();
    const auto n_logits = static_cast<std::size_t>(model.config().vocab_size);
    std::vector<double> scores(tokens.size(), std::numeric_limits<double>::quiet_NaN());
    if (tokens.empty()) return scores;
    session.check(tokens.data(), tokens.size());
    const std::int32_t n_before = session.n_tokens();
    if (n_before > 0) scores[0] = session.log_probability(tokens[0]);
    try {
        for (std::size_t begin = 0; begin < tokens.size(); begin += max_rows) {
            const std::size_t end = std::min(tokens.size(), begin + max_rows);
            std::vector<float> logits((end - begin) * n_logits);
            feed({{&session, TokenSpan(tokens.data() + begin, end - begin), logits.data()}},
                 between_chunks);
            const auto at = [&](std::size_t i) {
                return tokens.begin() + static_cast<std::ptrdiff_t>(std::min(i, tokens.size()));
            };
            const auto found = by_rows(model, logits, {at(begin + 1), at(end + 1)});
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
                                    const std::function<void()>& between_chunks) {
    if (texts.size() != n_given.size())
        throw Error(Status::invalid_argument, "n_given has another length than texts");
    std::vector<Likelihood> likelihoods(texts.size());
    std::vector<std::shared_ptr<Session>> sessions(texts.size());
    std::vector<Excerpt> excerpts;
    std::size_t n_rows = 0;
    const auto flush = [&] {
        if (excerpts.empty()) return;
        score_excerpts(excerpts, texts, n_given, sessions, between_chunks, &likelihoods);
        for (const Excerpt& e : excerpts) {
            if (e.end + 1 == texts[e.text].size()) sessions[e.text] = nullptr;
        }
        excerpts.clear();
        n_rows = 0;
        between_chunks();
    };
    for (std::size_t i = 0; i < texts.size(); ++i) {
        if (n_given[i] < 1 || static_cast<std::size_t>(n_given[i]) > texts[i].size())
            throw Error(Status::invalid_argument,
                        "text " + std::to_string(i) + " has " + std::to_string(texts[i].size()) +
                            " tokens; " + std::to_string(n_given[i]) + " cannot be given");
        sessions[i] = std::make_shared<Session>(model, 0);
        sessions[i]->check(&texts[i].back(), 1);  // it is never read
        const std::size_t n = texts[i].size() - 1;
        if (n_rows + n > max_rows) flush();
        for (std::size_t begin = 0; begin < n;) {
            const std::size_t end = std::min(n, begin + max_rows - n_rows);
            excerpts.push_back({i, begin, end});
            n_rows += end - begin;
            begin = end;
            if (n_rows == max_rows) flush();
        }
    }
    flush();
    return likelihoods;
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
        std::vector<float> logits(n_rows * n_logits);
        std::vector<Feed> feeds;
        std::vector<std::int32_t> targets;
        for (std::size_t i = begin; i < end; ++i) {
            forks.push_back(session.fork(0));
            feeds.push_back({forks.back().get(), TokenSpan(ways[i].data(), ways[i].size() - 1),
                             logits.data() + targets.size() * n_logits});
            targets.insert(targets.end(), ways[i].begin() + 1, ways[i].end());
        }
        feed(feeds, between_chunks);
        const std::vector<Likelihood> found = by_rows(model, logits, targets);
        for (std::size_t i = begin, row = 0; i < end; ++i) {
            for (std::size_t k = 1; k < ways[i].size(); ++k)
                scores[i] += found[row++].logprob;
        }
    }
    return scores;
}

}  // namespace tinyllama
