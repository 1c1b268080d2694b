#include "parallel.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <string>
#include <thread>
#include <utility>

#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __linux__
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace tinyllama {
namespace {

// OpenMP's worker threads do not survive fork(); a child that asks for them would wait forever.
bool forked_child = false;

[[maybe_unused]] const bool fork_handler_installed = [] {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { forked_child = true; });
#endif
    return true;
}();

constexpr int spins_before_yield = 2000;  // about 50 microseconds

void pause_briefly() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

#ifdef __linux__
int read_int(const std::string& path) {
    int value = -1;
    if (std::FILE* file = std::fopen(path.c_str(), "r")) {
        if (std::fscanf(file, "%d", &value) != 1) value = -1;
        std::fclose(file);
    }
    return value;
}

// Cores that the cgroup's quota pays for, or a large number without one.
int cgroup_cores() {
    int cores = 1 << 20;
    if (std::FILE* file = std::fopen("/sys/fs/cgroup/cpu.max", "r")) {
        long long quota = 0, period = 0;
        if (std::fscanf(file, "%lld %lld", &quota, &period) == 2 && quota > 0 && period > 0) {
            cores = static_cast<int>(std::max<long long>(1, (quota + period - 1) / period));
        }
        std::fclose(file);
    }
    return cores;
}
#endif

#if defined(_OPENMP) && defined(__linux__)
// Cores taken by the threads of a team, each at most once. Linux wakes threads that slept on the
// core of the one that woke them, and may leave them there for milliseconds.
class TakenCores {
public:
    // Called by each thread on its way in. One that finds its core taken moves to a free one, where
    // it may go; its affinity stays as it was.
    void take_one() {
        const int mine = sched_getcpu();
        if (mine < 0 || mine >= n_cores || take(mine)) return;
        cpu_set_t allowed;
        if (sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
        for (int i = 1; i < n_cores; ++i) {
            const int core = (mine + i) % n_cores;
            if (!CPU_ISSET(static_cast<std::size_t>(core), &allowed) || !take(core)) continue;
            cpu_set_t there;
            CPU_ZERO(&there);
            CPU_SET(static_cast<std::size_t>(core), &there);
            sched_setaffinity(0, sizeof(there), &there);
            sched_setaffinity(0, sizeof(allowed), &allowed);
            return;
        }
    }

private:
    static constexpr int n_cores = 256;

    bool take(int core) {
        const std::uint64_t bit = std::uint64_t{1} << core % 64;
        return (taken_[core / 64].fetch_or(bit, std::memory_order_relaxed) & bit) == 0;
    }

    std::atomic<std::uint64_t> taken_[n_cores / 64] = {};
};
#else
struct TakenCores {
    void take_one() {}
};
#endif

}  // namespace

int available_cores() {
#ifdef __linux__
    cpu_set_t allowed;
    if (sched_getaffinity(0, sizeof(allowed), &allowed) == 0) {
        std::set<std::pair<int, int>> cores;
        for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
            if (!CPU_ISSET(static_cast<std::size_t>(cpu), &allowed)) continue;
            const std::string topology =
                "/sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/topology/";
            const int core = read_int(topology + "core_id");
            // Without topology every CPU counts as a core of its own.
            cores.insert({read_int(topology + "physical_package_id"), core < 0 ? -1 - cpu : core});
        }
        if (!cores.empty()) return std::min(static_cast<int>(cores.size()), cgroup_cores());
    }
#endif
    return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

bool has_openmp() {
#ifdef _OPENMP
    return true;
#else
    return false;
#endif
}

void Team::wait_for_all() const {
    const unsigned phase = shared_->phase.load(std::memory_order_relaxed);
    if (shared_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        shared_->arrived.store(0, std::memory_order_relaxed);
        shared_->phase.store(phase + 1, std::memory_order_release);
        return;
    }
    for (int i = 0; shared_->phase.load(std::memory_order_acquire) == phase; ++i) {
        // Where other work shares the cores, the thread that is waited for may need this one.
        if (i < spins_before_yield) {
            pause_briefly();
        } else {
            std::this_thread::yield();
        }
    }
}

namespace detail {

void run_team(int n_threads, TeamFunction function, const void* body) {
#ifdef _OPENMP
    if (!forked_child && !omp_in_parallel()) {
        Team::Shared shared;
        TakenCores cores;
        cores.take_one();
#pragma omp parallel num_threads(n_threads)
        {
            if (omp_get_thread_num() > 0) cores.take_one();
            function(body, Team(omp_get_thread_num(), omp_get_num_threads(), &shared));
        }
        return;
    }
#endif
    (void)n_threads;
    function(body, Team(0, 1, nullptr));
}

}  // namespace detail
}  // namespace tinyllama
