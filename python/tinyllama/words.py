"""What counts as a word when texts are compared and measured, whatever their script."""

from __future__ import annotations

import re

# Thai to Lao, Burmese, Khmer, kana and Chinese characters stand without spaces: each is a word.
UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")


def words(text: str) -> list[str]:
    """The runs of letters and digits of a text in lower case, and the characters of UNSPACED."""
    return _WORD.findall(text.lower())


def first_words(text: str, n: int) -> str:
    """A text up to the end of its ``n``-th word; empty where it has no word."""
    ends = [word.end() for word, _ in zip(_WORD.finditer(text), range(n), strict=False)]
    return text[: ends[-1]] if ends else ""
