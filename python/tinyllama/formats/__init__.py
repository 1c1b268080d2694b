"""File formats: each module reads one into a neutral Checkpoint and writes one from it."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ArgumentError, FormatError
from .checkpoint import Checkpoint, Vocabulary

__all__ = ["read_checkpoint", "read_vocabulary"]

KNOWN = (
    "known: a GGUF file, a Hugging Face folder (config.json, model.safetensors, tokenizer),"
    " a training run's folder, a folder with an adapter of peft, llama2.c's .bin and .pt"
)


def read_checkpoint(
    path: str | os.PathLike[str] | bytes,
    tokenizer: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
) -> Checkpoint:
    """Read a model of any known format, recognised by its first bytes, or given as bytes.

    Of the folder of a training run the best checkpoint is read (``BEST``, else ``LATEST``).

    ``tokenizer``: for llama2.c's files, which hold none; see ``llama2c.read_llama2c``. ``base``:
    for an adapter of peft, the model it was trained on; see ``adapter.load_adapter``.

    Raises OSError when there is no such file, FormatError when it is of no known format or
    damaged, ArgumentError when ``tokenizer`` or ``base`` is given for what needs none.
    """
    from .llama2c import is_versioned, read_llama2c

    if isinstance(path, bytes):
        head, suffix, source = path[:4], "", "model bytes"
    elif Path(path).is_dir():
        head, suffix, source = b"", "folder", str(path)
    else:
        with open(path, "rb") as stream:
            head, suffix, source = stream.read(4), Path(path).suffix, str(path)

    if suffix == "folder" and (Path(source) / "adapter_config.json").is_file():
        from .adapter import load_adapter

        return load_adapter(source, base)
    if base is not None:
        raise ArgumentError(f"{source}: base is given, but this is no adapter")
    if is_versioned(head) or (suffix == ".bin" and head != b"GGUF"):
        return read_llama2c(path, tokenizer)
    if head == b"PK\3\4" and suffix != "folder" and not isinstance(path, bytes):
        from .llama2c_pt import read_llama2c_pt

        return read_llama2c_pt(path, tokenizer)
    if tokenizer is not None:
        raise ArgumentError(f"{source}: tokenizer is given, but this format holds its own")
    if head == b"GGUF":
        from .gguf_read import read_gguf

        return read_gguf(path)
    if suffix == "folder" and not isinstance(path, bytes):
        from .hf import load_hf

        return load_hf(_model_folder(Path(path)))
    if suffix == ".safetensors":
        raise FormatError(f"{source}: only the weights of a model; give the folder it lies in")
    raise FormatError(f"{source}: unknown format (it begins {head!r}); {KNOWN}")


def read_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary of a SentencePiece ``.model``, of llama2.c's ``tokenizer.bin``, or of a model
    that :func:`read_checkpoint` reads: of a GGUF file or a folder without its weights.

    Raises OSError, and FormatError when it is of no known format or damaged.
    """
    path = Path(path)
    if path.is_dir():
        from .hf_tokenizer import load_tokenizer, read_json

        folder = _model_folder(path)
        return load_tokenizer(folder, read_json(folder / "config.json"))
    if path.suffix == ".model":
        from .sentencepiece import load_sentencepiece

        return load_sentencepiece(path)
    if path.name == "tokenizer.bin":
        from .llama2c import read_tokenizer_bin

        return read_tokenizer_bin(path)
    with open(path, "rb") as stream:
        if stream.read(4) == b"GGUF":
            from .gguf_read import read_gguf_vocabulary

            return read_gguf_vocabulary(path)
    return read_checkpoint(path).vocabulary


def _model_folder(folder: Path) -> Path:
    """The folder itself, or of a training run the checkpoint that it points at."""
    if (folder / "config.json").is_file():
        return folder
    for pointer in (folder / "BEST", folder / "LATEST"):
        if pointer.is_file():
            name = pointer.read_text(encoding="utf-8").strip()
            if Path(name).name != name or not (folder / name / "config.json").is_file():
                raise FormatError(f"{pointer}: names {name!r}, which is no checkpoint here")
            return folder / name
    if (folder / "metrics.jsonl").is_file():
        raise FormatError(f"{folder}: a training run that has no checkpoint yet")
    raise FormatError(f"{folder}: a folder without config.json is no model; {KNOWN}")
