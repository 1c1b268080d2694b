"""What ``tinyllama eval`` has measured, as tables and as one HTML page.

``results`` is the object that ``tinyllama eval --json`` prints.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..report import Page
from .judge import AGE_GROUPS, INSTRUCTION

N_COPIES = 5  # the longest, shown word by word


@dataclass(frozen=True)
class Table:
    """One table of results. ``caption`` says how the figures came about."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""

    def __str__(self) -> str:
        """In columns, for a terminal."""
        lines = [self.header, *self.rows]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.header))]
        shown = [
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        ]
        return "\n".join([self.title, *("  " + line for line in shown)])


def tables(results: dict[str, Any]) -> list[Table]:
    """A table for everything that was measured."""
    found = []
    if text := results.get("text"):
        rows = (
            ("bits per byte", f"{text['bits_per_byte']:.4f}"),
            ("nats per token", f"{text['nats_per_token']:.4f}"),
            *((name, f"{text[name]:,}") for name in ("documents", "bytes", "tokens")),
        )
        pairs = f"{text['pairs']:,} are pairs, of which the completions count."
        caption = pairs if text.get("pairs") else ""
        found.append(Table(f"Text: {text['file']}", ("", ""), rows, caption))
    if stories := results.get("stories"):
        found += _stories(stories)
    if tasks := results.get("tasks"):
        found.append(_tasks(tasks))
    return found


def write_page(path: str | os.PathLike[str], results: dict[str, Any]) -> None:
    """Write the tables, and the first story of every prompt. Raises OSError."""
    page = Page(f"Evaluation of {results['model']}")
    page.text(f"tinyllama {results['version']}, {results['date']}")
    for table in tables(results):
        page.heading(table.title)
        page.table(table.header, table.rows, table.caption)
    if stories := results.get("stories"):
        if stories["judge"]:
            page.heading("What the judge was told")
            page.quote(INSTRUCTION + "BEGINNING\n***\nSTORY")
        page.heading("Stories, not selected: the first of every prompt")
        page.text("What stands behind ▸ is the model's.")
        for prompt, group in zip(stories["prompts"], stories["completions"], strict=True):
            page.quote(f"{prompt} ▸{group[0]['text']}")
    page.write(path)


def _stories(stories: dict[str, Any]) -> Iterator[Table]:
    settings, measures = stories["settings"], stories["measures"]
    rows = [
        ("end properly", *_estimate(measures["ends"])),
        ("words per story", *_estimate(measures["words"], 1)),
        ("repetition (4-grams)", *_estimate(measures["repetition"])),
        *((f"distinct-{n}", f"{measures['distinct'][n - 1]:.3f}", "") for n in (1, 2, 3)),
    ]
    if measures["self_bleu"] is not None:
        rows.append(("self-BLEU", f"{measures['self_bleu']:.3f}", ""))
    yield Table(
        "Stories",
        ("", "mean", "95 % interval"),
        tuple(rows),
        f"{len(stories['prompts'])} prompts ({stories['rule']}), {settings['completions']}"
        f" completions each at temperature {settings['temperature']}, top_p {settings['top_p']},"
        f" seed {settings['seed']}. Intervals: bootstrap over prompts.",
    )
    yield Table(
        "Choices by likelihood",
        ("", "right", "95 % interval", "questions", "chance"),
        tuple(
            (kind, *_estimate(score["accuracy"]), str(score["n"]), f"{score['chance']:.2f}")
            for kind, score in stories["cloze"].items()
        ),
        "Twins of questions: who knows only which choice is more common gets half of them right.",
    )
    if stories["overlap"]:
        yield from _overlap(stories["overlap"])
    if stories["judge"]:
        yield from _judge(stories["judge"])


def _overlap(overlap: dict[str, Any]) -> Iterator[Table]:
    yield Table(
        "In common with the training text",
        ("", "mean", "95 % interval"),
        (
            ("longest copy, words", *_estimate(overlap["copied"], 1)),
            ("ROUGE-2 precision", *_estimate(overlap["rouge_2"])),
            ("ROUGE-L precision", *_estimate(overlap["rouge_l"])),
        ),
        f"Of each story with the nearest of {overlap['documents']:,} documents.",
    )
    longest = [story for story in overlap["longest"] if story["copied"]]
    yield Table(
        "The longest copies",
        ("words", "from", "copied"),
        tuple((str(s["copied"]), s["copied_from"], s["copied_text"]) for s in longest),
    )


def _judge(judge: dict[str, Any]) -> Iterator[Table]:
    noise = judge["noise"]
    rows = [
        (axis, *_estimate(score, 2), f"{noise[axis]:.2f}" if noise else "")
        for axis, score in judge["scores"].items()
        if score
    ]
    cost = judge["estimated_cost"]
    failed = f" Without a valid answer: {'; '.join(judge['failed'])}." if judge["failed"] else ""
    yield Table(
        f"Judge: {judge['model']}",
        ("0 to 10", "mean", "95 % interval", "noise" if noise else ""),
        tuple(rows),
        f"{judge['n_graded']} gradings at temperature {judge['temperature']}, seed {judge['seed']};"
        f" {judge['prompt_tokens']:,} tokens read, {judge['completion_tokens']:,} written"
        + (f", about {cost:.4f} at the prices given" if cost is not None else "")
        + ". Intervals: bootstrap over prompts."
        + (" Noise: standard deviation between gradings of one story." if noise else "")
        + failed,
    )
    yield Table(
        "Age that the judge guessed",
        ("age", "gradings"),
        tuple((AGE_GROUPS[letter], str(n)) for letter, n in judge["ages"].items()),
    )


def _tasks(tasks: dict[str, dict[str, Any]]) -> Table:
    rows = [
        (
            task,
            f"{facts['questions']:,} of {facts['of']:,}" if "of" in facts else "",
            str(facts.get("shots", "")),
            metric,
            f"{value:.4f}",
            f"{error:.4f}" if error is not None else "",
        )
        for task, facts in tasks.items()
        for metric, value in facts["metrics"].items()
        if not metric.endswith("_stderr")
        for error in [facts["metrics"].get(f"{metric}_stderr")]
    ]
    header = ("task", "questions", "shots", "metric", "", "standard error")
    return Table("Tasks of lm-evaluation-harness", header, tuple(rows))


def _estimate(estimate: dict[str, Any] | None, digits: int = 3) -> tuple[str, str]:
    if estimate is None:
        return "", ""
    mean = f"{estimate['mean']:.{digits}f}"
    if estimate["low"] is None:
        return mean, ""
    return mean, f"{estimate['low']:.{digits}f} to {estimate['high']:.{digits}f}"
