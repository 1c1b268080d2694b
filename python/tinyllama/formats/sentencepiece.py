"""SentencePiece ``.model`` files: a protobuf message, read and written without protobuf.

Field numbers are those of sentencepiece's ``sentencepiece_model.proto``. Only what decides how
text becomes tokens is read: pieces, scores, types, and the normaliser's flags.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import FormatError, MissingExtraError
from .checkpoint import TokenType, Vocabulary

# ModelProto
PIECES, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5
# SentencePiece
PIECE, SCORE, TYPE = 1, 2, 3
# TrainerSpec
MODEL_TYPE, VOCAB_SIZE, SUFFIX, WHITESPACE_ONLY, BYTE_FALLBACK = 3, 4, 24, 26, 35
UNK_ID, BOS_ID, EOS_ID, PAD_ID, UNK_SURFACE = 40, 41, 42, 43, 44
UNK_PIECE, BOS_PIECE, EOS_PIECE, PAD_PIECE = 45, 46, 47, 48
# NormalizerSpec
NORMALIZER_NAME, CHARSMAP, DUMMY_PREFIX, REMOVE_EXTRA, ESCAPE = 1, 2, 3, 4, 5

MODEL_TYPES = {1: "unigram", 2: "bpe", 3: "word", 4: "char"}
BPE = 2

Value = int | float | bytes


def load_sentencepiece(path: str | os.PathLike[str]) -> Vocabulary:
    """Read a SentencePiece BPE ``.model`` file.

    Raises OSError when the file cannot be read, FormatError as ``read_sentencepiece`` does.
    """
    return read_sentencepiece(Path(path).read_bytes(), source=str(path))


def read_sentencepiece(data: bytes, source: str = "tokenizer.model") -> Vocabulary:
    """Read the bytes of a SentencePiece BPE model; ``source`` names them in errors.

    Raises FormatError when they are no such model or are damaged, and when the model does what
    a Llama's tokenizer does not: unigram, word or character models, white space as a suffix,
    a normaliser that rewrites characters (nmt_nfkc and the like).
    """
    rows: list[tuple[str, float, int]] = []
    trainer: dict[int, Value] = {}
    normalizer: dict[int, Value] = {}
    denormalizer: dict[int, Value] = {}
    try:
        for field, value in _fields(data):
            if field == PIECES:
                row = _message(value)
                kind = TokenType(int(row.get(TYPE, TokenType.NORMAL)))
                rows.append((_text(row.get(PIECE, b"")), float(row.get(SCORE, 0.0)), int(kind)))
            elif field == TRAINER:
                trainer = _message(value)
            elif field == NORMALIZER:
                normalizer = _message(value)
            elif field == DENORMALIZER:
                denormalizer = _message(value)
    except (ValueError, TypeError, IndexError, struct.error) as error:
        where = f" at piece {len(rows)}" if rows else ""
        raise FormatError(
            f"{source}: not a SentencePiece model, or damaged{where}: {error}"
        ) from None
    if not rows:
        raise FormatError(f"{source}: not a SentencePiece model: it holds no pieces")
    _refuse_what_llamas_lack(trainer, normalizer, denormalizer, source)

    pieces = tuple(row[0] for row in rows)
    types = np.array([row[2] for row in rows], np.int32)
    ids = _unique_ids(pieces, source)
    unknown = np.flatnonzero(types == TokenType.UNKNOWN)
    if len(unknown) != 1:
        raise FormatError(f"{source}: {len(unknown)} pieces are marked as unknown, expected one")

    def control(field: int, default: str) -> int | None:
        # sentencepiece finds its special tokens by their text; the ids beside are a comment.
        token = ids.get(_text(trainer.get(field, default.encode())))
        return token if token is not None and types[token] == TokenType.CONTROL else None

    return Vocabulary(
        pieces=pieces,
        scores=np.array([row[1] for row in rows], np.float32),
        types=types,
        bos_id=control(BOS_PIECE, "<s>"),
        eos_id=control(EOS_PIECE, "</s>"),
        unk_id=int(unknown[0]),
        pad_id=control(PAD_PIECE, "<pad>"),
        add_space_prefix=bool(normalizer.get(DUMMY_PREFIX, 1)),
        remove_extra_whitespaces=bool(normalizer.get(REMOVE_EXTRA, 1)),
    )


def save_sentencepiece(vocabulary: Vocabulary) -> bytes:
    """The vocabulary as a SentencePiece model, which sentencepiece loads and which encodes alike.

    Raises FormatError where sentencepiece has no such model: no unknown token, empty or repeated
    pieces, or byte tokens that are not all 256.
    """
    source = "SentencePiece model"
    _unique_ids(vocabulary.pieces, source)
    if vocabulary.unk_id is None:
        raise FormatError(f"{source}: the vocabulary has no unknown token, which is required")
    n_bytes = int(np.count_nonzero(vocabulary.types == TokenType.BYTE))
    if n_bytes not in (0, 256):
        raise FormatError(f"{source}: {n_bytes} byte tokens, expected none or all 256")

    trainer = [
        _field(MODEL_TYPE, BPE),
        _field(VOCAB_SIZE, len(vocabulary)),
        _field(WHITESPACE_ONLY, 1),
        _field(BYTE_FALLBACK, int(n_bytes > 0)),
        _field(UNK_SURFACE, " \u2047 "),
    ]
    for id_field, piece_field, token in (
        (UNK_ID, UNK_PIECE, vocabulary.unk_id),
        (BOS_ID, BOS_PIECE, vocabulary.bos_id),
        (EOS_ID, EOS_PIECE, vocabulary.eos_id),
        (PAD_ID, PAD_PIECE, vocabulary.pad_id),
    ):
        trainer.append(_field(id_field, -1 if token is None else token))
        if token is not None:
            trainer.append(_field(piece_field, vocabulary.pieces[token]))
    normalizer = [
        _field(NORMALIZER_NAME, "identity"),
        _field(DUMMY_PREFIX, int(vocabulary.add_space_prefix)),
        _field(REMOVE_EXTRA, int(vocabulary.remove_extra_whitespaces)),
        _field(ESCAPE, 1),
    ]
    rows = zip(
        vocabulary.pieces, vocabulary.scores.tolist(), vocabulary.types.tolist(), strict=True
    )
    pieces = [
        _field(PIECES, _field(PIECE, piece) + _field(SCORE, float(score)) + _field(TYPE, kind))
        for piece, score, kind in rows
    ]
    return b"".join(
        [*pieces, _field(TRAINER, b"".join(trainer)), _field(NORMALIZER, b"".join(normalizer))]
    )


def open_processor(model: bytes) -> Any:
    """A ``sentencepiece.SentencePieceProcessor`` over the bytes of a ``.model`` file.

    Raises MissingExtraError without sentencepiece.
    """
    try:
        import sentencepiece
    except ImportError:
        raise MissingExtraError("sentencepiece", "data") from None
    return sentencepiece.SentencePieceProcessor(model_proto=model)


def _refuse_what_llamas_lack(
    trainer: dict[int, Value],
    normalizer: dict[int, Value],
    denormalizer: dict[int, Value],
    source: str,
) -> None:
    model_type = trainer.get(MODEL_TYPE, 1)
    if model_type != BPE:
        name = MODEL_TYPES.get(int(model_type), str(model_type))
        raise FormatError(f"{source}: model_type is {name}, only bpe is supported")
    if trainer.get(SUFFIX, 0):
        raise FormatError(f"{source}: treat_whitespace_as_suffix is set, which is not supported")
    if not normalizer.get(ESCAPE, 1):
        raise FormatError(f"{source}: escape_whitespaces is off, which is not supported")
    for spec in (normalizer, denormalizer):
        if spec.get(CHARSMAP):
            rule = _text(spec.get(NORMALIZER_NAME, b"")) or "a custom one"
            raise FormatError(
                f"{source}: the normaliser is {rule}, which rewrites characters;"
                " only identity is supported"
            )


def _unique_ids(pieces: tuple[str, ...], source: str) -> dict[str, int]:
    ids: dict[str, int] = {}
    for token, piece in enumerate(pieces):
        if not piece:
            raise FormatError(f"{source}: piece {token} is empty")
        if ids.setdefault(piece, token) != token:
            raise FormatError(f"{source}: pieces {ids[piece]} and {token} are both {piece!r}")
    return ids


# Protobuf's wire format: each field is a varint (number << 3 | kind) and a value of that kind.
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def _fields(data: bytes) -> Iterator[tuple[int, Value]]:
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        field, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield field, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        elif kind in (FIXED32, FIXED64):
            size = 4 if kind == FIXED32 else 8
        else:
            raise ValueError(f"unknown wire type {kind} at byte {at}")
        if size > len(data) - at:
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(data)}")
        chunk = data[at : at + size]
        at += size
        yield field, struct.unpack("<f", chunk)[0] if kind == FIXED32 else chunk


def _message(value: Value) -> dict[int, Value]:
    if not isinstance(value, bytes):
        raise ValueError(f"a message was expected, found {value!r}")
    return dict(_fields(value))


def _text(value: Value) -> str:
    if not isinstance(value, bytes):
        raise ValueError(f"text was expected, found {value!r}")
    return value.decode()


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise ValueError(f"the file ends at byte {at}, inside a number")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"a number longer than 64 bits at byte {at}")


def _field(field: int, value: int | float | bytes | str) -> bytes:
    if isinstance(value, float):
        return _number(field << 3 | FIXED32) + struct.pack("<f", value)
    if isinstance(value, int):
        return _number(field << 3 | VARINT) + _number(value)
    data = value.encode() if isinstance(value, str) else value
    return _number(field << 3 | BYTES) + _number(len(data)) + data


def _number(value: int) -> bytes:
    value &= (1 << 64) - 1  # negative numbers as protobuf writes them: 64-bit two's complement
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
