"""Checkpoints are written: beside the training, whole or not at all.

``trainer.json`` is written last and has the SHA-256 of all other files. A folder gets its name once
it is complete and on the disk; ``RUN/LATEST`` and ``RUN/BEST``, which name a folder each, are
replaced after that, and only then old folders go. So whenever a process is killed, or a disk is
full, LATEST names a whole checkpoint, or there is none yet.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import sha256_of, whole_file, whole_folder
from ..formats.checkpoint import Checkpoint
from .checkpoint import FORMAT, TrainerState, best_checkpoint, named_by
from .distributed import ALONE, Writers, share_of, whole
from .model import Llama, state_to_tensors

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from ..formats.checkpoint import Vocabulary


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """A run at one step, copied, so that training may go on while it is written.

    ``checkpoint`` is None on all ranks but the first; ``optimizers`` is a rank's share.
    """

    state: TrainerState
    checkpoint: Checkpoint | None
    optimizers: dict[str, Tensor]


def take_snapshot(
    state: TrainerState,
    model: Llama,
    optimizers: dict[str, Optimizer],
    vocabulary: Vocabulary,
    first: bool = True,
) -> Snapshot:
    """Copy what this rank writes of a checkpoint into main memory; all ranks have to call this.

    The ``first`` has the weights, gathered: they are one file, which other tools read.
    """
    weights = {}
    for name, tensor in model.state_dict().items():
        full = whole(tensor.detach())
        if first:  # one at a time, or a device would have to hold all that the ranks share
            weights[name] = _copied(full)
    moments = {}
    for name, tensor in optimizer_tensors(model, optimizers).items():
        rows = share_of(tensor)
        if rows is not tensor or first:  # what all have is the first one's to write
            moments[name] = _copied(rows)
    checkpoint = None
    if first:
        tensors, source = state_to_tensors(weights), f"step {state.step}"
        checkpoint = Checkpoint(model.config, tensors, vocabulary, source=source)
    return Snapshot(state, checkpoint, moments)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.to("cpu", copy=True).contiguous()


def optimizer_tensors(model: Llama, optimizers: dict[str, Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as ``{kind}/{parameter}/{field}`` -> tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{kind}/{names[id(parameter)]}/{field}": tensor
        for kind, optimizer in optimizers.items()
        for parameter, fields in optimizer.state.items()
        for field, tensor in fields.items()
    }


class Saver:
    """Writes snapshots into ``run`` on a thread of its own, one after the other, and keeps the last
    ``n_kept`` (0: all) and the best. Each of the ``writers`` has one."""

    def __init__(self, run: Path, n_kept: int, writers: Writers) -> None:
        self.run, self.n_kept, self.writers = run, n_kept, writers
        self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._writing: futures.Future[Path] | None = None

    def start(self, snapshot: Snapshot) -> None:
        """Write it in the background, after the one before. Raises what :meth:`wait` does."""
        self.wait()
        self._writing = self._thread.submit(
            write_checkpoint, self.run, snapshot, self.n_kept, self.writers
        )

    def wait(self) -> None:
        """Wait for what is being written. Raises OSError when that failed; told once."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if kind is not None and self._writing is not None:
            futures.wait([self._writing])  # what stops the training does not stop it


def write_checkpoint(run: Path, snapshot: Snapshot, n_kept: int, writers: Writers = ALONE) -> Path:
    """Write ``run/step-N``, then point LATEST at it and BEST at the best, then drop old ones.

    Of several ``writers`` each writes its share, and once all have, the first one the rest.
    Raises OSError when it cannot be written; then nothing new is left and the earlier
    checkpoints stand as they were.
    """
    folder = run / f"step-{snapshot.state.step:08d}"
    shares = run / f".{folder.name}.trainer"  # until all are there
    names = writers.file_names("trainer.safetensors")
    problem = "was stopped"
    try:
        if snapshot.checkpoint is not None:
            _clear_up(run, but=shares)
        shares.mkdir(exist_ok=True)
        _write_share(shares / names[writers.rank], snapshot.optimizers)
        problem = ""
    except OSError as error:
        problem = str(error) or repr(error)
        raise
    finally:
        problems = [f"rank {i}: {p}" for i, p in enumerate(writers.tell(problem)) if p]
        if problems:
            shutil.rmtree(shares, ignore_errors=True)
    if problems:  # of others
        raise OSError("; ".join(problems))
    if snapshot.checkpoint is not None:
        try:
            _complete(folder, snapshot.state, snapshot.checkpoint, [shares / n for n in names])
        finally:
            shutil.rmtree(shares, ignore_errors=True)  # what killed processes have left there too
        _point(run / "LATEST", folder.name)
        point_to_best(run)
        _drop_old(run, n_kept)
    return folder


def _write_share(file: Path, tensors: dict[str, Tensor]) -> None:
    """On disk when this returns: other ranks cannot see to that."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, file)
    except SafetensorError as error:  # its name for what the system says
        raise OSError(f"{file}: {error}") from None
    with open(file, "r+b") as stream:
        os.fsync(stream.fileno())


def _complete(folder: Path, state: TrainerState, weights: Checkpoint, shares: list[Path]) -> None:
    """Make ``folder``, with the shares of the optimizers' state that all ranks have written."""
    from ..formats.hf import save_hf

    if named_by(folder.with_name("LATEST")) == folder.name and (folder / "trainer.json").is_file():
        # The same weights, perhaps scored since.
        with whole_file(folder / "trainer.json") as file:
            file.write(_manifest(folder, state))
        return
    _remove(folder)  # written before a crash that came before LATEST
    with whole_folder(folder) as part:
        save_hf(weights, part)
        for share in shares:
            shutil.copymode(part / "config.json", share)  # it was private
            os.replace(share, part / share.name)
        (part / "trainer.json").write_bytes(_manifest(part, state))


def _manifest(folder: Path, state: TrainerState) -> bytes:
    files = {
        file.name: sha256_of(file)
        for file in sorted(folder.iterdir())
        if file.name != "trainer.json" and not file.name.startswith(".")
    }
    values = {"format": FORMAT, "version": 1, **dataclasses.asdict(state), "files": files}
    return (json.dumps(values, indent=1) + "\n").encode()


def point_to_best(run: Path) -> None:
    """Let ``run``'s BEST name the best of its checkpoints, whatever ended the save of one."""
    best = best_checkpoint(run)
    if best is not None and named_by(run / "BEST") != best[1].name:
        _point(run / "BEST", best[1].name)


def _point(pointer: Path, name: str) -> None:
    with whole_file(pointer) as file:
        file.write(f"{name}\n".encode())


def _drop_old(run: Path, n_kept: int) -> None:
    folders = sorted(folder for folder in run.glob("step-*") if folder.is_dir())
    kept = {folder.name for folder in folders[-n_kept:]}  # of none: all
    kept |= {named_by(run / pointer) for pointer in ("LATEST", "BEST")}
    for folder in folders:
        if folder.name not in kept:
            _remove(folder)


def _remove(folder: Path) -> None:
    """A half-removed folder must not look like a checkpoint: it loses its name first."""
    if folder.exists():
        nameless = folder.with_name(f".{folder.name}.old")
        os.replace(folder, nameless)
        shutil.rmtree(nameless)


def _clear_up(run: Path, but: Path) -> None:
    """Remove what killed processes have left, ``but`` the place where others may be writing."""
    names = ("*step-*", "LATEST.*", "BEST.*", "metrics.jsonl.*", "report.html.*")
    found = {path for name in names for path in run.glob(f".{name}")}
    for left in found - {but}:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
