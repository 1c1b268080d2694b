"""How well a scheduler keeps to a frame's budget: a crowd that talks, joins and leaves.

    python benchmarks/frames.py --cache /tmp/models --out frames.png
    python benchmarks/frames.py --cache /tmp/models --model stories110m --budgets 2 --frames 2000

After each frame comes one that only looks at the clock until the same budget is over: what the
machine itself holds up shows there.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from models import MODELS, Files
from tqdm import trange

import tinyllama

MAX_SESSIONS = 64


class Crowd:
    """Texts of random length, 40 to 64 at once; now and then one is sent away."""

    def __init__(self, model: tinyllama.Model, seed: int) -> None:
        self.scheduler = model.scheduler(MAX_SESSIONS, reserve_tokens=MAX_SESSIONS * 256)
        self._rng = np.random.default_rng(seed)
        self._vocab_size = model.tokenizer.vocab_size
        self._live: list[tinyllama.Request] = []
        self.n_joined = self.n_left = 0

    def come_and_go(self) -> None:
        rng = self._rng
        self._live = [request for request in self._live if not request.done]
        if len(self._live) < MAX_SESSIONS and (len(self._live) < 40 or rng.random() < 0.3):
            prompt = rng.integers(300, self._vocab_size, rng.integers(4, 60)).tolist()
            self._live.append(
                self.scheduler.submit(
                    prompt, seed=self.n_joined, max_new_tokens=int(rng.integers(10, 150))
                )
            )
            self.n_joined += 1
        if rng.random() < 0.02:
            self._live.pop(rng.integers(len(self._live))).cancel()
            self.n_left += 1


def only_wait(budget_ms: float) -> None:
    end = time.perf_counter() + budget_ms / 1e3
    while time.perf_counter() < end:
        pass


def measure(model: tinyllama.Model, budget_ms: float, n_frames: int, rest_ms: float) -> Any:
    crowd = Crowd(model, seed=0)
    overrun = np.zeros((2, n_frames))
    for frame in trange(n_frames, desc=f"{budget_ms} ms", leave=False):
        crowd.come_and_go()
        for i, work in enumerate((crowd.scheduler.step, only_wait)):
            start = time.perf_counter()
            work(budget_ms)
            overrun[i, frame] = 1e3 * (time.perf_counter() - start) - budget_ms
            time.sleep(rest_ms / 1e3)
    stats = crowd.scheduler.stats()
    seconds = n_frames * budget_ms / 1e3
    return overrun, {
        "budget_ms": budget_ms,
        "frames": n_frames,
        "joined": crowd.n_joined,
        "sent_away": crowd.n_left,
        "tokens_per_second_of_budget": stats["tokens_drawn"] / seconds,
        "share_of_budget_used": stats["spent_ms"] / 1e3 / seconds,
        **{
            f"{name}_{q}": float(np.percentile(values, q))
            for name, values in (("overrun_ms", overrun[0]), ("clock_alone_ms", overrun[1]))
            for q in (50, 99, 99.9)
        },
        "overrun_ms_most": float(overrun[0].max()),
    }


def draw(results: list[tuple[Any, dict[str, Any]]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        len(results), 1, figsize=(8, 2.2 * len(results)), squeeze=False, layout="constrained"
    )
    for panel, (overrun, summary) in zip(panels[:, 0], results, strict=True):
        low = -min(summary["budget_ms"], 0.5)
        bins = np.linspace(low, 0.5, 120)
        for values, label, color in zip(
            overrun, ("step", "the clock alone"), ("#2a6fbb", "#b0b0b0"), strict=True
        ):
            panel.hist(
                values.clip(low, 0.5),
                bins,
                label=label,
                color=color,
                histtype="step",
                linewidth=1.5,
            )
        for limit in (0.1, 0.25):
            panel.axvline(limit, color="#c0392b", linewidth=0.8)
        panel.set_yscale("log")
        panel.set_title(
            f"budget {summary['budget_ms']} ms: 99 % {summary['overrun_ms_99']:+.3f} ms, "
            f"99.9 % {summary['overrun_ms_99.9']:+.3f} ms",
            fontsize=9,
        )
        panel.legend(fontsize=7)
    panels[-1, 0].set_xlabel("milliseconds beyond the budget")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cache", type=Path, default=Path("benchmark-models"), metavar="DIR")
    parser.add_argument("--model", default="stories15m", choices=MODELS)
    parser.add_argument("--format", default="q8_0")
    parser.add_argument("--kv-dtype", default="f32")
    parser.add_argument("--threads", type=int, help="default: all cores")
    parser.add_argument("--budgets", default="0.5,1,2,4", metavar="MS,MS")
    parser.add_argument("--frames", type=int, default=20_000)
    parser.add_argument("--rest", type=float, default=1.0, metavar="MS", help="between frames")
    parser.add_argument("--out", type=Path, metavar="PNG", help="histograms; a .json beside it")
    arguments = parser.parse_args()
    path = Files(arguments.cache, arguments.model).path("tinyllama", arguments.format)
    model = tinyllama.load(path, kv_dtype=arguments.kv_dtype, n_threads=arguments.threads)
    load = os.getloadavg()[0]
    info = model.info()
    title = (
        f"{arguments.model}, {arguments.format}, cache {info['kv_dtype']}, "
        f"threads: {info['n_threads']}, load before {load:.2f}"
    )
    print(title)
    results = []
    for budget in arguments.budgets.split(","):
        results.append(measure(model, float(budget), arguments.frames, arguments.rest))
        print(json.dumps(results[-1][1]))
    if arguments.out is not None:
        draw(results, title, arguments.out)
        summaries = [summary for _, summary in results]
        report = {"title": title, "results": summaries}
        arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
