"""What a collection of documents holds, what is wrong with it, and a mended copy of it."""

from __future__ import annotations

import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import ArgumentError, FormatError
from ..files import PathLike, whole_file, whole_folder
from ..formats.checkpoint import TokenType
from ..formats.sentencepiece import open_processor, read_sentencepiece
from .documents import ENCODINGS, SEPARATOR, Documents
from .encoding import choose_encoding
from .mending import cut, mend_encoding
from .near import NearDuplicates
from .splits import text_key

# What is looked for: its title in the report, and what a repair does about it.
FINDINGS = {
    "damaged": ("damaged encoding", "mended"),
    "invalid": (
        "lines with bytes that are not text",
        "taken as Windows-1252; with --encoding, lost",
    ),
    "foreign": ("files in another encoding than UTF-8", "refused"),
    "lost": ("with U+FFFD, a character lost before", "kept as they are"),
    "duplicates": ("duplicates of an earlier one", "dropped"),
    "near": ("near duplicates of an earlier one", "dropped"),
    "empty": ("empty, or pairs without a completion", "dropped"),
    "over_long": ("too long", "cut at paragraphs"),
}
MAX_EXAMPLES = 3
# Lengths told of documents, and the share of them that is no longer.
LENGTHS = {"shortest": 0.0, "half up to": 0.5, "95 % up to": 0.95, "longest": 1.0}


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
class Tally:
    """What documents come to. ``lengths``: the bytes of each in UTF-8.

    ``tokens`` counts begin and end of each document too; ``unknown`` of them are the unknown
    token, ``byte_tokens`` single bytes of characters that have no token. All 0 without a tokenizer.
    """

    characters: int = 0
    lengths: array[int] = dataclass_field(default_factory=lambda: array("Q"))
    tokens: int = 0
    unknown: int = 0
    byte_tokens: int = 0

    @property
    def documents(self) -> int:
        return len(self.lengths)

    @property
    def bytes(self) -> int:
        return sum(self.lengths)

    def length(self, share: float) -> int:
        """The bytes that ``share`` (0 to 1) of the documents do not exceed; 0 without documents."""
        if not self.lengths:
            return 0
        return int(np.quantile(self.lengths, share, method="inverted_cdf"))

    def add(self, other: Tally) -> None:
        self.characters += other.characters
        self.lengths.extend(other.lengths)
        self.tokens += other.tokens
        self.unknown += other.unknown
        self.byte_tokens += other.byte_tokens


@dataclass
class SourceReport:
    """One source, or all: ``documents`` read, their ``bytes`` of UTF-8, what was found in them.

    ``kept`` is what a repair leaves: what is dropped is dropped, what is mended or cut is so.
    """

    findings: dict[str, Finding]
    documents: int = 0
    bytes: int = 0
    kept: Tally = dataclass_field(default_factory=Tally)

    def add(self, other: SourceReport) -> None:
        self.documents += other.documents
        self.bytes += other.bytes
        self.kept.add(other.kept)
        for key, finding in other.findings.items():
            mine = self.findings[key]
            mine.count += finding.count
            mine.examples = (mine.examples + finding.examples)[:MAX_EXAMPLES]


@dataclass
class Report:
    """What ``check`` saw, source by source. ``findings`` have those keys of FINDINGS looked for.

    ``near`` and ``tokenizer`` are the arguments of that name, None and "" where not given.
    """

    sources: dict[str, SourceReport]
    near: float | None = None
    tokenizer: str = ""

    @property
    def total(self) -> SourceReport:
        """All sources together."""
        total = _empty(self.near)
        for source in self.sources.values():
            total.add(source)
        return total

    @property
    def rows(self) -> list[tuple[str, SourceReport]]:
        """What a table of sources shows: each with its name and, where there are more, all."""
        rows = list(self.sources.items())
        return rows if len(rows) == 1 else [*rows, ("all", self.total)]


def _empty(near: float | None) -> SourceReport:
    keys = [key for key in FINDINGS if key != "near" or near is not None]
    return SourceReport({key: Finding() for key in keys})


