"""GGUF, the one file the native core reads (ggml docs/gguf.md, version 3): writing it, mostly.

Matrices are (out, in) with wq and wk in interleaved rotary order, as in a Checkpoint.
"""

from __future__ import annotations

import io
import os
import struct
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..config import Config, rope_factors
from ..errors import ArgumentError
from ..files import whole_file
from .checkpoint import Checkpoint, Vocabulary
from .dtypes import BLOCK, BLOCK_BYTES, encode_tensor
from .gguf_read import LAYER_NAMES, TOP_NAMES, read_gguf

__all__ = ["gguf_bytes", "read_gguf", "write_gguf"]

ALIGNMENT = 32
# dtype -> (ggml type of a tensor, general.file_type of a file made mostly of it)
GGML_TYPES = {"f32": (0, 0), "f16": (1, 1), "q8_0": (8, 7), "q4_0": (2, 2), "bf16": (30, 32)}


def gguf_bytes(checkpoint: Checkpoint, dtype: str | None = None) -> bytes:
    """The checkpoint as the bytes of a GGUF file; see :func:`write_gguf`."""
    stream = io.BytesIO()
    _write(stream, checkpoint, dtype)
    return stream.getvalue()


def write_gguf(
    checkpoint: Checkpoint, path: str | os.PathLike[str] | BinaryIO, dtype: str | None = None
) -> None:
    """Write the checkpoint as a GGUF file, one tensor at a time: to a path, whole or not at all,
    or into a stream.

    ``dtype`` of the matrices: "f32", "f16", "bf16", "q8_0", "q4_0"; None: the checkpoint's own.
    Norms stay f32. With q4_0 the embedding and the output are q8_0, as 4 bits cost most there. For
    q8_0 and q4_0, whose blocks are 32 values of a row, hidden_dim is padded with units of zero
    weights, which contribute exactly nothing, and its true value kept under
    ``tinyllama.hidden_dim``; a matrix whose rows are no multiple of 32 for another reason (dim or
    n_heads · head_dim) stays f32.

    Raises ArgumentError for an unknown dtype, NonFiniteError when a weight is NaN or infinite or
    becomes so in f16, OSError when the file cannot be written.
    """
    if isinstance(path, (str, os.PathLike)):
        with whole_file(path) as stream:
            _write(stream, checkpoint, dtype)
    else:
        _write(path, checkpoint, dtype)


