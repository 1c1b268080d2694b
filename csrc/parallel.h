// The only file that knows OpenMP.
#pragma once

#include <atomic>
#include <cstdint>

namespace tinyllama {

// Physical cores this process may use: affinity mask and cgroup quota respected, at least 1.
int available_cores();

// True when the library was built with OpenMP.
bool has_openmp();

// Calls body(begin, end) over disjoint ranges that cover [0, n), on at most n_threads threads.
// `body` must not throw.
template <typename Body>
void parallel_for(int n_threads, std::int64_t n, const Body& body);

struct Range {
    std::int64_t begin, end;
};

// The threads that run one step together; each holds a copy.
class Team {
public:
    struct Shared {
        alignas(64) std::atomic<int> arrived{0};
        alignas(64) std::atomic<unsigned> phase{0};
    };
    Team(int thread, int size, Shared* shared) : thread_(thread), size_(size), shared_(shared) {}

    int thread() const { return thread_; }
    int size() const { return size_; }

    // This thread's part of [0, n).
    Range share(std::int64_t n) const { return {n * thread_ / size_, n * (thread_ + 1) / size_}; }

    // Returns once every thread of the team has come here, and sees what all of them wrote.
    void barrier() const {
        if (size_ > 1) wait_for_all();
    }

private:
    void wait_for_all() const;

    int thread_;
    int size_;
    Shared* shared_;
};

// Calls body(team) on each of up to n_threads threads at once: only in the caller when that is 1,
// inside another parallel region, and in a process forked after OpenMP was started (its threads are
// gone there). `body` must not throw.
template <typename Body>
void run_team(int n_threads, const Body& body);

namespace detail {
using TeamFunction = void (*)(const void* body, const Team& team);
void run_team(int n_threads, TeamFunction function, const void* body);
}  // namespace detail

template <typename Body>
void run_team(int n_threads, const Body& body) {
    if (n_threads <= 1) {
        body(Team(0, 1, nullptr));
        return;
    }
    detail::run_team(
        n_threads, [](const void* b, const Team& team) { (*static_cast<const Body*>(b))(team); },
        &body);
}

template <typename Body>
void parallel_for(int n_threads, std::int64_t n, const Body& body) {
    run_team(static_cast<int>(n < n_threads ? n : n_threads), [&](const Team& team) {
        const Range mine = team.share(n);
        if (mine.begin < mine.end) body(mine.begin, mine.end);
    });
}

}  // namespace tinyllama
