"""What is wrong with a collection of documents, and mending it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

from ..errors import ArgumentError, MissingExtraError
from ..files import whole_file
from .documents import SEPARATOR, Documents, PathLike
from .shards import text_key

# What is looked for: its title in the report, and what a repair does about it.
FINDINGS = {
    "damaged": ("damaged encoding", "mended"),
    "invalid": ("lines with bytes that are not UTF-8", "bytes taken as Windows-1252"),
    "lost": ("with U+FFFD, a character lost before", "kept as they are"),
    "duplicates": ("duplicates of an earlier one", "dropped"),
    "empty": ("empty", "dropped"),
    "over_long": ("too long", "cut at paragraphs"),
}
MAX_EXAMPLES = 3


@dataclass
class Finding:
    """How often something was found, and where the first few times."""

    count: int = 0
    examples: list[str] = dataclass_field(default_factory=list)

    def add(self, example: str) -> None:
        self.count += 1
        if len(self.examples) < MAX_EXAMPLES:
            self.examples.append(example)


@dataclass
class Report:
    """What ``check`` saw. ``bytes`` counts the documents' UTF-8; ``findings`` has FINDINGS' keys.

    ``written_documents`` and ``written_bytes`` are those of the repaired file, 0 without one.
    """

    documents: int = 0
    bytes: int = 0
    findings: dict[str, Finding] = dataclass_field(
        default_factory=lambda: {key: Finding() for key in FINDINGS}
    )
    written_documents: int = 0
    written_bytes: int = 0


def check(
    inputs: PathLike | Iterable[PathLike],
    *,
    repair: PathLike | None = None,
    max_bytes: int = 100_000,
    field: str | None = None,
    separator: str = SEPARATOR,
) -> Report:
    """Look through the documents of ``inputs`` (see ``Documents``) for damage; mend it on demand.

    Found are: UTF-8 that was read as another encoding and written again (``â€œ`` for ``“``), bytes
    that are not UTF-8, replacement characters, documents that repeat an earlier one (white space
    aside), empty ones, and those longer than ``max_bytes`` of UTF-8.

    ``repair`` names a ``.txt`` file to write: encoding mended, duplicates and empty documents
    left out, long ones cut at the last blank line, line or sentence that fits. It is written
    whole or not at all. Curly quotes, accents and widths stay as they are.

    Raises ArgumentError when ``repair`` is one of the inputs, would hold nothing or lose the
    prompts of pairs, FormatError when an input's structure (JSON, CSV, Parquet, compression) is
    damaged.
    """
    if max_bytes < 100:
        raise ArgumentError(f"max_bytes is {max_bytes}, expected at least 100")
    report = Report()
    found = report.findings
    documents = Documents(
        inputs,
        field=field,
        separator=separator,
        replace_invalid=lambda where, at: found["invalid"].add(f"{where}: byte offset {at}"),
    )
    if repair is not None:
        if Path(repair).suffix != ".txt":
            raise ArgumentError(f"repair is {str(repair)!r}: the repaired file's name ends in .txt")
        if Path(repair).resolve() in {path.resolve() for path in documents.paths}:
            raise ArgumentError(f"repair is {str(repair)!r}, which is one of the inputs")
    with whole_file(repair) if repair is not None else nullcontext() as file:
        for text in _sound(documents, report, max_bytes):
            if file is None:
                continue
            for part in cut(text, max_bytes):
                data = part.encode()
                file.write(data + f"\n{separator}\n".encode())
                report.written_documents += 1
                report.written_bytes += len(data)
        if file is not None and not report.written_documents:
            raise ArgumentError("the repaired file would hold no document")
        if file is not None and documents.n_pairs:
            raise ArgumentError(
                f"repair: {documents.n_pairs} of the documents are pairs of prompt and completion,"
                " which a .txt file would not keep apart"
            )
    return report


def _sound(documents: Documents, report: Report, max_bytes: int) -> Iterator[str]:
    """The documents that are neither empty nor repeated, their encoding mended."""
    found = report.findings
    seen: set[bytes] = set()
    for where, original in documents:
        text = mend_encoding(original)
        size = len(original.encode())
        report.documents += 1
        report.bytes += size
        if text != original:
            found["damaged"].add(f"{where}: {_difference(original, text)}")
        if "\ufffd" in text:
            at = text.index("\ufffd")
            found["lost"].add(f"{where}: {text[max(0, at - 20) : at + 20]!r}")
        if not text:
            found["empty"].add(where)
            continue
        if (key := text_key(text)) in seen:
            found["duplicates"].add(f"{where}: {text[:40]!r}")
            continue
        seen.add(key)
        if size > max_bytes:
            found["over_long"].add(f"{where}: {size:,} bytes: {text[:40]!r}")
        yield text


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
        raise MissingExtraError("ftfy", "train") from None
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


def _difference(before: str, after: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    start = max(0, same - 15)
    return f"{before[start : same + 25]!r} -> {after[start : same + 25]!r}"


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