def _write(stream: BinaryIO, checkpoint: Checkpoint, dtype: str | None) -> None:
    dtype = checkpoint.dtype if dtype is None else dtype
    if dtype not in GGML_TYPES:
        raise ArgumentError(f"dtype is {dtype!r}; known: {', '.join(GGML_TYPES)}")
    config = checkpoint.config
    if dtype in BLOCK_BYTES:
        config = replace(config, hidden_dim=-(-config.hidden_dim // BLOCK) * BLOCK)
    shapes = config.tensor_shapes()
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3":
        shapes["rope_factors"] = (config.head_dim // 2,)
    dtypes = {name: _tensor_dtype(name, shape, dtype) for name, shape in shapes.items()}
    metadata = _metadata(checkpoint, config, dtype)
    stream.write(b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(metadata)))
    stream.writelines(_text(key) + value for key, value in metadata.items())
    offset = 0
    for name, shape in shapes.items():
        ggml_type, _ = GGML_TYPES[dtypes[name]]
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        stream.write(_text(gguf_name(name)) + dims + struct.pack("<IQ", ggml_type, offset))
        offset += _aligned(_n_bytes(shape, dtypes[name]))
    _pad(stream, stream.tell())
    for name, shape in shapes.items():
        if name == "rope_factors":
            tensor = rope_factors(config).astype(np.float32)
        else:
            tensor = _zero_padded(checkpoint.tensors[name], shape)
        data = encode_tensor(tensor, dtypes[name], f"{checkpoint.source}: tensor {name}")
        stream.write(data)
        _pad(stream, data.nbytes)


def gguf_name(name: str) -> str:
    """``layers.3.wq`` -> ``blk.3.attn_q.weight``, and so on."""
    if name == "rope_factors":
        return "rope_freqs.weight"
    if name in TOP_NAMES:
        return f"{TOP_NAMES[name]}.weight"
    _, layer, kind = name.split(".")
    return f"blk.{layer}.{LAYER_NAMES[kind]}.weight"


def _tensor_dtype(name: str, shape: tuple[int, ...], dtype: str) -> str:
    if len(shape) == 1 or (dtype in BLOCK_BYTES and shape[1] % BLOCK):
        return "f32"
    if dtype == "q4_0" and name in ("tok_embed", "lm_head"):
        return "q8_0"
    return dtype


def _n_bytes(shape: tuple[int, ...], dtype: str) -> int:
    n = int(np.prod(shape, dtype=np.int64))
    if dtype in BLOCK_BYTES:
        return n // BLOCK * BLOCK_BYTES[dtype]
    return n * (4 if dtype == "f32" else 2)


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


def _pad(stream: BinaryIO, n_bytes: int) -> None:
    stream.write(bytes(_aligned(n_bytes) - n_bytes))


def _zero_padded(tensor: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if tensor.shape == shape:
        return tensor
    return np.pad(tensor, [(0, to - n) for n, to in zip(tensor.shape, shape, strict=True)])


# --- metadata -----------------------------------------------------------------------------------


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def _u32(value: int) -> bytes:
    return struct.pack("<II", 4, value)


def _f32(value: float) -> bytes:
    return struct.pack("<If", 6, value)


def _bool(value: bool) -> bytes:
    return struct.pack("<I?", 7, value)


def _string(value: str) -> bytes:
    return struct.pack("<I", 8) + _text(value)


def _array(element_type: int, n: int, items: bytes) -> bytes:
    return struct.pack("<IIQ", 9, element_type, n) + items


def _metadata(checkpoint: Checkpoint, config: Config, dtype: str) -> dict[str, bytes]:
    """Key -> encoded value. ``config`` is the one written: its hidden_dim may be padded."""
    values = {
        "general.architecture": _string("llama"),
        "general.name": _string(Path(checkpoint.source).name or "tinyllama"),
        "general.file_type": _u32(GGML_TYPES[dtype][1]),
        "llama.vocab_size": _u32(config.vocab_size),
        "llama.context_length": _u32(config.max_seq_len),
        "llama.embedding_length": _u32(config.dim),
        "llama.block_count": _u32(config.n_layers),
        "llama.feed_forward_length": _u32(config.hidden_dim),
        "llama.attention.head_count": _u32(config.n_heads),
        "llama.attention.head_count_kv": _u32(config.n_kv_heads),
        "llama.attention.key_length": _u32(config.head_dim),
        "llama.attention.value_length": _u32(config.head_dim),
        "llama.attention.layer_norm_rms_epsilon": _f32(config.norm_eps),
        "llama.rope.dimension_count": _u32(config.head_dim),
        "llama.rope.freq_base": _f32(config.rope_theta),
    }
    if dtype in BLOCK_BYTES:
        values["general.quantization_version"] = _u32(2)
    if config.hidden_dim != checkpoint.config.hidden_dim:
        values["tinyllama.hidden_dim"] = _u32(checkpoint.config.hidden_dim)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        values["llama.rope.scaling.type"] = _string("linear")
        values["llama.rope.scaling.factor"] = _f32(scaling.factor)
    elif scaling is not None:  # llama3: computed from by the tensor rope_freqs, told by these
        values["tinyllama.rope_scaling.type"] = _string(scaling.kind)
        values["tinyllama.rope_scaling.factor"] = _f32(scaling.factor)
        values["tinyllama.rope_scaling.low_freq_factor"] = _f32(scaling.low_freq_factor)
        values["tinyllama.rope_scaling.high_freq_factor"] = _f32(scaling.high_freq_factor)
        values["tinyllama.rope_scaling.original_max_seq_len"] = _u32(scaling.original_max_seq_len)
    return values | _tokenizer_metadata(checkpoint.vocabulary)


def _tokenizer_metadata(vocabulary: Vocabulary) -> dict[str, bytes]:
    n = len(vocabulary)
    values = {
        "tokenizer.ggml.model": _string("llama"),
        "tokenizer.ggml.pre": _string("default"),
        "tokenizer.ggml.tokens": _array(8, n, b"".join(map(_text, vocabulary.pieces))),
        "tokenizer.ggml.scores": _array(6, n, vocabulary.scores.astype("<f4").tobytes()),
        "tokenizer.ggml.token_type": _array(5, n, vocabulary.types.astype("<i4").tobytes()),
    }
    ids = {
        "bos": vocabulary.bos_id,
        "eos": vocabulary.eos_id,
        "unknown": vocabulary.unk_id,
        "padding": vocabulary.pad_id,
    }
    for name, token in ids.items():
        if token is not None:
            values[f"tokenizer.ggml.{name}_token_id"] = _u32(token)
    values["tokenizer.ggml.add_bos_token"] = _bool(vocabulary.add_bos)
    values["tokenizer.ggml.add_eos_token"] = _bool(False)
    values["tokenizer.ggml.add_space_prefix"] = _bool(vocabulary.add_space_prefix)
    values["tokenizer.ggml.remove_extra_whitespaces"] = _bool(vocabulary.remove_extra_whitespaces)
    return values
