"""Turns the figures of compare.py into docs/performance.md and docs/performance.png."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Result = dict[str, Any]
KINDS = ("f32", "bf16", "q8_0", "q4_0")
# case -> what its figure is, how it is printed, whether more is better
FIGURES: dict[str, tuple[str, str, bool]] = {
    "decode": ("tokens/s", ",.0f", True),
    "prompt": ("tokens/s", ",.0f", True),
    "streams": ("tokens/s in all", ",.0f", True),
    "avx2": ("tokens/s", ",.0f", True),
    "growth": ("time per token at 700 / at 10", ".2f", False),
    "sampling": ("time per token, top_p 0.9 / greedy", ".3f", False),
    "cold": ("seconds", ".3f", False),
}

INTRODUCTION = """\
# Performance

tinyllama beside its peers on the same weights, and beside what the machine can do. Written by
`python benchmarks/compare.py`, which measures all of it; `tinyllama bench` measures ours alone.

{cpu}, {cores} cores, {system}, {date}. {versions}.

- Weights are random and seeded, decoding is greedy, no text ends early. A prompt is new each time.
- Every engine has a process of its own, and in each of {rounds} rounds everybody has a turn.
  Figures are medians over the rounds; "times the peer" is the median of the ratios within each
  round, so that a noisy hour hits both. Spread is the lowest and the highest round.
- The best peer is the fastest of all with weights of as many bits, and for prompts and streams also
  of all there are. Of llama.cpp this is the same GGUF file; int8, int4 and bfloat16 of the others
  count as q8_0, q4_0 and bf16.
- Keys and values are kept as f32 by us unless a line says kv_dtype, as each peer's default by the
  others (f16 by llama.cpp).
- The ceiling is measured in the same rounds with the same threads: how often per second the weights
  could be read (bytes of the matrices over the read bandwidth at that size) and, for prompts and
  streams, how fast they could be multiplied (the unit's peak, tiles loaded from the first-level
  cache included), whichever is slower.
- Only what one run measured is compared: on another day, or in another hour, the same machine is up
  to twice as fast or slow. Each line says when it was measured.
