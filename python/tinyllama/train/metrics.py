"""What a run measures: a line of JSON per record, and the curve drawn from them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import FormatError
from ..files import whole_file


class Metrics:
    """``RUN/metrics.jsonl``: one object a line, each with ``step``.

    Training records carry ``train_nats`` and ``learning_rate``; validation records
    ``valid_nats`` and ``bits_per_byte``. Records after ``step`` are dropped on opening: they
    belong to steps that a crash has undone. Of several processes that train together one may
    ``write``; it makes the folder.
    """

    def __init__(self, run: Path, step: int, write: bool = True) -> None:
        self.path = run / "metrics.jsonl"
        self.records: list[dict[str, Any]] = []
        self._writes = write
        if not write:
            return
        run.mkdir(parents=True, exist_ok=True)
        if step and self.path.exists():
            self.records = [record for record in read_records(run) if record["step"] <= step]
        with whole_file(self.path) as file:
            for record in self.records:
                file.write((json.dumps(record) + "\n").encode())

    def log(self, step: int, **values: float) -> None:
        """Append a record."""
        if not self._writes:
            return
        record = {"step": step, **values}
        self.records.append(record)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def plot(self, path: Path) -> None:
        """Draw training and validation loss over the steps, in nats per token, as PNG."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot

        figure, axes = pyplot.subplots(figsize=(8, 4.5))
        for field, style in (("train_nats", "-"), ("valid_nats", "o-")):
            points = [(r["step"], r[field]) for r in self.records if field in r]
            if points:
                width = 0.6 if field == "train_nats" else 1.5
                axes.plot(*zip(*points, strict=True), style, lw=width, ms=3, label=field)
        last = [r["bits_per_byte"] for r in self.records if "bits_per_byte" in r]
        axes.set_title(f"{last[-1]:.4f} bits per byte" if last else "training")
        axes.set_xlabel("step")
        axes.set_ylabel("nats per token")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
        with whole_file(path) as file:
            figure.savefig(file, format="png", dpi=110, bbox_inches="tight")
        pyplot.close(figure)


def read_records(run: Path) -> list[dict[str, Any]]:
    """The records of a run, which may be under way.

    Raises OSError when they cannot be read, FormatError, naming the line, when they are damaged.
    """
    path = run / "metrics.jsonl"
    records = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):  # only the last can be half-written
                raise FormatError(f"{path}: line {number} is not JSON") from None
    return records
