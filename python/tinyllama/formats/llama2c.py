"""llama2.c's files: ``.bin`` v0, v1 and v2 (int8), and ``tokenizer.bin``.

Layouts as written by llama2.c's export.py and tokenizer.py and read by run.c and runq.c; all
little-endian and tightly packed. Matrices are (out, in), wq and wk in interleaved rotary order,
as in a Checkpoint.
"""

from __future__ import annotations

import io
import os
import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..config import Config, rope_tables
from ..errors import ArgumentError, ConfigError, FormatError, NonFiniteError
from ..files import whole_file
from .checkpoint import Checkpoint, TokenType, Vocabulary
from .sentencepiece import load_sentencepiece

MAGIC = 0x616B3432  # "ak42"
HEADER_BYTES = 256  # of v1 and v2; v0 has 28 and no magic
FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
PathLike = str | os.PathLike[str]

# Tensors in file order; a name that stands for one tensor per layer is written for all layers.
_ORDER_V0 = [
    *("tok_embed", "attn_norm", "wq", "wk", "wv", "wo", "ffn_norm", "w_gate", "w_down", "w_up"),
    *("final_norm", "rope_cos", "rope_sin", "lm_head"),
]
_ORDER_V1 = [
    *("attn_norm", "ffn_norm", "final_norm", "tok_embed"),
    *("wq", "wk", "wv", "wo", "w_gate", "w_down", "w_up", "lm_head"),
]


