"""Runs beside each other: how good each became, and how soon."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArgumentError
from ..report import Page, new_figure
from .metrics import Records, read_records, series
from .page import (
    bits_error,
    dress,
    duration,
    newest,
    own_scores,
    plus_minus,
    smoothed,
    thinned,
)
from .recipe import flat


class Standing(NamedTuple):
    """How a run stands in a comparison: bits per byte, and tokens and seconds to the goal.

    The score from before a fine-tuning is none of it.
    ``interval``: half of the 95 % interval of ``final``, as text. ``before`` says that the first
    validation was past the goal already, so that ``tokens`` and ``seconds`` are too many.
    """

    name: str
    n_parameters: int
    final: float
    interval: str
    best: float
    tokens: float
    seconds: float
    before: bool


class Comparison:
    """Runs by their metrics. ``goal``: the bits per byte that all of them reached, which is the
    best of the worst run.

    Raises ArgumentError for one run, two of a name or one without a validation, OSError or
    FormatError for one that cannot be read.
    """

    def __init__(self, runs: Sequence[str | Path]) -> None:
        paths = [Path(run) for run in runs]
        self.records: dict[str, Records] = {}
        validations, self._beginnings = [], []
        for run in paths:
            name = str(run)
            if name in self.records:
                raise ArgumentError(f"{name} is named twice")
            self.records[name] = read_records(run)
            self._beginnings.append(newest(self.records[name], "recipe", run))
            scores = own_scores(self.records[name])
            if not scores:
                raise ArgumentError(f"{name} has no validation yet")
            validations.append(scores[-1])
        if len(paths) < 2:
            raise ArgumentError("a comparison takes two runs or more")
        bits = [
            series(own_scores(records), "bits_per_byte")[0].min()
            for records in self.records.values()
        ]
        self.goal = float(max(bits))
        self.standings = [
            self._standing(name, beginning, last)
            for name, beginning, last in zip(
                self.records, self._beginnings, validations, strict=True
            )
        ]

    @property
    def same_text(self) -> bool:
        """Whether all were validated on equally many bytes: else their scores say nothing."""
        return len({beginning["valid_bytes"] for beginning in self._beginnings}) == 1

    def _standing(self, name: str, beginning: dict[str, Any], last: dict[str, Any]) -> Standing:
        own = own_scores(self.records[name])
        tokens, seconds, bits = series(own, "tokens", "seconds", "bits_per_byte")
        first = int(np.argmax(bits <= self.goal))
        return Standing(
            name,
            beginning["n_parameters"],
            last["bits_per_byte"],
            plus_minus(bits_error(last)),
            float(bits.min()),
            _crossing(tokens, bits, first, self.goal),
            _crossing(seconds, bits, first, self.goal),
            first == 0,
        )

    def page(self) -> Page:
        """The comparison as a page. Raises MissingExtraError without matplotlib."""
        page = Page("Training runs")
        page.table(*self.table(), "± half of a 95 % interval over documents, of a run alone")
        for line in self.notes():
            page.text(line)
        header, rows = self.differences()
        if rows:
            page.table(header, rows, "in what their recipes differ")
        for title, x, y, smooth in (
            ("Validation by tokens", "tokens", "bits_per_byte", False),
            ("Validation by time", "seconds", "bits_per_byte", False),
            ("Training by tokens, smoothed", "tokens", "train_nats", True),
            ("Training by time, smoothed", "seconds", "train_nats", True),
        ):
            page.heading(title)
            figure = new_figure(8.0, 4.0)
            axes = figure.subplots()
            for name, records in self.records.items():
                at, values = series(records, x, y)
                if len(at) and smooth:
                    start = len(at) // 20  # from ln(vocabulary) everything falls alike
                    at, values = thinned(at[start:], smoothed(values)[start:])
                axes.plot(at, values, "-" if smooth else "o-", ms=3, lw=1.2, label=name)
            dress(axes, x, "nats per token" if smooth else "bits per byte")
            page.figure(figure)
        return page

    def table(self) -> tuple[list[str], list[list[object]]]:
        """Header and rows: the runs in the order they were named in."""
        goal = f"{self.goal:.4f}"
        header = ["run", "parameters", "bits per byte", "best"]
        if self.same_text:
            header += [f"tokens to {goal}", f"time to {goal}"]
        rows = []
        for s in self.standings:
            most = "≤ " if s.before else ""
            rows.append(
                [
                    s.name,
                    s.n_parameters,
                    f"{s.final:.4f}{s.interval}",
                    f"{s.best:.4f}",
                    f"{most}{s.tokens:,.0f}",
                    f"{most}{duration(s.seconds)}",
                ][: len(header)]
            )
        return header, rows

    def differences(self) -> tuple[list[str], list[list[object]]]:
        """Header and rows: the settings in which the recipes differ."""
        recipes = [flat(beginning["recipe"]) for beginning in self._beginnings]
        settings = list(dict.fromkeys(key for recipe in recipes for key in recipe))
        rows: list[list[object]] = []
        for setting in settings:
            values = [str(recipe.get(setting, "")) for recipe in recipes]
            if len(set(values)) > 1:
                rows.append([setting, *values])
        return ["setting", *self.records], rows

    def notes(self) -> list[str]:
        """What has to be said about the table."""
        notes = [
            f"{self.goal:.4f} bits per byte are what all of them reached; between two validations"
            " they are taken to fall in a straight line. On the same documents two runs differ more"
            " surely than their intervals, each of a run alone, make it seem."
        ]
        if not self.same_text:
            notes = [
                "These runs were validated on different text: their bits per byte do not compare."
            ]
        if not self.differences()[1]:
            notes.append("Their recipes are the same.")
        return notes


def _crossing(x: np.ndarray, bits: np.ndarray, first: int, goal: float) -> float:
    """``x`` where ``bits``, straight between its points, come to the goal before ``first``."""
    if first == 0:
        return float(x[0])
    before, after = first - 1, first
    return float(np.interp(-goal, -bits[[before, after]], x[[before, after]]))