def check(
    inputs: PathLike | Iterable[PathLike],
    *,
    repair: PathLike | None = None,
    near: float | None = None,
    tokenizer: PathLike | None = None,
    max_bytes: int = 100_000,
    field: str | None = None,
    separator: str = SEPARATOR,
    encoding: str | None = None,
    progress: bool = False,
) -> Report:
    """Look through the documents of ``inputs`` (see ``Documents``) for damage; mend it on demand.

    Found are: UTF-8 that was read as another encoding and written again (``â€œ`` for ``“``), bytes
    that are not UTF-8 (or not of ``encoding``, that of the inputs), files full of them,
    replacement characters, documents that repeat an earlier one (white space aside), empty ones,
    and those longer than ``max_bytes`` of UTF-8. With ``near``, 0.5 to 1, also documents whose runs
    of five words are to so large a part (Jaccard index) those of an earlier one that is kept; the
    texts are written to a temporary file for it (see ``NearDuplicates``). With ``tokenizer``, a
    ``.model`` file or a model, tokens are counted.

    ``repair`` names a ``.txt`` file to write, or a new folder for a ``.txt`` file of each source:
    encoding mended, duplicates, near duplicates and empty documents left out, long ones cut at
    the last blank line, line or sentence that fits. It is written whole or not at all. Curly
    quotes, accents and widths stay as they are.

    Raises ArgumentError when ``repair`` is one of the inputs, would hold nothing or lose the
    prompts of pairs, FormatError when an input's structure (JSON, CSV, Parquet, compression) is
    damaged, and when a file to be repaired is in another encoding (``MAX_STRAY_BYTES``).
    """
    if max_bytes < 100:
        raise ArgumentError(f"max_bytes is {max_bytes}, expected at least 100")
    documents = Documents(
        inputs,
        field=field,
        separator=separator,
        encoding=encoding,
        replace_invalid=lambda example: (
            report.sources[documents.source].findings["invalid"].add(example)
        ),
        progress="check" if progress else "",
    )
    sources = {name: _empty(near) for name in documents.sources}
    report = Report(sources, near, str(tokenizer or ""))
    if repair is not None and Path(repair).suffix not in (".txt", ""):
        raise ArgumentError(f"repair is {str(repair)!r}: a repaired file's name ends in .txt")
    if repair is not None and Path(repair).resolve() in {p.resolve() for p in documents.paths}:
        raise ArgumentError(f"repair is {str(repair)!r}, which is one of the inputs")
    count_tokens = _token_counter(tokenizer) if tokenizer is not None else None
    with _repaired(repair, sources) as files, tempfile.TemporaryFile() as texts:
        for text in _sound(documents, report, max_bytes, texts):
            kept = report.sources[documents.source].kept
            for part in cut(text, max_bytes):
                data = part.encode()
                kept.characters += len(part)
                kept.lengths.append(len(data))
                if count_tokens:
                    count_tokens(part, kept)
                if files:
                    files[documents.source].write(data + f"\n{separator}\n".encode())
        _report_foreign(documents, report)
        if files and (examples := report.total.findings["foreign"].examples):
            raise FormatError(examples[0])
        if files and not report.total.kept.documents:
            raise ArgumentError("the repaired file would hold no document")
        if files and documents.n_pairs:
            raise ArgumentError(
                f"repair: {documents.n_pairs} of the documents are pairs of prompt and completion,"
                " which a .txt file would not keep apart"
            )
    return report


def _report_foreign(documents: Documents, report: Report) -> None:
    for source, items in documents.sources.items():
        for item in items:
            if isinstance(item, Path) and (n_invalid := documents.foreign.get(item)):
                report.sources[source].findings["foreign"].add(
                    f"{item}: in another encoding than UTF-8, as {n_invalid:,} bytes show; name it"
                    f" with --encoding: {ENCODINGS}, …"
                )


@contextmanager
def _repaired(repair: PathLike | None, sources: Iterable[str]) -> Iterator[dict[str, BinaryIO]]:
    """The file that each source's documents go to; none without ``repair``."""
    if repair is None:
        yield {}
    elif Path(repair).suffix:
        with whole_file(repair) as file:
            yield dict.fromkeys(sources, file)
    else:
        with whole_folder(repair) as folder, ExitStack() as opened:
            yield {
                name: opened.enter_context(open(folder / f"{name}.txt", "wb")) for name in sources
            }


def _sound(documents: Documents, report: Report, max_bytes: int, texts: BinaryIO) -> Iterator[str]:
    """The documents that are neither empty nor repeated, their encoding mended."""
    seen: set[bytes] = set()
    near = NearDuplicates(report.near, texts) if report.near is not None else None
    for where, pair in documents.pairs():
        original = "".join(pair)
        source = report.sources[documents.source]
        found = source.findings
        text = mend_encoding(original)
        source.documents += 1
        source.bytes += len(original.encode())
        if text != original:
            found["damaged"].add(f"{where}: {_difference(original, text)}")
        if "\ufffd" in text:
            at = text.index("\ufffd")
            found["lost"].add(f"{where}: {text[max(0, at - 20) : at + 20]!r}")
        if not text.strip() or not pair.completion.strip():
            found["empty"].add(where)
            continue
        if (key := text_key(text)) in seen:
            found["duplicates"].add(f"{where}: {text[:40]!r}")
            continue
        seen.add(key)
        if near and (likeness := near.find(where, text)):
            found["near"].add(
                f"{where}: {likeness.jaccard:.2f} like {likeness.where}: {text[:40]!r}"
            )
            continue
        if (size := len(text.encode())) > max_bytes:
            found["over_long"].add(f"{where}: {size:,} bytes: {text[:40]!r}")
        yield text


def _difference(before: str, after: str) -> str:
    same = next(
        (i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b),
        min(len(before), len(after)),
    )
    start = max(0, same - 15)
    return f"{before[start : same + 25]!r} -> {after[start : same + 25]!r}"


def _token_counter(tokenizer: PathLike) -> Callable[[str, Tally], None]:
    model = choose_encoding(tokenizer, 0.0, 0).model
    types = read_sentencepiece(model).types
    processor = open_processor(model)

    def count(text: str, tally: Tally) -> None:
        kinds = types[np.array(processor.encode(text), np.int64)]
        tally.tokens += len(kinds) + 2
        tally.unknown += int(np.count_nonzero(kinds == TokenType.UNKNOWN))
        tally.byte_tokens += int(np.count_nonzero(kinds == TokenType.BYTE))

    return count
