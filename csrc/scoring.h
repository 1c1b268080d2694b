// How likely text is: of one timeline, of many texts at once, of several ways to go on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <vector>

#include "session.h"
#include "softmax.h"

namespace tinyllama {

// Appends tokens to one session and returns, for each, the logarithm of its probability given all
// before it: NaN for the first token of an empty session.
std::vector<double> score(Session& session, const std::vector<std::int32_t>& tokens,
                          const std::function<void()>& between_chunks);

// The likelihood of each of many texts, from token n_given[i] on, given all before it. What several
// begin with is read once; a text may have a token more than the context. between_passes learns how
// many texts are done, and may throw to stop. Matrices of f32 are multiplied by matmul_q24 where
// there is one: the last bits are not those of a session, but neither other texts nor threads
// change them. Throws Error: before anything is read, invalid_argument for a text with nothing
// given or a token outside the vocabulary, context_full; nonfinite.
std::vector<Likelihood> score_texts(const std::shared_ptr<const Model>& model,
                                    const std::vector<std::vector<std::int32_t>>& texts,
                                    const std::vector<std::int32_t>& n_given,
                                    const std::function<void(std::size_t n_done)>& between_passes);

// The logarithm of the probability of each of several ways to go on, all in one batch. They fit the
// context each by itself, have a token at least, and leave the session as it was.
std::vector<double> score_ways(Session& session, const std::vector<std::vector<std::int32_t>>& ways,
                               const std::function<void()>& between_chunks);

}  // namespace tinyllama
