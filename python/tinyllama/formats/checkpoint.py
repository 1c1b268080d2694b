"""Checkpoint: the neutral form every file format is read into and written from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from ..config import Config
from ..errors import FormatError


class TokenType(IntEnum):
    """What a token is; the numbers are those of GGUF and of sentencepiece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """A SentencePiece-BPE vocabulary.

    ``pieces[i]`` is token i's text with U+2581 for a space; byte tokens read ``<0xHH>``.
    ``scores`` float32 (n,): the pair with the highest score merges first.
    ``types`` int32 (n,): values of TokenType.
    """

    pieces: tuple[str, ...]
    scores: np.ndarray
    types: np.ndarray
    bos_id: int | None = 1
    eos_id: int | None = 2
    unk_id: int | None = 0
    pad_id: int | None = None
    add_bos: bool = True
    add_space_prefix: bool = True
    remove_extra_whitespaces: bool = False

    def __post_init__(self) -> None:
        n = len(self.pieces)
        for name in ("scores", "types"):
            shape = getattr(self, name).shape
            if shape != (n,):
                raise FormatError(f"tokenizer {name} has shape {shape}, but there are {n} pieces")
        if not np.isfinite(self.scores).all():
            bad = int(np.flatnonzero(~np.isfinite(self.scores))[0])
            raise FormatError(f"tokenizer score of token {bad} is {self.scores[bad]}")
        for name in ("bos_id", "eos_id", "unk_id", "pad_id"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < n:
                raise FormatError(f"tokenizer {name} is {value}, outside the {n} tokens")

    def __len__(self) -> int:
        return len(self.pieces)


@dataclass(frozen=True)
class Checkpoint:
    """A model in memory: shape, weights, and how text becomes tokens.

    ``tensors`` holds float32 arrays under the names and shapes of ``Config.tensor_shapes()``.
    ``dtype`` is how the weights were stored where they came from ("f32", "f16", "bf16", "q8_0",
    "q4_0"): what a writer uses unless told otherwise. ``source`` names that place in error
    messages.

    Raises FormatError when a tensor is missing, unknown or of the wrong shape, or when the
    tokenizer's size is not the model's.
    """

    config: Config
    tensors: Mapping[str, np.ndarray]
    vocabulary: Vocabulary
    dtype: str = "f32"
    source: str = "checkpoint"

    def __post_init__(self) -> None:
        shapes = self.config.tensor_shapes()
        for name, shape in shapes.items():
            tensor = self.tensors.get(name)
            if tensor is None:
                raise FormatError(f"{self.source}: tensor {name} is missing")
            if tensor.shape != shape:
                raise FormatError(
                    f"{self.source}: tensor {name} has shape {tensor.shape}, expected {shape}"
                )
            if tensor.dtype != np.float32:
                raise FormatError(
                    f"{self.source}: tensor {name} is {tensor.dtype}, expected float32"
                )
        unknown = sorted(set(self.tensors) - set(shapes))
        if unknown:
            raise FormatError(f"{self.source}: unknown tensor {unknown[0]}")
        if len(self.vocabulary) != self.config.vocab_size:
            raise FormatError(
                f"{self.source}: the tokenizer has {len(self.vocabulary)} tokens,"
                f" the model's vocab_size is {self.config.vocab_size}"
            )
