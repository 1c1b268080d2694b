"""What a crowd costs: through the scheduler and without it, with one persona, and saved.

    python benchmarks/crowd.py [--cache DIR] [--docs docs]

Four questions, for 64 characters. How many tokens per second come through the scheduler, beside
bare forward passes of the same batch, which draw nothing and show no text (alternating rounds)?
What does a persona of 200 tokens cost that all of them have, beside one of its own for each? How
many bytes is a saved session of 256 tokens? How much fits into a frame?
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path

import tinyllama
from tinyllama import SamplingParams, _core
from tinyllama.model import Model

N = 64
N_PROMPT, N_NEW = 64, 128


def endless(model: Model, **options: object) -> SamplingParams:
    """Texts that the model does not end."""
    ends = (model.tokenizer.bos_id, model.tokenizer.eos_id)
    bias = {token: -math.inf for token in ends if token is not None}
    return SamplingParams(logit_bias=bias, **options)  # type: ignore[arg-type]


def prompt_of(i: int, n: int, vocab_size: int) -> list[int]:
    """Tokens that no other prompt begins with."""
    return [1, *(3 + (i * 131 + 7 * k) % (vocab_size - 3) for k in range(n - 1))]


def through_scheduler(model: Model) -> float:
    scheduler = model.scheduler(N, reserve_tokens=N * (N_PROMPT + N_NEW + 32))
    options = endless(model, max_new_tokens=N_NEW + 1, top_p=0.9)
    requests = [
        scheduler.submit(prompt_of(i, N_PROMPT, model.tokenizer.vocab_size), params=options, seed=i)
        for i in range(N)
    ]
    while not all(request.tokens for request in requests):
        scheduler.step()
    before = scheduler.stats()["tokens_drawn"]
    start = time.perf_counter()
    while scheduler.stats()["n_live"]:
        scheduler.step(16.0)  # a frame, all of it
    seconds = time.perf_counter() - start
    return (scheduler.stats()["tokens_drawn"] - before) / seconds


def bare(model: Model) -> float:
    sessions = [_core.Session(model._core, i) for i in range(N)]
    n = model.tokenizer.vocab_size
    _core.forward(sessions, [prompt_of(i, N_PROMPT, n) for i in range(N)])
    tokens = [[[3 + (i + k) % (n - 3)] for i in range(N)] for k in range(N_NEW)]
    start = time.perf_counter()
    for step in tokens:
        _core.forward(sessions, step)
    return N * N_NEW / (time.perf_counter() - start)


def persona(model: Model, shared: bool) -> dict[str, float]:
    """64 characters with 200 tokens each, the same or not, and 8 of their own."""
    n = model.tokenizer.vocab_size
    scheduler = model.scheduler(N)
    before = scheduler.stats()["kv_bytes"]
    start = time.perf_counter()
    options = endless(model, max_new_tokens=1)
    requests = [
        scheduler.submit(
            prompt_of(0 if shared else i, 200, n) + prompt_of(100 + i, 9, n)[1:], params=options
        )
        for i in range(N)
    ]
    while scheduler.stats()["n_live"]:
        scheduler.step()
    stats = scheduler.stats()
    assert len(requests) == N
    return {
        "tokens_read": stats["tokens_read"],
        "seconds": time.perf_counter() - start,
        "megabytes": (stats["kv_bytes"] - before) / 1e6,
    }


def fits(model: Model) -> dict[str, float]:
    """Milliseconds for a token of one character and of 32 together, and what 2 ms bring."""

    def speaking(n: int, n_new: int) -> tinyllama.Scheduler:
        scheduler = model.scheduler(n)
        options = endless(model, max_new_tokens=n_new)
        vocab_size = model.tokenizer.vocab_size
        requests = [
            scheduler.submit(prompt_of(i, 30, vocab_size), params=options, seed=i) for i in range(n)
        ]
        while not all(request.tokens for request in requests):
            scheduler.step()
        return scheduler

    figures = {}
    for n in (1, 32):
        scheduler = speaking(n, 60)
        before, start = scheduler.stats()["tokens_drawn"], time.perf_counter()
        while scheduler.stats()["n_live"]:
            scheduler.step(1000.0)
        n_tokens = (scheduler.stats()["tokens_drawn"] - before) / n
        figures[f"ms_for_{n}"] = 1e3 * (time.perf_counter() - start) / n_tokens
    scheduler = speaking(32, 200)
    before = scheduler.stats()["tokens_drawn"]
    for _ in range(100):
        scheduler.step(2.0)
    figures["tokens_per_2ms"] = (scheduler.stats()["tokens_drawn"] - before) / 100
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", action="append", help="a file; default: the model that ships")
    parser.add_argument("--threads", type=int, action="append", help="default: 1 and 2")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--docs", type=Path, help="write crowd.json there")
    args = parser.parse_args()
    figures = []
    for path in args.model or [None]:
        for n_threads in args.threads or [1, 2]:
            model = tinyllama.load(path, n_threads=n_threads, kv_dtype="int8")
            rounds = [(through_scheduler(model), bare(model)) for _ in range(args.rounds)]
            ours, raw = (statistics.median(column) for column in zip(*rounds, strict=True))
            one, each = persona(model, True), persona(model, False)
            session = model.session(seed=1)
            session.append(prompt_of(0, 256, model.tokenizer.vocab_size))
            figures.append(
                {
                    "model": Path(path).name if path else "the model that ships",
                    "parameters": model.info()["parameters"],
                    "threads": n_threads,
                    "scheduler_tok_per_s": round(ours),
                    "bare_tok_per_s": round(raw),
                    "share": round(statistics.median(a / b for a, b in rounds), 3),
                    "persona_once": one,
                    "persona_each": each,
                    "prefill_ratio": round(N * 200 / (one["tokens_read"] - N * 8), 1),
                    "save_bytes": len(session.save()),
                    "fits": fits(model),
                }
            )
            print(json.dumps(figures[-1], indent=2), flush=True)
    if args.docs:
        (args.docs / "crowd.json").write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
