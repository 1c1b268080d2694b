"""Checkpoints of a run: Hugging Face directories with the trainer's own state beside the weights.

``RUN/step-00001000/`` holds ``config.json``, ``model.safetensors`` and ``tokenizer.model``, which
every Llama tool reads, and ``trainer.json`` and ``trainer.safetensors``, which only resuming needs.
Ranks that share the optimizers' state write a file each (``trainer-00001-of-00004.safetensors`` and
so on), and any number of ranks can go on from these.

``trainer.json`` is written last and has the SHA-256 of all other files. A folder gets its name once
it is complete and on the disk; ``RUN/LATEST`` and ``RUN/BEST``, which name a folder each, are
replaced after that, and only then old folders go. So whenever a process is killed, or a disk is
full, LATEST names a whole checkpoint, or there is none yet.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from concurrent import futures
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, FormatError
from ..files import whole_file, whole_folder
from ..formats import read_checkpoint
from ..formats.checkpoint import Checkpoint
from ..loading import find_model
from .distributed import ALONE, Writers, share_of, shared_like, together, whole
from .model import Llama, state_to_tensors, tensors_to_state
from .recipe import FREE_SETTINGS, Recipe, flat, recipe_from_dict

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from ..formats.checkpoint import Vocabulary

FORMAT = "tinyllama-trainer"


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """What resuming needs beside weights and optimizer.

    Everything else (window order, dropout, learning rate) is a function of the recipe and the
    step. ``step`` counts the finished steps; ``bits_per_byte`` is the last validation's, if any.
    ``data``: how much text each split and source holds, for the record (``TokenFolder.counts``).
    """

    step: int
    recipe: dict[str, Any]
    data_sha256: str
    n_threads: int
    bits_per_byte: float | None = None
    best_bits_per_byte: float | None = None
    seconds: float = 0.0
    data: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def is_best(self) -> bool:
        """Whether this step has been validated, and none before it scored better."""
        return self.bits_per_byte is not None and self.bits_per_byte == self.best_bits_per_byte


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
    shares = [run / f".{folder.name}.{name}" for name in writers.file_names("trainer.safetensors")]
    mine, problem = shares[writers.rank], "was stopped"
    try:
        if snapshot.checkpoint is not None:
            _clear_up(run, but=f".{folder.name}.trainer")  # others may be writing theirs
        _write_share(mine, snapshot.optimizers)
        problem = ""
    except OSError as error:
        problem = str(error)
        raise
    finally:
        problems = [f"process {i}: {p}" for i, p in enumerate(writers.tell(problem)) if p]
        if problems:
            mine.unlink(missing_ok=True)
    if problems:  # of others
        raise OSError("; ".join(problems))
    if snapshot.checkpoint is not None:
        try:
            _complete(folder, snapshot.state, snapshot.checkpoint, shares)
        finally:
            for share in shares:
                share.unlink(missing_ok=True)
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

    if _target(folder.with_name("LATEST")) == folder.name and (folder / "trainer.json").is_file():
        # The same weights, perhaps scored since.
        with whole_file(folder / "trainer.json") as file:
            file.write(_manifest(folder, state))
        return
    _remove(folder)  # written before a crash that came before LATEST
    with whole_folder(folder) as part:
        save_hf(weights, part)
        for share in shares:
            shutil.copymode(part / "config.json", share)  # it was private
            os.replace(share, part / share.name.removeprefix(f".{folder.name}."))
        (part / "trainer.json").write_bytes(_manifest(part, state))


def best_checkpoint(run: Path) -> tuple[float, Path] | None:
    """Bits per byte and folder of the best checkpoint there is in ``run``, the first of equals.

    One that a kill kept from becoming LATEST is none: its step is made once more.
    """
    scored, latest = [], _target(run / "LATEST")
    for folder in run.glob("step-*"):
        if folder.name > latest:
            continue
        try:
            score = _read_manifest(folder).get("bits_per_byte")
        except (OSError, FormatError):
            continue  # whoever reads that one is told
        if isinstance(score, float) and math.isfinite(score):
            scored.append((score, folder))
    return min(scored, default=None)


def point_to_best(run: Path) -> None:
    """Let ``run``'s BEST name the best of its checkpoints, whatever ended the save of one."""
    best = best_checkpoint(run)
    if best is not None and _target(run / "BEST") != best[1].name:
        _point(run / "BEST", best[1].name)


