// The only file that knows OpenMP.
#pragma once

#include <cstdint>

namespace tinyllama {

// Physical cores this process may use: affinity mask and cgroup quota respected, at least 1.
int available_cores();

// True when the library was built with OpenMP.
bool has_openmp();

// Calls body(begin, end, thread) over disjoint ranges that cover [0, n), on at most n_threads
// threads, thread < n_threads. Runs in the caller when one thread is enough, inside another
// parallel region, and in a process forked after OpenMP was started (its threads are gone there).
// `body` must not throw.
template <typename Body>
void parallel_for(int n_threads, std::int64_t n, const Body& body);

namespace detail {
using RangeFunction = void (*)(const void* body, std::int64_t begin, std::int64_t end, int thread);
void run_parallel(int n_threads, std::int64_t n, RangeFunction function, const void* body);
}  // namespace detail

template <typename Body>
void parallel_for(int n_threads, std::int64_t n, const Body& body) {
    if (n_threads <= 1 || n <= 1) {
        if (n > 0) body(std::int64_t{0}, n, 0);
        return;
    }
    detail::run_parallel(
        n_threads, n,
        [](const void* b, std::int64_t begin, std::int64_t end, int thread) {
            (*static_cast<const Body*>(b))(begin, end, thread);
        },
        &body);
}

}  // namespace tinyllama
