"""Opening a model from whatever it comes as, and the calls that need no model at hand."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from . import _core
from .arguments import Prompt, takes_sampling
from .errors import ArgumentError
from .model import Model, StrPath
from .sampling import SamplingParams, as_int

DTYPES = ("f32", "bf16", "q8_0", "q4_0")
KV_DTYPES = ("f32", "bf16", "int8")


def load(
    path: StrPath | bytes | None = None,
    *,
    tokenizer: StrPath | None = None,
    dtype: str | None = None,
    n_threads: int | None = None,
    isa: str | None = None,
    kv_dtype: str | None = None,
    max_seq_len: int | None = None,
) -> Model:
    """Open a model.

    ``path``: a GGUF file, a Hugging Face directory, the directory of an adapter made by peft whose
    base lies where it says, a llama2.c ``.bin``, or the bytes of a GGUF file; None: the model that
    ships with the package.
    ``tokenizer``: for a ``.bin``, its ``tokenizer.bin`` or ``.model``; without it, one beside it.
    ``dtype``: keep the matrices as "f32", "bf16", "q8_0" or "q4_0" (embedding and output then
    as q8_0); None: as in the file (f16 as f32).
    ``n_threads``: None: one per physical core that the process may use, for steps of a single
    token fewer where a trial while opening shows that more would not pay.
    ``isa``: the kernel set, one of ``tinyllama.supported_isas()``; None: the environment variable
    TINYLLAMA_ISA, else the best this machine has.
    ``kv_dtype``: keep keys and values as "f32", "bf16" or "int8"; None: f32, which costs the most
    memory and no accuracy. ``max_seq_len``: a shorter context than the file's, to save memory.

    Raises FormatError or ConfigError for a damaged or unknown file, ArgumentError for a wrong
    argument, NonFiniteError for NaN among the weights, OSError when a file cannot be read. Formats
    other than GGUF may need the extra "convert" (MissingExtraError).
    """
    if dtype is not None and dtype not in DTYPES:
        raise ArgumentError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")
    if isa is not None and not isinstance(isa, str):
        raise ArgumentError(f"isa is {isa!r}; known: {', '.join(_core.supported_isas())}")
    if path is not None and not isinstance(path, (str, bytes, os.PathLike)):
        raise ArgumentError(f"path is {path!r}; it must be a path, or the bytes of a GGUF file")
    if kv_dtype is not None and kv_dtype not in KV_DTYPES:
        raise ArgumentError(f"kv_dtype is {kv_dtype!r}; known: {', '.join(KV_DTYPES)}")
    options: dict[str, Any] = {
        "n_threads": 0 if n_threads is None else as_int("n_threads", n_threads, 1),
        "isa": isa or "",
        "kv_dtype": kv_dtype or "",
        "max_seq_len": 0 if max_seq_len is None else as_int("max_seq_len", max_seq_len, 1),
    }
    if path is None:
        path = bundled_model()
    if _is_gguf(path):
        if tokenizer is not None:
            raise ArgumentError(f"tokenizer is {tokenizer}; a GGUF file brings its own")
        if isinstance(path, bytes):
            core = _core.Model(data=path, **options)
        else:
            core = _core.Model(path=os.fspath(path), **options)
        if dtype in (None, core.info["dtype"]):
            return Model(core, path)
    from .formats import read_checkpoint
    from .formats.gguf import gguf_bytes

    checkpoint = read_checkpoint(path, tokenizer=tokenizer)
    data = gguf_bytes(checkpoint, dtype)
    core = _core.Model(data=data, name=checkpoint.source, **options)
    return Model(core, path, checkpoint.config)


def find_model(name: StrPath) -> Path:
    """The path that ``name`` means where a model is asked for: "bundled" is the one that ships."""
    return bundled_model() if name == "bundled" else Path(name)


def bundled_model() -> Path:
    """The model that ships with the package. Raises FileNotFoundError where it was left out."""
    folder = Path(__file__).parent / "models"
    for path in sorted(folder.glob("*.gguf")):
        return path
    raise FileNotFoundError(f"no model ships with this installation ({folder}): name one to load")


def _is_gguf(path: StrPath | bytes) -> bool:
    if isinstance(path, bytes):
        return path[:4] == b"GGUF"
    if os.path.isdir(path):
        return False
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


@cache
def _default_model() -> Model:
    return load()


def _model(model: Model | StrPath | bytes | None) -> Model:
    if model is None:
        return _default_model()
    return model if isinstance(model, Model) else load(model)


@takes_sampling
def generate(
    prompt: Any = "",
    *,
    model: Model | StrPath | bytes | None = None,
    params: SamplingParams | None = None,
    **sampling: Any,
) -> Any:
    """Continue a prompt, or several, with ``model``: a Model, or what :func:`load` takes; None: the
    one that ships. See :meth:`Model.generate`."""
    return _model(model).generate(prompt, params=params, **sampling)


@takes_sampling
def stream(
    prompt: Prompt = "",
    *,
    model: Model | StrPath | bytes | None = None,
    params: SamplingParams | None = None,
    **sampling: Any,
) -> Iterator[str]:
    """Continue one prompt, handing out the text while it is made. See :meth:`Model.stream`."""
    return _model(model).stream(prompt, params=params, **sampling)
