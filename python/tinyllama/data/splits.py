"""Which split a document is in, and that both splits have some."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

from ..errors import ArgumentError
from .documents import SEPARATOR, Documents

SPLITS = ("train", "valid")


def text_key(text: str) -> bytes:
    """16 bytes that stand for a document's words: the same however its white space is set."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def is_validation(text: str, valid_fraction: float, seed: int) -> bool:
    """Whether a document belongs to the validation split: decided by its words and the seed."""
    return _number(text, seed) < valid_fraction * 2.0**64


def fraction_for_one(documents: Documents, seed: int) -> float:
    """The least ``valid_fraction`` that holds any of ``documents`` out, and those like it."""
    texts = ("".join(pair) for _, pair in documents.pairs() if pair.completion.strip())
    return math.nextafter(min(_number(text, seed) for text in texts) / 2.0**64, 1.0)


def check_splits(
    documents: Mapping[str, int], inputs: list[str], valid: list[str], valid_fraction: float
) -> None:
    """Raise ArgumentError where a split has no documents that is to have some.

    ``documents`` counts those of each split; ``inputs`` and ``valid`` name where they are from.
    """
    n = sum(documents.values())
    if valid_fraction and n == 1:
        raise ArgumentError(
            "the text is one document, and there is none to validate on. In a .txt file a line"
            f" {SEPARATOR} ends a document (another: --separator);"
            " `tinyllama data check FILE --repair OUT.txt --max-bytes 4000` cuts a long one at"
            " paragraphs; --valid FILE names other text to validate on"
        )
    if valid_fraction and n and not documents["train"]:
        raise ArgumentError(
            f"valid_fraction {valid_fraction} holds out all {n} documents: lower it"
            " (those that are alike go together)"
        )
    if not documents["train"]:
        also = ", without those that are held out too," if documents["valid"] else ""
        raise ArgumentError(f"{', '.join(inputs)}: there is{also} no document to train on")
    if not documents["valid"] and valid:
        raise ArgumentError(f"{', '.join(valid)}: there is no document to validate on")
    if not documents["valid"] and valid_fraction:
        raise ArgumentError(
            f"valid_fraction {valid_fraction} leaves no validation document among {n}:"
            " raise it, or name a validation file"
        )


def _number(text: str, seed: int) -> int:
    """64 bits that are a document's lot."""
    mixed = hashlib.blake2b(text_key(text) + seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(mixed[:8], "little")