def _manifest(folder: Path, state: TrainerState) -> bytes:
    files = {
        file.name: sha256_of(file)
        for file in sorted(folder.iterdir())
        if file.name != "trainer.json" and not file.name.startswith(".")
    }
    values = {"format": FORMAT, "version": 1, **dataclasses.asdict(state), "files": files}
    return (json.dumps(values, indent=1) + "\n").encode()


def sha256_of(file: Path) -> str:
    """The SHA-256 of a file's bytes, as hexadecimal digits."""
    with open(file, "rb") as stream:
        digest = hashlib.sha256()
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_checkpoint(path: str | os.PathLike[str], pointer: str = "LATEST") -> Path:
    """The checkpoint folder meant by ``path``: itself, or the one its ``pointer`` file names.

    Raises FileNotFoundError when there is none, FormatError when the pointer leads nowhere.
    """
    path = Path(path)
    if (path / pointer).is_file():
        name = (path / pointer).read_text(encoding="utf-8").strip()
        if Path(name).name != name or not (path / name / "config.json").is_file():
            raise FormatError(f"{path / pointer}: names {name!r}, which is no checkpoint here")
        return path / name
    if (path / "config.json").is_file():
        return path
    if (path / "metrics.jsonl").is_file():
        raise FileNotFoundError(f"{path}: a training run that has no checkpoint yet")
    raise FileNotFoundError(f"{path}: neither a training run nor a checkpoint")


def load_state(folder: Path) -> TrainerState:
    """Read ``trainer.json``. Raises OSError or FormatError."""
    values = _read_manifest(folder)
    values.pop("files")
    try:
        return TrainerState(**values)
    except TypeError as error:
        raise FormatError(f"{folder / 'trainer.json'}: damaged: {error}") from None


def previous_run(run: Path, recipe: Recipe, data_sha256: str) -> Path | None:
    """The checkpoint to go on from, if ``run`` holds one.

    Raises ConfigError when it is one of another recipe or of other data, or holds something else.
    """
    try:
        folder = find_checkpoint(run)
    except FileNotFoundError:
        _check_empty(run)
        return None
    state = load_state(folder)
    if state.data_sha256 != data_sha256:
        raise ConfigError(
            f"{run} holds a run on other data; choose another folder for --out, where"
            f" --from {run} goes on with its model"
        )
    try:
        before = recipe_from_dict(state.recipe, str(folder / "trainer.json")).to_dict()
    except ConfigError as error:
        raise FormatError(str(error)) from None
    was, now = flat(before), flat(recipe.to_dict())
    for key in now:
        if key not in FREE_SETTINGS and was[key] != now[key]:
            raise ConfigError(
                f"{run} holds a run of another recipe: {key} was {was[key]!r}, now {now[key]!r};"
                " --resume goes on with it as it was, another folder for --out begins a new one,"
                f" with --from {run} from its model"
            )
    return folder


def _check_empty(run: Path) -> None:
    """Raise ConfigError where a folder that no training has made holds something."""
    if run.exists() and not run.is_dir():
        raise ConfigError(f"{run} is a file; --out names the folder of a run")
    there = {path.name for path in run.glob("[!.]*")} if run.is_dir() else set()
    if there and not there & {"metrics.jsonl", "tensorboard"}:  # what a run writes first
        raise ConfigError(
            f"{run} is no training run, and not empty (it has {min(there)}); choose another folder"
            " for --out"
        )


def check_files(folder: Path) -> None:
    """Raise FormatError, naming the file, where one of a checkpoint is not as it was written."""
    for name, digest in _read_manifest(folder)["files"].items():
        file = folder / name
        if not file.is_file():
            problem = "is missing"
        elif sha256_of(file) != digest:
            problem = "is damaged (its SHA-256 is not the one in trainer.json)"
        else:
            continue
        others = sorted(other.name for other in folder.parent.glob("step-*") if other != folder)
        hint = f"; to go on from {others[-1]}, write that name into LATEST" if others else ""
        raise FormatError(f"{file}: {problem}{hint}")


