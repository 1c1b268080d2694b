// Threads and teams: every piece of work done once, barriers that hold, several callers, work
// inside work, workers that had gone to sleep, and a forked child. Meant to run under -fsanitize=
// thread as well.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "parallel.h"
#if defined(__unix__) || defined(__APPLE__)
#include <sys/wait.h>
#include <unistd.h>
#endif

namespace {

using tinyllama::Team;
using tinyllama::Threads;

void expect(bool holds, const char* what) {
    if (holds) return;
    std::fprintf(stderr, "check_threads: %s\n", what);
    std::exit(1);
}

void each_piece_once(Threads& threads) {
    for (int n_threads = 1; n_threads <= 6; ++n_threads) {
        for (std::int64_t n = 0; n < 40; ++n) {
            std::vector<int> done(static_cast<std::size_t>(n));
            threads.parallel_for(n_threads, n, [&](std::int64_t begin, std::int64_t end) {
                for (std::int64_t i = begin; i < end; ++i)
                    ++done[static_cast<std::size_t>(i)];
            });
            expect(std::all_of(done.begin(), done.end(), [](int times) { return times == 1; }),
                   "a piece of work was left out, or done twice");
        }
    }
}

// Every thread writes, waits, and reads what all have written. Returns the size of the team.
int write_and_read(Threads& threads, int n_threads) {
    constexpr int n_phases = 20;
    std::array<std::array<int, 8>, n_phases> written{};
    std::atomic<int> n_wrong{0};
    std::atomic<int> size{0};
    threads.run_team(n_threads, [&](const Team& team) {
        size = team.size();
        for (int phase = 0; phase < n_phases; ++phase) {
            auto& row = written[static_cast<std::size_t>(phase)];
            row[static_cast<std::size_t>(team.thread())] = phase + 1;
            team.barrier();
            for (int i = 0; i < team.size(); ++i)
                if (row[static_cast<std::size_t>(i)] != phase + 1) ++n_wrong;
        }
    });
    expect(n_wrong == 0, "a barrier let a thread through too early");
    return size;
}

// Teams may be smaller than asked for while cores are taken, but not always, and never larger.
bool sometimes(Threads& threads, int n_threads, int size) {
    for (int round = 0; round < 1000; ++round) {
        const int got = write_and_read(threads, n_threads);
        expect(got <= size, "a team is larger than was asked for");
        if (got == size) return true;
    }
    return false;
}

void several_callers(Threads& threads) {
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
        callers.emplace_back([&threads] {
            for (int round = 0; round < 200; ++round)
                expect(write_and_read(threads, 3) >= 1, "no team");
        });
    }
    for (std::thread& caller : callers)
        caller.join();
}

void work_inside_work(Threads& threads) {
    std::atomic<int> n_outer{0}, n_inner{0};
    threads.run_team(3, [&](const Team&) {
        ++n_outer;
        threads.run_team(3, [&](const Team& team) {
            expect(team.size() == 1, "workers in use were used");
            ++n_inner;
        });
    });
    expect(n_outer == n_inner && n_outer > 0, "work inside work was lost");
}

void forked(Threads& threads) {
#if defined(__unix__) || defined(__APPLE__)
    const pid_t child = fork();
    if (child == 0) std::_Exit(sometimes(threads, 3, 3) ? 0 : 1);
    int status = 0;
    waitpid(child, &status, 0);
    expect(WIFEXITED(status) && WEXITSTATUS(status) == 0, "a forked child has no workers");
#endif
}

}  // namespace

int main() {
    Threads threads(3);
    expect(sometimes(threads, 8, 3), "a team is never as large as there are threads");
    expect(sometimes(threads, 2, 2), "a team is never as large as asked");
    each_piece_once(threads);
    for (int round = 0; round < 20; ++round) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        expect(sometimes(threads, 3, 3), "sleeping workers do not wake");
    }
    several_callers(threads);
    work_inside_work(threads);
    forked(threads);
    expect(sometimes(threads, 3, 3), "workers are gone after a fork");
    for (int round = 0; round < 50; ++round) {
        Threads shortlived(2);
        expect(sometimes(shortlived, 2, 2), "new workers do not come");
    }
    std::puts("check_threads: ok");
    return 0;
}
