"""Checkpoints of a run: Hugging Face directories with the trainer's own state beside the weights.

``RUN/step-00001000/`` holds ``config.json``, ``model.safetensors`` and ``tokenizer.model``, which
every Llama tool reads, and ``trainer.json`` and ``trainer.safetensors``, which only resuming needs.
``RUN/LATEST`` and ``RUN/BEST`` name a folder each and are replaced only after it is complete.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FormatError
from ..files import whole_file, whole_folder
from ..formats.checkpoint import Checkpoint
from .model import Llama, state_to_tensors, tensors_to_state

if TYPE_CHECKING:
    from torch.optim import Optimizer

    from ..formats.checkpoint import Vocabulary

FORMAT = "tinyllama-trainer"
KEPT = 2


@dataclasses.dataclass(frozen=True)
class TrainerState:
    """What resuming needs beside weights and optimizer.

    Everything else (window order, dropout, learning rate) is a function of the recipe and the
    step. ``step`` counts the finished steps; ``bits_per_byte`` is the last validation's, if any.
    """

    step: int
    recipe: dict[str, Any]
    data_sha256: str
    n_threads: int
    bits_per_byte: float | None = None
    best_bits_per_byte: float | None = None
    seconds: float = 0.0


def save_checkpoint(
    run: Path,
    state: TrainerState,
    model: Llama,
    optimizers: dict[str, Optimizer],
    vocabulary: Vocabulary,
) -> Path:
    """Write ``run/step-N``, then point LATEST (and BEST, if it is) at it, then drop old ones.

    Raises OSError when it cannot be written; then nothing new is left and the earlier
    checkpoints stand as they were.
    """
    from safetensors.torch import save_file

    from ..formats.hf import save_hf

    folder = run / f"step-{state.step:08d}"
    if folder.exists():  # written before a crash that came before LATEST
        shutil.rmtree(folder)
    tensors = state_to_tensors(model.state_dict())
    checkpoint = Checkpoint(model.config, tensors, vocabulary, source=str(folder))
    with whole_folder(folder) as part:
        save_hf(checkpoint, part)
        save_file(optimizer_tensors(model, optimizers), part / "trainer.safetensors")
        values = {"format": FORMAT, "version": 1, **dataclasses.asdict(state)}
        (part / "trainer.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    _point(run / "LATEST", folder.name)
    if state.bits_per_byte is not None and state.bits_per_byte == state.best_bits_per_byte:
        _point(run / "BEST", folder.name)
    _drop_old(run)
    return folder


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
    raise FileNotFoundError(f"{path}: neither a training run nor a checkpoint")


def load_state(folder: Path) -> TrainerState:
    """Read ``trainer.json``. Raises OSError or FormatError."""
    source = folder / "trainer.json"
    try:
        values = json.loads(source.read_text(encoding="utf-8"))
        if values.pop("format") != FORMAT or values.pop("version") != 1:
            raise FormatError(f"{source}: not a {FORMAT} file of version 1")
        return TrainerState(**values)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise FormatError(f"{source}: damaged: {error}") from None


def load_weights(folder: Path, model: Llama) -> None:
    """Put the weights of a checkpoint folder into ``model``. Raises FormatError if they differ."""
    from ..formats.hf import load_hf

    state = tensors_to_state(load_hf(folder).tensors, model.config, str(folder))
    model.load_state_dict(state)


def load_optimizers(folder: Path, model: Llama, optimizers: dict[str, Optimizer]) -> None:
    """Put ``trainer.safetensors`` back into the optimizers. Raises FormatError if it differs."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source = folder / "trainer.safetensors"
    try:
        tensors = load_file(source)
    except SafetensorError as error:
        raise FormatError(f"{source}: damaged: {error}") from None
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
                    on_cpu = tensor.dim() == 0 and parameter.device.type == "cpu"
                    found[key] = tensor if on_cpu else tensor.to(parameter.device)
                optimizer.state[parameter] = found
    if tensors:
        raise FormatError(f"{source}: unknown tensor {next(iter(tensors))}")


def optimizer_tensors(model: Llama, optimizers: dict[str, Optimizer]) -> dict[str, Any]:
    """The optimizers' state as ``{kind}/{parameter}/{field}`` -> tensor."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        f"{kind}/{names[id(parameter)]}/{field}": tensor.detach().cpu().contiguous()
        for kind, optimizer in optimizers.items()
        for parameter, fields in optimizer.state.items()
        for field, tensor in fields.items()
    }


def _point(pointer: Path, name: str) -> None:
    with whole_file(pointer) as file:
        file.write(f"{name}\n".encode())


def _drop_old(run: Path) -> None:
    folders = sorted(folder for folder in run.glob("step-*") if folder.is_dir())
    kept = {folder.name for folder in folders[-KEPT:]}
    for pointer in ("LATEST", "BEST"):
        if (run / pointer).is_file():
            kept.add((run / pointer).read_text(encoding="utf-8").strip())
    for folder in folders:
        if folder.name not in kept:
            shutil.rmtree(folder)
