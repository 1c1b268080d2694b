"""``tinyllama bench``: how fast a model runs here."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from .loading import MODELS, add_model_options, open_model

if TYPE_CHECKING:
    from ..model import Model

EPILOG = """\
examples:
  tinyllama bench
  tinyllama bench -m model.gguf
  tinyllama bench -m model.gguf --dtype f32 --threads 1

The figures are medians, of greedy decoding after random prompts. Close other programs first, and
run it twice: machines are noisy. Beside other engines: benchmarks/compare.py in the source.
"""
LIMIT = 4.0  # seconds, about, for each figure
N_NEW = 100


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``bench``."""
    parser = subparsers.add_parser(
        "bench",
        help="measure how fast a model runs here",
        description="Measure, in about a minute: loading, decoding one text (and the share of what"
        " reading the weights\nfrom memory allows), reading a prompt, and decoding 8 and 32 texts"
        " at once; on one thread and on all.\n\n" + MODELS,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-m", "--model", help="default: the model that ships with the package")
    add_model_options(parser)
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> None:
    model = open_model(args.model, args)  # the first time also brings the file into memory
    info = model.info()
    print(f"{info['path']}: {info['parameters']:,} parameters, {info['dtype']}, {info['isa']}")
    counts = [info["n_threads"]] if args.threads else sorted({1, info["n_threads"]})
    for args.threads in counts:
        del model
        begin = time.perf_counter()
        model = open_model(args.model, args)
        load = time.perf_counter() - begin
        print(f"\n{args.threads} thread{'s' * (args.threads > 1)}")
        _line("load", f"{1e3 * load:,.1f} ms")
        _measure(model, args.threads)


def _measure(model: Model, n_threads: int) -> None:
    """Print every figure as soon as it is there."""
    rng = np.random.default_rng(0)
    room = model.config.max_seq_len
    first = min(3, model.tokenizer.vocab_size - 1)  # after unknown, begin and end

    def prompt(n: int) -> list[int]:
        ids: list[int] = rng.integers(first, model.tokenizer.vocab_size, min(n, room)).tolist()
        return ids

    def streams(n: int) -> float:
        prompts = [prompt(5) for _ in range(n)]
        begin = time.perf_counter()
        done = model.complete(prompts, max_new_tokens=32, min_new_tokens=32, temperature=0.0)
        return sum(len(one.tokens) for one in done) / (time.perf_counter() - begin)

    def read(n: int) -> float:
        tokens = prompt(n)
        begin = time.perf_counter()
        model.complete(tokens, max_new_tokens=1, temperature=0.0)
        return len(tokens) / (time.perf_counter() - begin)

    times = sorted(_decode(model, prompt(5)))
    median, p99 = statistics.median(times), times[int(0.99 * len(times))]
    ceiling = _reads_per_second(_bytes_per_token(model), n_threads)
    _line("decode", f"{1 / median:,.0f} tokens/s", f"{1 / median / ceiling:.0%} of the ceiling")
    _line("  per token", f"{1e3 * median:.3f} ms", f"99 of 100 within {1e3 * p99:.3f} ms")
    _line("  ceiling", f"{ceiling:,.0f} tokens/s", "reading the weights, as numpy does")
    n = min(200, room)
    _line(f"prompt of {n}", f"{_median_of(read, n):,.0f} tokens/s")
    for n in (8, 32):
        _line(f"{n} texts", f"{_median_of(streams, n):,.0f} tokens/s", "in all")


def _line(name: str, value: str, note: str = "") -> None:
    print(f"  {name:<16}{value:>18}   {note}".rstrip(), flush=True)


def _decode(model: Model, prompt: list[int]) -> list[float]:
    """Seconds of each token, of as many texts as there is time for."""
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < LIMIT:
        session = model.session(seed=0)
        session.feed(prompt)
        n = min(N_NEW, session.room)
        then, n_then = time.perf_counter(), session.n_tokens
        for _ in session.generate(max_new_tokens=n, min_new_tokens=n, temperature=0.0):
            now, n_now = time.perf_counter(), session.n_tokens
            n_drawn = n_now - n_then  # several where tokens are parts of one character
            times += [(now - then) / n_drawn] * n_drawn
            then, n_then = now, n_now
            if now - begin > LIMIT:
                break
    return times


def _median_of(measure: Callable[[int], float], n: int) -> float:
    """The median of as many runs as there is time for, after one that warms up."""
    begin = time.perf_counter()
    measure(n)
    results: list[float] = []
    while not results or time.perf_counter() - begin < LIMIT:
        results.append(measure(n))
    return statistics.median(results)


def _bytes_per_token(model: Model) -> int:
    """Weights that a token is multiplied with: all but an embedding that is nothing else."""
    info, config = model.info(), model.config
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.dim
    return int(info["bytes"] * (1 - embedding / info["parameters"]))


def _reads_per_second(n_bytes: int, n_threads: int) -> float:
    """How often n_threads together read n_bytes of memory in a second."""
    parts = [np.ones(max(1, n_bytes // 8 // n_threads), np.int64) for _ in range(n_threads)]
    n_times = max(1, (128 << 20) // n_bytes)

    def read(part: np.ndarray) -> None:
        for _ in range(n_times):
            part.max()  # vectorised, and without the interpreter's lock

    def measure() -> float:
        begin = time.perf_counter()
        list(pool.map(read, parts))
        return n_times / (time.perf_counter() - begin)

    with ThreadPoolExecutor(n_threads) as pool:
        measure()
        return max(measure() for _ in range(7))