def _read_manifest(folder: Path) -> dict[str, Any]:
    source = folder / "trainer.json"
    try:
        values: dict[str, Any] = json.loads(source.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT or values.pop("version") != 1:
            raise FormatError(f"{source}: not a {FORMAT} file of version 1")
        if not isinstance(values["files"], dict):
            raise FormatError(f"{source}: files is {values['files']!r}, not an object")
        return values
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise FormatError(f"{source}: damaged: {error}") from None


def load_weights(folder: Path, model: Llama) -> None:
    """Put the weights of a checkpoint folder into ``model``. Raises FormatError if they differ."""
    from ..formats.hf import load_hf

    state = tensors_to_state(load_hf(folder).tensors, model.config, str(folder))
    model.load_state_dict(state)


def read_start(name: str) -> Checkpoint:
    """What a recipe's ``init_from`` names: of a run the last checkpoint, or what ``load`` reads."""
    path = find_model(name)
    return read_checkpoint(find_checkpoint(path) if (path / "LATEST").is_file() else path)


def start_from(name: str, model: Llama, vocabulary: Vocabulary) -> None:
    """Put the weights that ``init_from`` names into ``model``.

    Raises ConfigError, before anything is changed, when that is a model of another shape (its
    context aside) or has other tokens than ``vocabulary``, the data's.
    """
    start = read_start(name)
    for field in dataclasses.fields(model.config):
        there, here = getattr(start.config, field.name), getattr(model.config, field.name)
        rounded = isinstance(here, float) and math.isclose(here, there, rel_tol=1e-6)
        if there != here and not rounded and field.name != "max_seq_len":
            raise ConfigError(
                f"init_from {name}: {field.name} is {there} there, model.{field.name} {here};"
                f" `tinyllama train --from {name}` takes the shape from the model"
            )
    theirs, ours = start.vocabulary.pieces, vocabulary.pieces
    if theirs != ours:
        i = next(i for i, pair in enumerate(zip(theirs, ours, strict=True)) if pair[0] != pair[1])
        raise ConfigError(
            f"init_from {name}: its tokenizer is not the data's: token {i} is {theirs[i]!r} there,"
            f" {ours[i]!r} here; prepare the data with --tokenizer {name}"
        )
    model.load_state_dict(tensors_to_state(start.tensors, model.config, start.source))


def load_optimizers(folder: Path, model: Llama, optimizers: dict[str, Optimizer]) -> None:
    """Put what ``trainer*.safetensors`` hold, each some rows, back into the optimizers.

    Raises FormatError if that differs.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    rows: dict[str, list[Tensor]] = {}
    source = folder
    for source in sorted(folder.glob("trainer*.safetensors")):
        try:
            for name, tensor in load_file(source).items():
                rows.setdefault(name, []).append(tensor)
        except SafetensorError as error:
            raise FormatError(f"{source}: damaged: {error}") from None
    tensors = {name: together(parts) for name, parts in rows.items()}
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for kind, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = f"{kind}/{names[id(parameter)]}/"
                found = {
                    key[len(prefix) :]: tensors.pop(key)
                    for key in list(tensors)
                    if key.startswith(prefix)
                }
                if not found:
                    raise FormatError(f"{source}: nothing for {prefix[:-1]}")
                for key, tensor in found.items():
                    if tensor.dim() and tensor.shape != parameter.shape:
                        raise FormatError(f"{source}: {prefix + key} has another shape")
                    found[key] = (
                        shared_like(tensor, parameter)
                        if tensor.dim()
                        else tensor.to(parameter.device)
                    )
                optimizer.state[parameter] = found
    if tensors:
        raise FormatError(f"{source}: unknown tensor {next(iter(tensors))}")


def optimizer_tensors(model: Llama, optimizers: dict[str, Optimizer]) -> dict[str, Tensor]:
    """The optimizers' state as ``{kind}/{parameter}/{field}`` -> tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{kind}/{names[id(parameter)]}/{field}": tensor
        for kind, optimizer in optimizers.items()
        for parameter, fields in optimizer.state.items()
        for field, tensor in fields.items()
    }


def _point(pointer: Path, name: str) -> None:
    with whole_file(pointer) as file:
        file.write(f"{name}\n".encode())


def _target(pointer: Path) -> str:
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""


def _drop_old(run: Path, n_kept: int) -> None:
    folders = sorted(folder for folder in run.glob("step-*") if folder.is_dir())
    kept = {folder.name for folder in folders[-n_kept:]}  # of none: all
    kept |= {_target(run / pointer) for pointer in ("LATEST", "BEST")}
    for folder in folders:
        if folder.name not in kept:
            _remove(folder)


def _remove(folder: Path) -> None:
    """A half-removed folder must not look like a checkpoint: it loses its name first."""
    if folder.exists():
        nameless = folder.with_name(f".{folder.name}.old")
        os.replace(folder, nameless)
        shutil.rmtree(nameless)


def _clear_up(run: Path, but: str) -> None:
    """What killed processes have left of folders, pointers and pages, ``but`` of those so named."""
    names = ("*step-*", "LATEST.*", "BEST.*", "metrics.jsonl.*", "report.html.*")
    found = [path for name in names for path in run.glob(f".{name}")]
    for left in [path for path in found if not path.name.startswith(but)]:
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()
