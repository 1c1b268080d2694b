"""What a run measures: a line of JSON per record, for TensorBoard too."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FormatError, MissingExtraError
from ..files import lock_folder, whole_file

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Records = list[dict[str, Any]]
MAX_EXPONENT = math.log(sys.float_info.max)


class Metrics:
    """``RUN/metrics.jsonl``: one object a line, each with ``step``, ``tokens`` trained on and
    ``seconds`` since the start, compilation left out. Beside these

    - a beginning, of the run or of a part that goes on: ``recipe`` and its ``source``, ``version``
      of this package, ``began`` (local time), ``n_parameters``, ``device``, ``dtype``,
      ``compiled``, ``peak_flop_per_s``, ``n_documents`` and ``n_tokens`` to train on,
      ``tokens_per_epoch``, which windows of pairs fill up with padding, the ``sources`` they come
      from (a list, as in the data's manifest), ``valid_bytes``;
    - training: ``train_nats``, the mean loss of the step's tokens, ``grad_norm`` before clipping,
      ``learning_rate`` (``muon_learning_rate`` too), and since the last such record ``tok_per_s``
      and ``peak_share``, the model's FLOPs over the measured peak;
    - validation: ``valid_nats`` with its ``standard_error``, ``bits_per_byte``;
    - a ``sample`` that continues ``prompt``;
    - an end before the last step: ``stopped``, by what;
    - energy since the start, of undone steps too: ``kwh``, ``kg_co2eq``, ``estimated_by``, and of
      how many of the steps it is, ``metered_steps``.

    Records after ``step`` are dropped on opening: they belong to steps that a crash has undone. Of
    several processes that train together one may ``write``; it makes the folder, and locks it:
    BlockingIOError where another training has. With ``tensorboard``, all numbers and samples go to
    ``RUN/tensorboard`` as well.
    """

    def __init__(self, run: Path, step: int, write: bool = True, tensorboard: bool = False) -> None:
        self.path = run / "metrics.jsonl"
        self.records: Records = []
        self._undone: Records = []
        self._unwritten = b""
        self._writes = write
        self._board: SummaryWriter | None = None
        if not write:
            return
        run.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(run)
        if tensorboard:
            self._board = _open_board(run / "tensorboard", step)
        if step and self.path.exists():
            for record in read_records(run):
                (self.records if record["step"] <= step else self._undone).append(record)
        with whole_file(self.path) as file:
            for record in self.records:
                file.write((json.dumps(record) + "\n").encode())
            self._size = file.tell()

    def log(self, step: int, **values: object) -> OSError | None:
        """Append a record. What cannot be written is kept for the next: why it cannot."""
        if not self._writes:
            return None
        record = {"step": step, **values}
        self.records.append(record)
        self._unwritten += (json.dumps(record) + "\n").encode()
        try:
            with open(self.path, "r+b", buffering=0) as file:
                file.truncate(self._size)  # what a failed write has left
                file.seek(self._size)
                if file.write(self._unwritten) < len(self._unwritten):
                    raise OSError(f"{self.path}: only a part of the record could be written")
            self._size += len(self._unwritten)
            self._unwritten = b""
            self._show(step, values)
        except OSError as error:
            return error
        return None

    def _show(self, step: int, values: dict[str, object]) -> None:
        if self._board is not None:
            if "recipe" in values:  # a beginning: no curves, but what a reader asks for
                text = json.dumps(values, indent=4, ensure_ascii=False)
                self._board.add_text("beginning", indent(text, "    "), step)
                values = {}
            for field, value in values.items():
                if isinstance(value, (int, float)) and not isinstance(value, bool):
                    self._board.add_scalar(field, value, step)
            if "sample" in values:
                self._board.add_text(str(values["prompt"]), str(values["sample"]), step)
            self._board.flush()

    def last(self, field: str, undone: bool = False) -> float:
        """The newest value of ``field``, 0 of none; ``undone``: of steps that a crash undid too."""
        records = [*self.records, *self._undone] if undone else self.records
        return next((r[field] for r in reversed(records) if field in r), 0.0)


def _open_board(folder: Path, step: int) -> SummaryWriter:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard") from error
    return SummaryWriter(str(folder), purge_step=step + 1)


def read_records(run: Path) -> Records:
    """The records of a run, which may be under way.

    Raises OSError when they cannot be read, FormatError, naming the line, when they are damaged.
    """
    path = run / "metrics.jsonl"
    records: Records = []
    if not path.is_file():
        raise FileNotFoundError(f"{run}: no training run: it has no metrics.jsonl")
    lines = path.read_bytes().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError:
            if number == len(lines):  # only the last can be half-written
                break
            raise FormatError(f"{path}: line {number} is not JSON") from None
        if not isinstance(record, dict) or not isinstance(record.get("step"), int):
            raise FormatError(f"{path}: line {number} is no record: it has no step")
        records.append(record)
    return records


def perplexity(nats: float) -> float:
    """e to the mean loss of a token; infinite where that is more than a float holds."""
    return math.exp(nats) if nats < MAX_EXPONENT else math.inf


def series(records: Iterable[dict[str, Any]], *fields: str) -> list[np.ndarray]:
    """Of each field the values, float64, from the records that have all of ``fields``.

    What is null in a record is NaN.
    """
    rows = [[r[field] for field in fields] for r in records if all(f in r for f in fields)]
    return list(np.array(rows, np.float64).reshape(-1, len(fields)).T)
