#include "parallel.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <exception>
#include <mutex>
#include <new>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sched.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#include <signal.h>
#endif

namespace tinyllama {
namespace {

// Threads do not survive fork(): a child has none of its parent's workers, whatever it remembers.
std::atomic<unsigned> n_forks{0};

[[maybe_unused]] const bool fork_handler_installed = [] {
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { n_forks.fetch_add(1, std::memory_order_relaxed); });
#endif
    return true;
}();

// How long a thread looks out for what comes next before it gives up its core.
constexpr std::chrono::microseconds longest_spin(75);

void pause_briefly() {
#ifdef __x86_64__
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

// Waits for happened() for a while; true when it has.
template <typename Condition>
bool spin_until(const Condition& happened, std::chrono::microseconds longest = longest_spin) {
    constexpr int looks_per_clock = 16;
    std::chrono::steady_clock::time_point start{};
    for (int i = 0;; ++i) {
        if (happened()) return true;
        pause_briefly();
        if (i % looks_per_clock != 0) continue;
        const auto now = std::chrono::steady_clock::now();
        if (i == 0) start = now;
        if (now - start > longest) return false;
    }
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

#ifdef __linux__
// Cores taken by the threads of a team, each at most once. Linux wakes threads that slept on the
// core of the one that woke them, and may leave them there for milliseconds.
class TakenCores {
public:
    void clear() {
        for (auto& word : taken_)
            word.store(0, std::memory_order_relaxed);
    }

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
    void clear() {}
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

void Team::wait_for_all() const {
    const unsigned phase = shared_->phase.load(std::memory_order_relaxed);
    if (shared_->arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        shared_->arrived.store(0, std::memory_order_relaxed);
        shared_->phase.store(phase + 1, std::memory_order_release);
        return;
    }
    const auto passed = [&] { return shared_->phase.load(std::memory_order_acquire) != phase; };
    // Where other work shares the cores, the thread that is waited for may need this one.
    while (!spin_until(passed))
        std::this_thread::yield();
}

// While it lives, threads are born deaf to signals: those are the host's, for its own threads.
class SignalsBlocked {
public:
#if defined(__unix__) || defined(__APPLE__)
    SignalsBlocked() {
        sigset_t all;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before_);
    }
    ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

private:
    sigset_t before_;
#else
    SignalsBlocked() {}
#endif
};

// The workers, and the one piece of work that they are on.
struct Threads::Crew {
    // Below the number of a piece of work, how many have joined it, counted up to where it is full,
    // or has begun.
    static constexpr std::uint64_t one_work = std::uint64_t{1} << 32, too_late = 1 << 20;
    static std::uint64_t count(std::uint64_t joined_now) { return joined_now % one_work; }

    struct Worker {
        void call() {
            n_calls.fetch_add(1);
            if (!asleep.load()) return;
            const std::lock_guard<std::mutex> lock(mutex);
            called.notify_one();
        }

        alignas(64) std::atomic<unsigned> n_calls{0};
        std::atomic<bool> asleep{false};
        std::mutex mutex;
        std::condition_variable called;
        std::thread thread;
    };

    explicit Crew(const TaskSystem& tasks) : tasks_(tasks) {}

    // Tasks that are still to come keep it.
    void release() {
        if (n_users.fetch_sub(1) == 1) delete this;
    }

    ~Crew() {
        ending.store(true);
        for (const auto& worker : workers)
            worker->call();
        for (const auto& worker : workers)
            worker->thread.join();
    }

    // Fewer where the system has no more to give.
    void grow(std::size_t n) {
        if (workers.size() >= n) return;
        const SignalsBlocked blocked;
        try {
            while (workers.size() < n) {
                workers.push_back(std::make_unique<Worker>());
                Worker* const worker = workers.back().get();
                worker->thread = std::thread([this, worker] { work(worker); });
            }
        } catch (const std::exception&) {
            if (!workers.empty() && !workers.back()->thread.joinable()) workers.pop_back();
        }
    }

    // On at most n workers and the caller: those who come soon after they are called. One whose
    // core is taken by other work would hold up all.
    void run(std::size_t n, Body new_function, const void* new_body,
             std::chrono::microseconds patience) {
        if (tasks_.enqueue == nullptr) {
            grow(n);
            n = std::min(n, workers.size());
            cores.clear();
            cores.take_one();
        }
        const std::uint64_t self = begun.load() + one_work;
        const std::uint64_t nobody = too_late - n;
        joined.store(self + nobody);
        for (std::size_t i = 0; i < n; ++i)
            call(i);
        // One that Linux woke on this very core needs it for a moment, to move to another.
        const auto all_here = [&] { return count(joined.load()) >= too_late; };
        const auto start = std::chrono::steady_clock::now();
        while (!spin_until(all_here, std::chrono::microseconds(5)) &&
               std::chrono::steady_clock::now() - start < patience)
            std::this_thread::yield();
        const std::uint64_t all = count(joined.fetch_add(too_late));
        const auto n_joined = static_cast<int>(std::min(all, too_late) - nobody);
        function = new_function;
        body = new_body;
        first = nobody;
        size = n_joined + 1;
        n_working.store(n_joined, std::memory_order_relaxed);
        begun.store(self);
        new_function(new_body, Team(0, size, &shared));
        const auto finished = [&] { return n_working.load(std::memory_order_acquire) == 0; };
        while (!spin_until(finished))
            std::this_thread::yield();
    }

    void work(Worker* me) {
        for (unsigned n_seen = 0;;) {
            const auto called = [&] { return me->n_calls.load() != n_seen; };
            if (!spin_until(called)) {
                std::unique_lock<std::mutex> lock(me->mutex);
                me->asleep.store(true);
                me->called.wait(lock, called);
                me->asleep.store(false);
            }
            n_seen = me->n_calls.load();
            if (ending.load()) return;
            join();
        }
    }

    void call(std::size_t i) {
        if (tasks_.enqueue == nullptr) {
            workers[i]->call();
            return;
        }
        // Late ones come to this work as well: no more are needed.
        if (n_users.load() > static_cast<int>(i) + 1) return;
        n_users.fetch_add(1);
        const auto help = [](void* context) {
            auto* const crew = static_cast<Crew*>(context);
            crew->join();
            crew->release();
        };
        tasks_.enqueue(help, this, tasks_.user);
    }

    // Takes part in the work at hand, if it has not begun.
    void join() {
        const std::uint64_t before = joined.fetch_add(1);
        if (count(before) >= too_late) return;
        const FloatMode defaults;
        if (tasks_.enqueue == nullptr) cores.take_one();
        const std::uint64_t mine = before - count(before);
        while (!spin_until([&] { return begun.load() == mine; }))
            std::this_thread::yield();
        function(body, Team(static_cast<int>(count(before) - first) + 1, size, &shared));
        n_working.fetch_sub(1, std::memory_order_release);
    }

    const unsigned forks = n_forks.load(std::memory_order_relaxed);
    const TaskSystem tasks_;
    std::atomic<int> n_users{1};
    std::vector<std::unique_ptr<Worker>> workers;
    std::atomic<bool> ending{false};
    alignas(64) std::atomic<std::uint64_t> joined{too_late};
    alignas(64) std::atomic<std::uint64_t> begun{0};  // the number of the latest work
    Body function = nullptr;
    const void* body = nullptr;
    std::uint64_t first = 0;  // what the first to join found in the count
    int size = 1;
    Team::Shared shared;
    alignas(64) std::atomic<int> n_working{0};
    TakenCores cores;
};

void Threads::Release::operator()(Crew* crew) const { crew->release(); }

Threads::Threads(int size, const TaskSystem& tasks) : size_(size), tasks_(tasks) {}

Threads::~Threads() {
    if (crew_ != nullptr && crew_->forks != n_forks.load(std::memory_order_relaxed))
        (void)crew_.release();
}

// True when the workers are the caller's until it sets owner_ to 0. A claim from before a fork is
// the parent's.
bool Threads::claim() {
    const unsigned self = n_forks.load(std::memory_order_relaxed) + 1;
    unsigned owner = owner_.load(std::memory_order_relaxed);
    return owner != self && owner_.compare_exchange_strong(owner, self, std::memory_order_acquire);
}

void Threads::wake() {
    if (size_ <= 1 || !claim()) return;
    if (crew_ != nullptr && crew_->forks == n_forks.load(std::memory_order_relaxed)) {
        for (const auto& worker : crew_->workers)
            worker->call();
    }
    owner_.store(0, std::memory_order_release);
}

void Threads::run(int n, Body function, const void* body, std::chrono::microseconds patience) {
    n = std::min(n, size_);
    if (n <= 1 || !claim()) {
        function(body, Team(0, 1, nullptr));
        return;
    }
    if (crew_ == nullptr || crew_->forks != n_forks.load(std::memory_order_relaxed)) {
        (void)crew_.release();  // a parent's workers cannot be joined
        crew_.reset(new (std::nothrow) Crew(tasks_));
    }
    if (crew_ == nullptr) {
        function(body, Team(0, 1, nullptr));
    } else {
        crew_->run(static_cast<std::size_t>(n - 1), function, body, patience);
    }
    owner_.store(0, std::memory_order_release);
}

}  // namespace tinyllama
