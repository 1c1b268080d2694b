"""Mending documents: encoding that went wrong, and length."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ..errors import MissingExtraError

# Bytes 0x80 to 0xBF, which continue a UTF-8 character, as Windows-1252 shows them.
_CONTINUATIONS = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in range(0x80, 0xC0))
# The closing quote is E2 80 9D in UTF-8. Windows-1252 has no character for 9D, so many programs
# dropped it, and two thirds of a quote are left. ftfy would make a dagger (E2 80 A0) of it and
# the space behind, so this comes first.
_TORN_CLOSING_QUOTE = re.compile(f"â€(?![{re.escape(_CONTINUATIONS)}\"'])")

_ftfy_config: Any = None


def mend_encoding(text: str) -> str:
    """Undo UTF-8 read as another encoding, and nothing else."""
    if text.isascii():
        return text
    global _ftfy_config
    try:
        import ftfy
    except ImportError:
        raise MissingExtraError("ftfy", "data") from None
    if _ftfy_config is None:
        _ftfy_config = ftfy.TextFixerConfig(
            unescape_html=False,
            remove_terminal_escapes=False,
            fix_latin_ligatures=False,
            fix_character_width=False,
            uncurl_quotes=False,
            fix_line_breaks=False,
            fix_surrogates=False,
            remove_control_chars=False,
            normalization=None,
            explain=False,
        )
    return ftfy.fix_text(_TORN_CLOSING_QUOTE.sub("\u201d", text), _ftfy_config)


def cut(text: str, max_bytes: int) -> Iterator[str]:
    """``text`` in pieces of at most ``max_bytes``, cut where it hurts least."""
    data = text.encode()
    start = 0
    while len(data) - start > max_bytes:
        end = _place_to_cut(data, start, start + max_bytes)
        if piece := data[start:end].decode().strip():
            yield piece
        start = end
    if piece := data[start:].decode().strip():
        yield piece


def _place_to_cut(data: bytes, start: int, end: int) -> int:
    # Not in the first half: a heading alone makes no document.
    for mark in ("\n\n", "\n", ". ", "。", " "):
        at = data.rfind(mark.encode(), start + (end - start) // 2, end)
        if at >= 0:
            return at + len(mark.encode())
    while data[end] & 0xC0 == 0x80:  # inside a character
        end -= 1
    return end