def read_llama2c(path: PathLike | bytes, tokenizer: PathLike | None = None) -> Checkpoint:
    """Read a llama2.c ``.bin``, given as a path or as its bytes.

    The file holds no tokenizer: ``tokenizer`` is a ``tokenizer.bin`` or SentencePiece ``.model``;
    None: ``tokenizer.model`` or ``tokenizer.bin`` beside the file, else the only ``*.model`` or
    ``tok*.bin`` there that has as many tokens as the model.

    Raises FormatError when the header is not sane, the size is not what the header asks for, int8
    groups do not divide the rows, or no tokenizer is found.
    """
    if isinstance(path, bytes):
        source, data = "model bytes", np.frombuffer(path, np.uint8)
    else:
        source, data = str(path), np.fromfile(path, np.uint8)
    config, version, group = _read_header(data, source)
    tensors: dict[str, np.ndarray] = {}
    offset = 28 if version == 0 else HEADER_BYTES
    for name, shape in _layout(config, version):
        quantized = version == 2 and len(shape) == 2
        n = int(np.prod(shape))
        n_bytes = n + 4 * (n // group) if quantized else 4 * n
        part = data[offset : offset + n_bytes]
        offset += n_bytes
        if name.startswith("rope_"):
            continue  # tables that follow from the config
        if quantized:
            values = part[:n].view(np.int8).reshape(-1, group).astype(np.float32)
            tensor = values * part[n:].copy().view("<f4")[:, None]
        else:
            tensor = part.view("<f4").astype(np.float32, copy=False)
        tensors[name] = tensor.reshape(shape)
    if tokenizer is not None:
        vocabulary = load_tokenizer(tokenizer, config.vocab_size)
    elif isinstance(path, bytes):
        raise FormatError(f"{source}: llama2.c's format holds no tokenizer; pass tokenizer=")
    else:
        vocabulary = find_tokenizer(Path(path), config.vocab_size)
    return Checkpoint(config, tensors, vocabulary, "q8_0" if version == 2 else "f32", source)


def is_versioned(head: bytes) -> bool:
    """Whether a file that begins so is a v1 or v2 ``.bin``. (A v0 file has no magic number.)"""
    return head[:4] == struct.pack("<I", MAGIC)


def _read_header(data: np.ndarray, source: str) -> tuple[Config, int, int]:
    """-> config, version, and the int8 group (0 but for v2), checked against the file's size."""
    head = data[:HEADER_BYTES].tobytes()
    version, start, needed = 0, 0, 28
    if is_versioned(head):
        start, needed = 8, HEADER_BYTES
    if len(head) < needed:
        raise FormatError(f"{source}: {len(head)} bytes, too few for a llama2.c header ({needed})")
    if start:
        (version,) = struct.unpack_from("<i", head, 4)
        if version not in (1, 2):
            raise FormatError(f"{source}: version is {version}; known: 1 and 2 (and 0 unnamed)")
    values = dict(zip(FIELDS, struct.unpack_from("<7i", head, start), strict=True))
    if version == 0:
        tied = values["vocab_size"] > 0  # the sign is a flag
        values["vocab_size"] = abs(values["vocab_size"])
    else:
        if head[36] > 1:
            raise FormatError(f"{source}: shared_classifier is {head[36]}, expected 0 or 1")
        tied = bool(head[36])
    for name, value in values.items():
        if not 0 < value < 2**31:
            raise FormatError(f"{source}: {name} is {value}, which is no llama2.c model's")
    try:
        config = Config(**values, tie_embeddings=tied)
    except ConfigError as error:
        raise FormatError(f"{source}: {error}") from None
    group = struct.unpack_from("<i", head, 37)[0] if version == 2 else 0
    if version == 2:
        _check_group(config, group, source)
    expected = _file_size(config, version, group)
    if data.size != expected:
        raise FormatError(
            f"{source}: {data.size} bytes, but its header (dim {config.dim}, n_layers"
            f" {config.n_layers}, vocab_size {config.vocab_size}, …) asks for {expected}:"
            f" the file is {'truncated or ' if data.size < expected else ''}not a llama2.c .bin"
        )
    return config, version, group


def _check_group(config: Config, group: int, source: str) -> None:
    if group < 1:
        raise FormatError(f"{source}: group_size is {group}, it must be positive")
    for name in ("dim", "hidden_dim"):
        value = getattr(config, name)
        if value % group:
            raise FormatError(
                f"{source}: its int8 groups of {group} do not divide {name} ({value}), so scales"
                " straddle rows and runq.c computes wrong values from it (a known defect of"
                f" llama2.c's exporter); export it again with groups of {_best_group(config)}"
            )


def _best_group(config: Config) -> int:
    """The largest group up to 64, halved as llama2.c does it, that divides every row."""
    group = 64
    while config.dim % group or config.hidden_dim % group:
        group //= 2
    return group


def _file_size(config: Config, version: int, group: int) -> int:
    """Bytes of the whole file, in exact integers and without a list of tensors: n_layers may be
    a lie of two billion."""
    one = replace(config, n_layers=1)
    size = 28 if version == 0 else HEADER_BYTES
    for name, shape in _layout(one, version):
        n = shape[0] * (shape[1] if len(shape) == 2 else 1)
        n_bytes = n + 4 * (n // group) if version == 2 and len(shape) == 2 else 4 * n
        size += n_bytes * (config.n_layers if name.startswith("layers.") else 1)
    return size


def _layout(config: Config, version: int) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes in file order."""
    shapes = config.tensor_shapes()
    if version == 0:
        tables = (config.max_seq_len, config.head_dim // 2)
        shapes |= {"rope_cos": tables, "rope_sin": tables}
    layout = []
    for name in _ORDER_V0 if version == 0 else _ORDER_V1:
        layers = [f"layers.{i}.{name}" for i in range(config.n_layers)]
        names = layers if layers[0] in shapes else [name]
        layout += [(name, shapes[name]) for name in names if name in shapes]
    return layout


# --- writing ------------------------------------------------------------------------------------


def write_llama2c(checkpoint: Checkpoint, path: PathLike, version: int = 0) -> None:
    """Write ``path`` in llama2.c's layout v0 (float32, what run.c reads), v1 (float32 with a
    header) or v2 (int8, what runq.c reads; its groups divide every row), and ``tokenizer.bin``
    beside it. Each file is written whole or not at all.

    Raises FormatError when the format has no place for what the model is: head_dim other than
    dim / n_heads, rope_theta other than 10000, rope scaling, norm_eps other than 1e-5, another
    kind of tokenizer; ArgumentError for an unknown version, and when a different tokenizer.bin
    already lies there; NonFiniteError for weights that are NaN or infinite.
    """
    if version not in (0, 1, 2):
        raise ArgumentError(f"version is {version!r}; known: 0, 1, 2")
    config = checkpoint.config
    _refuse_what_cannot_be_told(config)
    for name, tensor in checkpoint.tensors.items():
        if not np.isfinite(tensor).all():
            raise NonFiniteError(f"{checkpoint.source}: tensor {name} holds NaN or infinity")
    tokenizer = tokenizer_bytes(checkpoint.vocabulary)
    with whole_file(path) as stream:
        _write(stream, checkpoint, version)
        stream.flush()  # a full disk shows here, before there is a tokenizer
        place_tokenizer(tokenizer, Path(path).parent)


def place_tokenizer(data: bytes, folder: Path) -> None:
    """Write ``folder/tokenizer.bin``. Raises ArgumentError when a different one lies there."""
    path = folder / "tokenizer.bin"
    if not path.exists():
        with whole_file(path) as stream:
            stream.write(data)
    elif path.read_bytes() != data:
        raise ArgumentError(f"{path} is another model's tokenizer; choose another folder")


def _refuse_what_cannot_be_told(config: Config) -> None:
    fixed = (
        ("head_dim", config.head_dim, config.dim // config.n_heads),
        ("rope_theta", config.rope_theta, 10000.0),
        ("norm_eps", config.norm_eps, 1e-5),
        ("rope_scaling", config.rope_scaling, None),
    )
    for name, value, only in fixed:
        if value != only:
            raise FormatError(
                f"llama2.c's format cannot tell {name} {value} (it is always {only});"
                " export to GGUF or to a Hugging Face folder"
            )


def _write(stream: BinaryIO, checkpoint: Checkpoint, version: int) -> None:
    config = checkpoint.config
    values = {name: getattr(config, name) for name in FIELDS}
    group = _best_group(config) if version == 2 else 0
    if version == 0:
        values["vocab_size"] *= 1 if config.tie_embeddings else -1
        stream.write(struct.pack("<7i", *values.values()))
    else:
        head = struct.pack("<Ii7iB", MAGIC, version, *values.values(), config.tie_embeddings)
        head += struct.pack("<i", group) if version == 2 else b""
        stream.write(head.ljust(HEADER_BYTES, b"\0"))
    cos, sin = rope_tables(config, config.max_seq_len)
    tables = {"rope_cos": cos, "rope_sin": sin}
    for name, shape in _layout(config, version):
        tensor = tables[name] if name in tables else checkpoint.tensors[name]
        if version == 2 and len(shape) == 2:
            values_int8, scales = _quantize(tensor, group)
            stream.write(values_int8.tobytes() + scales.tobytes())
        else:
            stream.write(np.ascontiguousarray(tensor, "<f4").tobytes())


def _quantize(tensor: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric int8 with one float32 scale max|w| / 127 per group of a row."""
    groups = tensor.reshape(-1, group)
    scales = (np.abs(groups).max(axis=1) / np.float32(127)).astype("<f4")
    divisor = np.where(scales == 0, np.float32(1), scales)[:, None]
    return np.rint(groups / divisor).astype(np.int8), scales


# --- tokenizers ---------------------------------------------------------------------------------


def read_tokenizer_bin(path: PathLike, vocab_size: int | None = None) -> Vocabulary:
    """Read llama2.c's ``tokenizer.bin``: 0 is unknown, 1 begins and 2 ends a document.

    Raises FormatError when it is damaged or has another number of tokens than ``vocab_size``.
    """
    data = Path(path).read_bytes()
    if len(data) < 4:
        raise FormatError(f"{path}: {len(data)} bytes, too few for a tokenizer.bin")
    (longest,) = struct.unpack_from("<I", data)
    pieces: list[str] = []
    scores: list[float] = []
    offset = 4
    while offset < len(data):
        what = f"{path}: token {len(pieces)}"
        if len(data) - offset < 8:
            raise FormatError(f"{what}: the file is truncated at byte {len(data)}")
        score, n_bytes = struct.unpack_from("<fi", data, offset)
        offset += 8
        if not 0 <= n_bytes <= longest:
            raise FormatError(f"{what} has length {n_bytes}, outside [0, {longest}]")
        if n_bytes > len(data) - offset:
            raise FormatError(f"{what}: the file is truncated at byte {len(data)}")
        try:
            pieces.append(data[offset : offset + n_bytes].decode("utf-8").replace(" ", "\u2581"))
        except UnicodeDecodeError:
            raise FormatError(f"{what} is not UTF-8: {data[offset : offset + n_bytes]!r}") from None
        scores.append(score)
        offset += n_bytes
    if vocab_size is not None and len(pieces) != vocab_size:
        raise FormatError(
            f"{path}: the tokenizer has {len(pieces)} tokens, the model's vocab_size is"
            f" {vocab_size}"
        )
    if len(pieces) < 3:
        raise FormatError(f"{path}: {len(pieces)} tokens; a tokenizer.bin has at least 3")
    types = [TokenType.BYTE if _BYTE.fullmatch(piece) else TokenType.NORMAL for piece in pieces]
    types[:3] = TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL
    pieces[1:3] = (piece.strip("\n") for piece in pieces[1:3])
    try:
        return Vocabulary(tuple(pieces), np.array(scores, np.float32), np.array(types, np.int32))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


_BYTE = re.compile("<0x[0-9A-F]{2}>")


def tokenizer_bytes(vocabulary: Vocabulary) -> bytes:
    """The vocabulary as the bytes of a ``tokenizer.bin``. Raises FormatError when it cannot be."""
    ids = (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id)
    if ids != (0, 1, 2):
        raise FormatError(f"llama2.c's tokenizer has unk, bos, eos = (0, 1, 2), not {ids}")
    if not vocabulary.add_space_prefix:
        raise FormatError("llama2.c always puts a space before the text, this tokenizer does not")
    texts = [piece.replace("\u2581", " ").encode() for piece in vocabulary.pieces]
    texts[1], texts[2] = b"\n" + texts[1] + b"\n", b"\n" + texts[2] + b"\n"
    stream = io.BytesIO()
    stream.write(struct.pack("<I", max(map(len, texts))))
    for text, score in zip(texts, vocabulary.scores.tolist(), strict=True):
        stream.write(struct.pack("<fi", score, len(text)) + text)
    return stream.getvalue()


def load_tokenizer(path: PathLike, vocab_size: int) -> Vocabulary:
    """A ``tokenizer.bin`` or SentencePiece ``.model`` of ``vocab_size`` tokens."""
    if Path(path).suffix == ".bin":
        return read_tokenizer_bin(path, vocab_size)
    vocabulary = load_sentencepiece(path)
    if len(vocabulary) != vocab_size:
        raise FormatError(
            f"{path}: the tokenizer has {len(vocabulary)} tokens, the model's vocab_size is"
            f" {vocab_size}"
        )
    return vocabulary


def find_tokenizer(path: Path, vocab_size: int) -> Vocabulary:
    """The tokenizer that lies beside the model file ``path``; see :func:`read_llama2c`."""
    for name in ("tokenizer.model", "tokenizer.bin"):
        if path.with_name(name).is_file():
            return load_tokenizer(path.with_name(name), vocab_size)
    # One tokenizer may lie there in both forms: the .model tells more, so it comes last and wins.
    found: dict[str, Vocabulary] = {}
    for pattern in ("tok*.bin", "*.model"):
        for candidate in sorted(path.parent.glob(pattern)):
            try:
                found[candidate.stem] = load_tokenizer(candidate, vocab_size)
            except FormatError:
                continue  # another model's
    if len(found) == 1:
        return found.popitem()[1]
    several = f"several beside it fit ({', '.join(found)})" if found else "none beside it fits"
    raise FormatError(
        f"{path}: llama2.c's format holds no tokenizer of its {vocab_size} tokens and {several};"
        " pass tokenizer= (--tokenizer): a tokenizer.bin or a SentencePiece .model"
    )
