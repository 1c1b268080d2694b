// The only file that knows threads.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>

#include "float_mode.h"

namespace tinyllama {

// Physical cores this process may use: affinity mask and cgroup quota respected, at least 1.
int available_cores();

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

// Somebody else's threads, such as a game engine's: enqueue() has task(context) called soon, once,
// on any thread but the caller's. It may be late or last: what is not picked up in time is done
// without it.
struct TaskSystem {
    using Task = void (*)(void* context);
    void (*enqueue)(Task task, void* context, void* user) = nullptr;
    void* user = nullptr;
};

// The caller's thread and workers beside it, or a task system's. Workers start when they are first
// needed, stay awake for some microseconds after their work in case there is more, and sleep after
// that.
class Threads {
public:
    explicit Threads(int size, const TaskSystem& tasks = {});  // workers and caller
    ~Threads();
    Threads(const Threads&) = delete;
    Threads& operator=(const Threads&) = delete;

    int size() const { return size_; }

    // Calls body(team) on n threads at once, at most size(); on fewer where no more can be started
    // or some do not come soon, their cores taken by others; and only in the caller while the
    // workers are busy with another caller's work. `patience` is how long to wait for those who
    // sleep: no longer than the work is worth. `body` must not throw.
    template <typename Body>
    void run_team(int n, const Body& body,
                  std::chrono::microseconds patience = std::chrono::microseconds(100)) {
        const FloatMode defaults;  // as the workers compute
        if (n <= 1) {
            body(Team(0, 1, nullptr));
            return;
        }
        run(
            n, [](const void* b, const Team& team) { (*static_cast<const Body*>(b))(team); }, &body,
            patience);
    }

    // Wakes the workers that there are: work will come within microseconds.
    void wake();

    // Calls body(begin, end) over disjoint ranges that cover [0, n), likewise.
    template <typename Body>
    void parallel_for(int n_threads, std::int64_t n, const Body& body) {
        run_team(static_cast<int>(n < n_threads ? n : n_threads), [&](const Team& team) {
            const Range mine = team.share(n);
            if (mine.begin < mine.end) body(mine.begin, mine.end);
        });
    }

private:
    using Body = void (*)(const void* body, const Team& team);
    struct Crew;
    struct Release {
        void operator()(Crew* crew) const;
    };

    void run(int n, Body function, const void* body, std::chrono::microseconds patience);
    bool claim();

    int size_;
    TaskSystem tasks_;
    std::unique_ptr<Crew, Release> crew_;  // of the process that claimed it last
    std::atomic<unsigned> owner_{0};
};

}  // namespace tinyllama
