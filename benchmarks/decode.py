"""Tokens per second of one stream, beside llama.cpp on the same file and the memory ceiling.

The three are measured in turn, several times over; medians are printed. The ceiling is how often
per second the machine can read as many bytes as the weights have.
"""

import argparse
import importlib.util
import statistics
import time

import numpy as np

import tinyllama

N_TOKENS = 100


def ours(model: tinyllama.Model) -> float:
    start = time.perf_counter()
    completion = model.complete("Once upon a time", max_new_tokens=N_TOKENS, temperature=0.0)
    return len(completion.tokens) / (time.perf_counter() - start)


def llama_cpp(path: str, n_threads: int):  # -> a function that measures once
    import llama_cpp

    llama = llama_cpp.Llama(path, n_ctx=256, n_threads=n_threads, verbose=False)

    def measure() -> float:
        llama.reset()
        start = time.perf_counter()
        result = llama("Once upon a time", max_tokens=N_TOKENS, temperature=0.0)
        return result["usage"]["completion_tokens"] / (time.perf_counter() - start)

    return measure


def ceiling(n_bytes: int) -> float:
    """Reads per second of n_bytes, one thread."""
    data = np.ones(n_bytes // 8, np.int64)
    n_reads = max(3, (256 << 20) // n_bytes)
    start = time.perf_counter()
    for _ in range(n_reads):
        data.max()
    return n_reads / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-m", "--model", help="a .gguf file; default: the shipped model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    model = tinyllama.load(args.model, n_threads=args.threads)
    info = model.info()
    cases = {"tinyllama": lambda: ours(model), "ceiling (1 thread)": lambda: ceiling(info["bytes"])}
    if importlib.util.find_spec("llama_cpp"):
        cases["llama.cpp"] = llama_cpp(str(info["path"]), args.threads)
    else:
        print("llama-cpp-python is not installed: no peer to compare with")
    results: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(args.rounds):
        for name, measure in cases.items():
            results[name].append(measure())

    print(f"{info['path']}: {info['dtype']}, {info['bytes'] / 1e6:.1f} MB, {args.threads} threads")
    best = statistics.median(results["tinyllama"])
    for name, rates in results.items():
        median = statistics.median(rates)
        print(f"{name:20s} {median:10.0f} /s   tinyllama is {best / median:.2f} of it")


if __name__ == "__main__":
    main()
