"""GGUF files put together by hand, so that tests can get every field of them wrong."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import Any

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = dict(zip((U8, I8, U16, I16, U32, I32, F32, BOOL), "BbHhIif?", strict=True))
FORMATS |= {U64: "Q", I64: "q", F64: "d"}


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def value(kind: int, content: Any) -> bytes:
    """A value without its type; an array is given as (type of items, items)."""
    if kind == STRING:
        return text(content)
    if kind == ARRAY:
        item, items = content
        return struct.pack("<IQ", item, len(items)) + b"".join(value(item, x) for x in items)
    return struct.pack("<" + FORMATS[kind], content)


@dataclass
class Tensor:
    name: str
    dims: tuple[int, ...]  # fastest axis first
    data: bytes
    kind: int = 0
    offset: int | None = None  # None: after the tensor before
    n_dims: int | None = None  # None: as many as there are dims


@dataclass
class RawGguf:
    """``metadata``: key -> (type, content). ``bytes()`` lays the file out; ``marks`` then holds
    the position after each field of the header, and the start and end of each tensor."""

    metadata: dict[str, tuple[int, Any]] = field(default_factory=dict)
    tensors: list[Tensor] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_tensors: int | None = None
    n_metadata: int | None = None
    extra_entries: bytes = b""  # metadata in its written form, after the rest
    alignment: int = 32

    def bytes(self) -> bytes:
        n_metadata = len(self.metadata) if self.n_metadata is None else self.n_metadata
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        out = bytearray(self.magic + struct.pack("<IQQ", self.version, n_tensors, n_metadata))
        for key, (kind, content) in self.metadata.items():
            out += text(key) + struct.pack("<I", kind) + value(kind, content)
        out += self.extra_entries
        offset = 0
        for tensor in self.tensors:
            n_dims = len(tensor.dims) if tensor.n_dims is None else tensor.n_dims
            out += text(tensor.name) + struct.pack(f"<I{len(tensor.dims)}Q", n_dims, *tensor.dims)
            at = offset if tensor.offset is None else tensor.offset
            out += struct.pack("<IQ", tensor.kind, at)
            offset += len(self._padded(tensor.data))
        out = bytearray(self._padded(bytes(out)))
        for tensor in self.tensors:
            out += self._padded(tensor.data)
        return bytes(out)

    def _padded(self, data: bytes) -> bytes:
        return data + bytes(-len(data) % self.alignment)


def tokenizer_metadata(pieces: list[str], types: list[int], **changes: Any) -> dict[str, Any]:
    """Metadata of a tokenizer; scores fall with the id. ``changes`` replace or (None) drop."""
    metadata = {
        "model": (STRING, "llama"),
        "tokens": (ARRAY, (STRING, pieces)),
        "scores": (ARRAY, (F32, [-float(i) for i in range(len(pieces))])),
        "token_type": (ARRAY, (I32, types)),
        "bos_token_id": (U32, 1),
        "eos_token_id": (U32, 2),
        "unknown_token_id": (U32, 0),
        **changes,
    }
    return {f"tokenizer.ggml.{key}": entry for key, entry in metadata.items() if entry is not None}


def small_llama(**changes: Any) -> RawGguf:
    """A whole model of one layer: dim 4, two heads of 2, hidden_dim 6, six tokens, no byte
    tokens. ``changes`` replace metadata by the last part of its key, or (None) drop it."""
    numbers = {
        "context_length": 16,
        "embedding_length": 4,
        "block_count": 1,
        "feed_forward_length": 6,
        "attention.head_count": 2,
        "attention.head_count_kv": 1,
        "rope.dimension_count": 2,
        "vocab_size": 6,
    }
    metadata: dict[str, Any] = {"general.architecture": (STRING, "llama")}
    metadata |= {f"llama.{key}": (U32, number) for key, number in numbers.items()}
    metadata["llama.attention.layer_norm_rms_epsilon"] = (F32, 1e-5)
    pieces = ["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"]
    metadata |= tokenizer_metadata(pieces, [2, 3, 3, 1, 1, 1])
    for name, entry in changes.items():
        matches = [key for key in metadata if key.endswith("." + name)] or [
            name if name.startswith("tinyllama.") else f"llama.{name}"
        ]
        metadata.pop(matches[0], None)
        if entry is not None:
            metadata[matches[0]] = entry
    shapes = {
        "token_embd": (4, 6),
        "blk.0.attn_norm": (4,),
        "blk.0.attn_q": (4, 4),
        "blk.0.attn_k": (4, 2),
        "blk.0.attn_v": (4, 2),
        "blk.0.attn_output": (4, 4),
        "blk.0.ffn_norm": (4,),
        "blk.0.ffn_gate": (4, 6),
        "blk.0.ffn_up": (4, 6),
        "blk.0.ffn_down": (6, 4),
        "output_norm": (4,),
    }
    tensors = []
    for name, dims in shapes.items():
        n = dims[0] * (dims[1] if len(dims) > 1 else 1)
        data = struct.pack(f"<{n}f", *((i % 7 - 3) / 4 for i in range(n)))
        tensors.append(Tensor(f"{name}.weight", dims, data))
    return RawGguf(metadata, tensors)
