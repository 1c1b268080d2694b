"""Reading GGUF into a Checkpoint: llama.cpp's converters' files as well as our own.

The bytes are parsed by the native core's reader, the only one there is.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import Any

import numpy as np

from ..config import Config, RopeScaling, rope_factors
from ..errors import ConfigError, FormatError
from .checkpoint import Checkpoint, TokenType, Vocabulary
from .dtypes import decode_tensor

LAYER_NAMES = {
    "attn_norm": "attn_norm",
    "wq": "attn_q",
    "wk": "attn_k",
    "wv": "attn_v",
    "wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "w_gate": "ffn_gate",
    "w_up": "ffn_up",
    "w_down": "ffn_down",
}
TOP_NAMES = {"tok_embed": "token_embd", "final_norm": "output_norm", "lm_head": "output"}
_TOP = {f"{gguf}.weight": name for name, gguf in TOP_NAMES.items()}
_LAYER = {gguf: name for name, gguf in LAYER_NAMES.items()}


def read_gguf(path: str | os.PathLike[str] | bytes) -> Checkpoint:
    """Read a GGUF file, given as a path or as its bytes, with all weights as float32.

    Zero units that pad hidden_dim are cut off where the file tells its true value.

    Raises FormatError when the file is damaged, of another architecture, has another kind of
    tokenizer than SentencePiece, rotary scaling other than linear or llama3, or only part of each
    head rotated.
    """
    from .._core import GgufReader

    if isinstance(path, bytes):
        source, reader = "GGUF bytes", GgufReader(data=path, name="GGUF bytes")
    else:
        source = os.fspath(path)
        reader = GgufReader(path=source)
    keys = _Keys(reader.metadata(), source)
    vocabulary = _vocabulary(keys)
    listed = reader.tensors()
    names = {name for name, _, _ in listed}
    factors = None
    if "rope_freqs.weight" in names:
        factors = reader.tensor_bytes("rope_freqs.weight").view("<f4")
    config = _config(keys, len(vocabulary), "output.weight" not in names, len(listed), factors)
    shapes = config.tensor_shapes()
    tensors: dict[str, np.ndarray] = {}
    counts: Counter[str] = Counter()  # of the matrices; some may be of another dtype than most
    for gguf_name, tensor_dtype, shape in listed:
        if gguf_name == "rope_freqs.weight":
            continue
        name = _name(gguf_name)
        tensor = decode_tensor(reader.tensor_bytes(gguf_name), tensor_dtype).reshape(shape)
        tensors[name] = _without_padding(tensor, shapes.get(name), keys)
        if tensor_dtype != "f32":
            counts[tensor_dtype] += 1
    dtype = counts.most_common(1)[0][0] if counts else "f32"
    return Checkpoint(config, tensors, vocabulary, dtype, source)


def read_gguf_vocabulary(path: str | os.PathLike[str]) -> Vocabulary:
    """The vocabulary of a GGUF file, without its weights. Raises FormatError as read_gguf does."""
    from .._core import GgufReader

    source = os.fspath(path)
    return _vocabulary(_Keys(GgufReader(path=source).metadata(), source))


class _Keys:
    """Metadata with typed look-ups; without a default a key is required."""

    def __init__(self, metadata: dict[str, Any], source: str) -> None:
        self.metadata = metadata
        self.source = source

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.metadata.get(key, default)
        if isinstance(value, (list, tuple, np.ndarray)) and len(set(map(int, value))) == 1:
            value = int(value[0])  # one per layer, all the same
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(key, value, "a whole number")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.metadata.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self._wrong(key, value, "a number")
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.metadata.get(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "text")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def array(self, key: str) -> list[Any]:
        value = self.metadata.get(key)
        if not isinstance(value, (list, tuple, np.ndarray)):
            raise self._wrong(key, value, "an array")
        return list(value)

    def _wrong(self, key: str, value: object, expected: str) -> FormatError:
        found = "missing" if key not in self.metadata else repr(value)[:80]
        return FormatError(f"{self.source}: {key} is {found}, expected {expected}")


def _config(
    keys: _Keys, vocab_size: int, tied: bool, n_tensors: int, factors: np.ndarray | None
) -> Config:
    architecture = keys.text("general.architecture")
    if architecture != "llama":
        raise FormatError(f"{keys.source}: general.architecture is {architecture!r}, not 'llama'")
    n_layers = keys.integer("llama.block_count")
    if n_layers > n_tensors:  # before anything is made per layer
        raise FormatError(f"{keys.source}: llama.block_count is {n_layers}, tensors {n_tensors}")
    n_heads = keys.integer("llama.attention.head_count")
    try:
        config = Config(
            dim=keys.integer("llama.embedding_length"),
            n_layers=n_layers,
            n_heads=n_heads,
            vocab_size=vocab_size,
            max_seq_len=keys.integer("llama.context_length"),
            n_kv_heads=keys.integer("llama.attention.head_count_kv", n_heads),
            head_dim=keys.integer("llama.attention.key_length", 0),
            hidden_dim=keys.integer(
                "tinyllama.hidden_dim", keys.integer("llama.feed_forward_length")
            ),
            rope_theta=_short(keys.number("llama.rope.freq_base", 10000.0)),
            norm_eps=_short(keys.number("llama.attention.layer_norm_rms_epsilon")),
            rope_scaling=_rope_scaling(keys, factors),
            tie_embeddings=tied,
        )
    except ConfigError as error:
        raise FormatError(f"{keys.source}: {error}") from None
    for key in ("attention.value_length", "rope.dimension_count"):
        value = keys.integer(f"llama.{key}", config.head_dim)
        if value != config.head_dim:
            raise FormatError(
                f"{keys.source}: llama.{key} is {value}, only head_dim ({config.head_dim}) works"
            )
    if factors is not None and not np.allclose(factors, rope_factors(config), rtol=1e-5):
        raise FormatError(
            f"{keys.source}: the tensor rope_freqs.weight holds another scaling than llama3's"
            " usual one (low_freq_factor 1, high_freq_factor 4, original length 8192)"
        )
    return config


def _rope_scaling(keys: _Keys, factors: np.ndarray | None) -> RopeScaling | None:
    own = "tinyllama.rope_scaling"
    if f"{own}.type" in keys.metadata:
        return RopeScaling(
            keys.text(f"{own}.type"),
            _short(keys.number(f"{own}.factor")),
            _short(keys.number(f"{own}.low_freq_factor")),
            _short(keys.number(f"{own}.high_freq_factor")),
            keys.integer(f"{own}.original_max_seq_len"),
        )
    if factors is not None:  # llama.cpp's converter keeps the factors alone
        return RopeScaling("llama3", _short(float(factors.max())))
    kind = keys.text("llama.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise FormatError(
            f"{keys.source}: llama.rope.scaling.type is {kind!r}; known: 'none', 'linear', and"
            " llama3 by the tensor rope_freqs.weight"
        )
    factor = keys.number("llama.rope.scaling.factor", 1.0)
    if kind == "none" or factor == 1.0:
        return None
    return RopeScaling("linear", _short(factor))


def _short(value: float) -> float:
    """The shortest decimal number with the same float32: 1e-5 rather than 9.99999974e-06."""
    return float(str(np.float32(value)))


def _vocabulary(keys: _Keys) -> Vocabulary:
    model = keys.text("tokenizer.ggml.model")
    if model != "llama":
        raise FormatError(
            f"{keys.source}: tokenizer.ggml.model is {model!r}; only 'llama' (SentencePiece BPE)"
            " is supported"
        )
    pieces = keys.array("tokenizer.ggml.tokens")
    types = [int(TokenType.NORMAL)] * len(pieces)
    if "tokenizer.ggml.token_type" in keys.metadata:
        types = keys.array("tokenizer.ggml.token_type")

    def token(name: str, usual: int, kind: TokenType) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        if key in keys.metadata:
            return keys.integer(key)
        # Where nothing is said, llama.cpp takes Llama's own ids.
        return usual if usual < len(types) and types[usual] == kind else None

    try:
        return Vocabulary(
            tuple(pieces),
            np.array(keys.array("tokenizer.ggml.scores"), np.float32),
            np.array(types, np.int32),
            bos_id=token("bos", 1, TokenType.CONTROL),
            eos_id=token("eos", 2, TokenType.CONTROL),
            unk_id=token("unknown", 0, TokenType.UNKNOWN),
            pad_id=token("padding", len(types), TokenType.CONTROL),
            add_bos=keys.flag("tokenizer.ggml.add_bos_token", True),
            add_space_prefix=keys.flag("tokenizer.ggml.add_space_prefix", True),
            remove_extra_whitespaces=keys.flag("tokenizer.ggml.remove_extra_whitespaces", False),
        )
    except FormatError as error:
        raise FormatError(f"{keys.source}: {error}") from None


def _name(gguf_name: str) -> str:
    """``blk.3.attn_q.weight`` -> ``layers.3.wq``; an unknown name stays, for the error."""
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if match and match[2] in _LAYER:
        return f"layers.{int(match[1])}.{_LAYER[match[2]]}"
    return _TOP.get(gguf_name, gguf_name)


def _without_padding(tensor: np.ndarray, shape: tuple[int, ...] | None, keys: _Keys) -> np.ndarray:
    """Cut units that pad hidden_dim off, where they are all zero as they should be."""
    if shape is None or tensor.shape == shape or "tinyllama.hidden_dim" not in keys.metadata:
        return tensor
    padded = keys.integer("llama.feed_forward_length")
    hidden_dim = keys.integer("tinyllama.hidden_dim")
    if tensor.shape == (padded, shape[-1]) and shape[0] == hidden_dim:
        kept, rest = tensor[:hidden_dim], tensor[hidden_dim:]
    elif tensor.shape == (shape[0], padded) and shape[-1] == hidden_dim:
        kept, rest = tensor[:, :hidden_dim], tensor[:, hidden_dim:]
    else:
        return tensor  # whose shape Checkpoint refuses
    if rest.any():
        raise FormatError(f"{keys.source}: the units beyond tinyllama.hidden_dim are not zero")
    return np.ascontiguousarray(kept)
