"""Checkpoints of a run: Hugging Face directories with the trainer's own state beside the weights.

``RUN/step-00001000/`` holds ``config.json``, ``model.safetensors`` and ``tokenizer.model``, which
every Llama tool reads, and ``trainer.json`` and ``trainer.safetensors``, which only resuming needs.
Ranks that share the optimizers' state write a file each (``trainer-00001-of-00004.safetensors`` and
so on), and any number of ranks can go on from these. ``trainer.json`` has the SHA-256 of all other
files; ``RUN/LATEST`` and ``RUN/BEST`` name a folder each. How they come there: ``saving.py``.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError, FormatError
from ..files import sha256_of
from ..formats import read_checkpoint
from ..formats.checkpoint import Checkpoint
from ..loading import find_model
from .recipe import FREE_SETTINGS, Recipe, flat, recipe_from_dict

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

    from ..formats.checkpoint import Vocabulary
    from .model import Llama

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


def best_checkpoint(run: Path) -> tuple[float, Path] | None:
    """Bits per byte and folder of the best checkpoint there is in ``run``, the first of equals.

    One that a kill kept from becoming LATEST is none: its step is made once more.
    """
    scored, latest = [], named_by(run / "LATEST")
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


def check_files(folder: Path, resuming: bool = True) -> None:
    """Raise FormatError, naming the file, where one of a checkpoint is not as it was written.

    Those of the trainer are looked at only when ``resuming``, which alone needs them.
    """
    for name, digest in _read_manifest(folder)["files"].items():
        file = folder / name
        if name.startswith("trainer") and not resuming:
            continue
        if not file.is_file():
            problem = "is missing"
        elif sha256_of(file) != digest:
            problem = "is damaged (its SHA-256 is not the one in trainer.json)"
        else:
            continue
        before = sorted(o.name for o in folder.parent.glob("step-*") if o.name < folder.name)
        hint = f"; to go on from {before[-1]}, write that name into LATEST" if before else ""
        hint = hint if resuming else ""
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
    from .model import tensors_to_state

    state = tensors_to_state(load_hf(folder).tensors, model.config, str(folder))
    model.load_state_dict(state)


def read_start(name: str) -> Checkpoint:
    """What a recipe's ``init_from`` names: of a run the last checkpoint, or what ``load`` reads.

    Raises FormatError when a checkpoint's files are not as they were written.
    """
    path = find_model(name)
    if (path / "LATEST").is_file():
        path = find_checkpoint(path)
    if (path / "trainer.json").is_file():
        check_files(path, resuming=False)
    return read_checkpoint(path)


def start_from(name: str, model: Llama, vocabulary: Vocabulary) -> None:
    """Put the weights that ``init_from`` names into ``model``.

    Raises ConfigError, before anything is changed, when that is a model of another shape (its
    context aside) or has other tokens than ``vocabulary``, the data's.
    """
    from .model import tensors_to_state

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

    from .distributed import shared_like, together

    shares: dict[str, list[Tensor]] = {}  # maps of the files: put together one at a time
    source = folder
    for source in sorted(folder.glob("trainer*.safetensors")):
        try:
            for name, rows in load_file(source).items():
                shares.setdefault(name, []).append(rows)
        except SafetensorError as error:
            raise FormatError(f"{source}: damaged: {error}") from None
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for kind, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                prefix = f"{kind}/{names[id(parameter)]}/"
                found = {}
                for key in [key for key in shares if key.startswith(prefix)]:
                    tensor = together(shares.pop(key))
                    if tensor.dim() and tensor.shape != parameter.shape:
                        raise FormatError(f"{source}: {key} has another shape")
                    found[key[len(prefix) :]] = (
                        shared_like(tensor, parameter)
                        if tensor.dim()
                        else tensor.to(parameter.device)
                    )
                if not found:
                    raise FormatError(f"{source}: nothing for {prefix[:-1]}")
                optimizer.state[parameter] = found
    if shares:
        raise FormatError(f"{source}: unknown tensor {next(iter(shares))}")


def named_by(pointer: Path) -> str:
    """The name of the checkpoint that LATEST or BEST names; empty of no such file."""
    return pointer.read_text(encoding="utf-8").strip() if pointer.is_file() else ""
