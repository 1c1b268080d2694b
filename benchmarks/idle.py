"""How soon the worker threads sleep once a step is over, with and without torch imported first.

    python benchmarks/idle.py [-m MODEL] [--torch]

The system (Linux) is asked again and again, from the end of a step on, whether any other thread of
the process still runs. Exits with 1 when half of the times it took longer than 100 microseconds.
"""

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

LIMIT_US = 100
N_STEPS = 200


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", help="a model file; default: the one that ships")
    parser.add_argument("--torch", action="store_true", help="import torch first")
    arguments = parser.parse_args()
    if arguments.torch:
        import torch

        torch.ones(512, 512) @ torch.ones(512, 512)

    import tinyllama

    model = tinyllama.load(arguments.model, n_threads=max(2, len(os.sched_getaffinity(0))))
    session = model.session()
    session.feed(range(16, 16 + 64))  # enough for the workers to have started
    me = str(os.getpid())
    others = [
        Path(f"/proc/self/task/{thread}/stat")
        for thread in os.listdir("/proc/self/task")
        if thread != me
    ]

    def running() -> bool:
        return any(file.read_bytes().rpartition(b")")[2].split()[0] == b"R" for file in others)

    microseconds = []
    for _ in range(N_STEPS):
        session.rewind(32)
        session.feed(range(16, 16 + 32))
        start = time.perf_counter()
        while running():
            pass
        microseconds.append(1e6 * (time.perf_counter() - start))
        time.sleep(0.005)
    microseconds.sort()
    median = statistics.median(microseconds)
    print(
        f"{len(others)} other threads; all asleep after {median:.0f} us (median), "
        f"{microseconds[N_STEPS * 9 // 10]:.0f} us (90 %), {microseconds[-1]:.0f} us (longest)"
    )
    return int(median > LIMIT_US)


if __name__ == "__main__":
    sys.exit(main())