"""


def write(data: dict[str, Any], folder: Path) -> None:
    """performance.md and performance.png into ``folder``."""
    results = data["results"]
    groups = list(dict.fromkeys((r["model"], r["threads"]) for r in results))
    versions = ", ".join(sorted(data["versions"].values()))
    parts = [INTRODUCTION.format(**data["machine"] | data | {"versions": versions})]
    parts.append("![tokens per second, with the ceiling](performance.png)\n")
    for model, threads in groups:
        mine = [r for r in results if (r["model"], r["threads"]) == (model, threads)]
        parts.append(f"## {model}, {threads} thread{'s' * (threads > 1)}\n")
        parts += _summary(mine)
        parts += _all(mine)
    parts.append("## What the probe measured\n")
    parts.append(_table(["medians", ""], [[k, f"{v:,.1f}"] for k, v in data["probe"].items()]))
    if data["left_out"]:
        parts.append("## Left out\n")
        parts.append("\n".join(f"- {what}: {why}" for what, why in data["left_out"].items()) + "\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "performance.md").write_text("\n".join(parts))
    _chart(results, folder / "performance.png")
    print(f"wrote {folder / 'performance.md'} and performance.png")


def _summary(results: list[Result]) -> Iterator[str]:
    """Ours beside the best peer, a line per case and kind of weights."""
    rows = []
    for case in dict.fromkeys(r["case"] for r in results):
        form = FIGURES[case.split()[0]][1]
        for ours in _of(results, case, lambda r: r["engine"] == "tinyllama"):
            together = [r for r in results if r["run"] == ours["run"]]
            same = _best(together, case, lambda r, kind=ours["kind"]: r["kind"] == kind)
            best = _best(together, case, lambda r: True)
            share = f"{_median(ours) / ours['ceiling']:.0%}" if "ceiling" in ours else ""
            row = [case, ours["weights"], f"{_median(ours):{form}}", _spread(ours, form)]
            rows.append([*row, share, *_against(ours, same, form), *_against(ours, best, form)])
            rows[-1].append(_day(ours))
    if rows:
        yield "Ours and the best peers (units are below):\n"
        head = ["case", "weights", "ours", "spread", "of the ceiling"]
        head += ["best peer, same bits", "times the peer", "best peer of all", "times the peer"]
        head.append("measured")
        yield _table(head, rows)


def _all(results: list[Result]) -> Iterator[str]:
    """A table per case: every engine, best first."""
    for case in dict.fromkeys(r["case"] for r in results):
        unit, form, more = FIGURES[case.split()[0]]
        rows = []
        extras = [
            ("p50_ms", "p50, ms", ".3f"),
            ("p99_ms", "p99, ms", ".3f"),
            ("load_s", "import and load, s", ".3f"),
            ("memory_mb", "peak memory, MB", ",.0f"),
        ]
        mine = _of(results, case, lambda r: True)
        extras = [extra for extra in extras if any(extra[0] in r for r in mine)]
        limited = any("ceiling" in r for r in mine)
        for r in sorted(mine, key=_median, reverse=more):
            row = [r["engine"], r["weights"], f"{_median(r):{form}}", _spread(r, form)]
            if limited:
                row += [f"{r['ceiling']:,.0f}", f"{_median(r) / r['ceiling']:.0%}"]
            for name, _, extra_form in extras:
                row.append("" if r.get(name) is None else f"{r[name]:{extra_form}}")
            rows.append([*row, _day(r)])
        head = ["engine", "weights", unit, "spread"] + ["ceiling", "share"] * limited
        yield f"### {case}\n"
        yield _table([*head, *(title for _, title, _ in extras), "measured"], rows)


def _of(results: list[Result], case: str, wanted: Callable[[Result], bool]) -> list[Result]:
    return [r for r in results if r["case"] == case and wanted(r)]


def _best(results: list[Result], case: str, wanted: Callable[[Result], bool]) -> Result | None:
    peers = _of(results, case, lambda r: r["engine"] != "tinyllama" and wanted(r))
    more = FIGURES[case.split()[0]][2]
    return (max if more else min)(peers, key=_median, default=None)


def _against(ours: Result, peer: Result | None, form: str) -> list[str]:
    if peer is None:
        return ["", ""]
    pairs = zip(ours["rounds"], peer["rounds"], strict=False)
    ratio = statistics.median(a / b for a, b in pairs)
    return [f"{peer['engine']} {peer['weights']}: {_median(peer):{form}}", f"{ratio:.2f}"]


def _median(result: Result) -> float:
    return statistics.median(result["rounds"])


def _day(result: Result) -> str:
    day: str = result["run"].split()[0]
    return day


def _spread(result: Result, form: str) -> str:
    return f"{min(result['rounds']):{form}} – {max(result['rounds']):{form}}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["--"] * len(head), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _chart(results: list[Result], path: Path) -> None:
    """A panel per model, at its most threads: ours, the best peer of as many bits, the ceiling."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    results = [r for r in results if "ceiling" in r and r["case"] != "avx2"]
    models = list(dict.fromkeys(r["model"] for r in results))
    if not models:
        return
    figure, panels = plt.subplots(
        len(models), 1, figsize=(11, 3.2 * len(models)), squeeze=False, layout="constrained"
    )
    for panel, model in zip(panels[:, 0], models, strict=True):
        threads = max(r["threads"] for r in results if r["model"] == model)
        mine = [r for r in results if (r["model"], r["threads"]) == (model, threads)]
        bars = list(_bars(mine))
        for i, (_, ours, peer, ceiling) in enumerate(bars):
            first = i == 0
            panel.bar(i - 0.2, ours, 0.4, color="#2a6fbb", label="tinyllama" if first else None)
            if peer:
                panel.bar(i + 0.2, peer, 0.4, color="#b0b0b0", label="best peer" if first else None)
            label = "ceiling" if first else None
            panel.hlines(ceiling, i - 0.42, i + 0.42, color="#c0392b", linewidth=2, label=label)
        panel.set_xticks(range(len(bars)), [name for name, *_ in bars], fontsize=7)
        panel.set_yscale("log")
        panel.set_ylim(bottom=min(min(ours, peer or ours) for _, ours, peer, _ in bars) / 2)
        panel.set_ylabel("tokens per second")
        panel.set_title(f"{model}, {threads} thread{'s' * (threads > 1)}", fontsize=10)
        panel.legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _bars(results: list[Result]) -> Iterator[tuple[str, float, float | None, float]]:
    """(label, ours, best peer with as many bits, ceiling) of each case and kind of weights, ours
    without options."""
    for case in dict.fromkeys(r["case"] for r in results):
        ours = _of(
            results, case, lambda r: r["engine"] == "tinyllama" and r["weights"] == r["kind"]
        )
        for result in sorted(ours, key=lambda r: KINDS.index(r["kind"])):
            together = [r for r in results if r["run"] == result["run"]]
            peer = _best(together, case, lambda r, kind=result["kind"]: r["kind"] == kind)
            label = f"{case}\n{result['kind']}"
            yield label, _median(result), peer and _median(peer), result["ceiling"]
