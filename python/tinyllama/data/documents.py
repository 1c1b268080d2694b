"""Documents out of files (text, JSONL, JSON, CSV, Parquet) and out of data sets of a hub."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import ArgumentError, FormatError, MissingExtraError
from ..files import PathLike
from .hub import HubDataset
from .sources import COMPRESSIONS, KINDS, find_sources, kind_of

SEPARATOR = "<|endoftext|>"
AUTO_FIELDS = ("story", "text", "content")
PAIR_FIELDS = ("prompt", "completion")
# A file is in another encoding, and not just strewn with bytes of one, when more than so many are
# not UTF-8: so large a part of the file (some pairs of GB 18030 do pass for UTF-8), or more than
# continue a character of UTF-8. Which encoding, they do not tell: each has letters for most bytes.
MAX_STRAY_BYTES, MAX_STRAY_SHARE = 20, 0.05
# A file is in UTF-8, whatever other encoding was named for it, when all of it is, with at least so
# many characters of several bytes. A few of GB 18030 may pass for UTF-8 as well; not this many.
LEAST_UTF8 = 10
ENCODINGS = "windows-1252 (Western Europe), iso-8859-2 (Central Europe), gb18030 (Chinese)"


class Pair(NamedTuple):
    """What is given and what is to follow it, joined as they are; a plain text has no prompt."""

    prompt: str
    completion: str


class Documents:
    """The documents of files, folders, globs and data sets, in order: an iterable of (where, text).

    ``where`` names the file and the line or record, for messages; ``text`` has no white space
    at its ends and may be empty. What a document is:

    - ``.txt``: what stands between lines that read ``separator``; without any, the whole file.
      So is a file read whose name, given in full, ends in something unknown here.
    - ``.jsonl``, ``.json`` (a list of objects or of strings), ``.csv``/``.tsv`` (with a header)
      and ``.parquet``: the value of ``field`` in each record; without ``field``, the first of
      story, text and content that a record has, or else prompt and completion, a pair. So in a
      data set, ``hf:…`` (see ``HubDataset``).

    Each file may end in ``.gz`` or ``.zst`` as well. A folder stands for all such files in it and
    below, sorted, but for hidden ones, a glob for those that it matches; a file named twice is read
    once. Memory holds one document at a time, but for ``.json``, which cannot be read in parts.

    An input that is a string may begin with ``NAME=``, letters, digits, ``_`` and ``-``: inputs of
    one name are a source, those without a name the source "text". Sources come one after another;
    ``source`` is the name of the one being read. No file may be in two.

    Pairs keep their white space. With ``instruct`` each text becomes one: see ``split_instruct``.

    Text is UTF-8, but for files of other kinds than Parquet when ``encoding`` names another, one
    that Python knows: then all of them are in it, and one in UTF-8 is refused.
    ``replace_invalid``: bytes that are not UTF-8 are taken as Windows-1252, those that are not in
    ``encoding`` become U+FFFD, and the callable is told where, with the text around them; without
    it they are a FormatError, like every damaged file, missing field or value that is not text.

    ``progress`` is the title of a progress bar, "" for none. The constructor raises OSError for
    missing files and data sets, ArgumentError for inputs that name no readable file and an unknown
    ``encoding``.
    """

    def __init__(
        self,
        inputs: PathLike | Iterable[PathLike],
        *,
        field: str | None = None,
        separator: str = SEPARATOR,
        instruct: bool = False,
        encoding: str | None = None,
        replace_invalid: Callable[[str], None] | None = None,
        progress: str = "",
    ) -> None:
        self.sources = find_sources(inputs)
        self.source = ""
        self.field = field
        self.separator = separator
        self.instruct = instruct
        self.encoding = encoding
        self.replace_invalid = replace_invalid
        self.progress = progress
        if encoding is not None:
            _check_encoding(encoding)
        items = [item for items in self.sources.values() for item in items]
        #: the local files among the inputs
        self.paths = [item for item in items if isinstance(item, Path)]
        #: bytes on disk in all files, and how many of them have been read: for progress bars.
        #: Of a data set only the text counts, as it comes: with one, the size is not known.
        self.size = sum(p.stat().st_size for p in self.paths) if self.paths == items else None
        #: files read that are in another encoding than UTF-8, and how many bytes show that
        self.foreign: dict[Path, int] = {}
        self.n_pairs = 0  #: those with a prompt among the documents read so far
        self._finished = 0
        self._raw: io.BufferedReader | None = None
        for item in items:
            if isinstance(item, HubDataset):
                item.open()

    @property
    def position(self) -> int:
        at = self._raw.tell() if self._raw and self._raw.seekable() else 0
        return self._finished + at

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for where, pair in self.pairs():
            yield where, pair.prompt + pair.completion

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """The same documents as (where, pair)."""
        if not self.progress:
            yield from self._read_all()
            return
        try:
            from tqdm import tqdm
        except ImportError:
            raise MissingExtraError("tqdm", "data") from None
        with tqdm(
            total=self.size, desc=self.progress, unit="B", unit_scale=True, disable=None
        ) as bar:
            for document in self._read_all():
                yield document
                bar.update(self.position - bar.n)
            bar.update(self.position - bar.n)

    def _read_all(self) -> Iterator[tuple[str, Pair]]:
        self._finished = self.n_pairs = 0
        for source, items in self.sources.items():
            self.source = source
            for item in items:
                if isinstance(item, HubDataset):
                    documents = self._read_hub(item)
                else:
                    documents = self._read_file(item)
                for record, pair in documents:
                    where = f"{item}: {record}"
                    if not pair.prompt:
                        pair = Pair("", pair.completion.strip())
                        if self.instruct and pair.completion:
                            pair = split_instruct(pair.completion, where)
                    self.n_pairs += bool(pair.prompt)
                    yield where, pair

    def _read_hub(self, hub: HubDataset) -> Iterator[tuple[str, Pair]]:
        columns = _choose(hub.columns, self.field, str(hub)) if hub.columns is not None else None
        for number, record in enumerate(hub.records(columns), 1):
            pair = _pair_of(record, self.field, f"{hub}: record {number}")
            self._finished += len("".join(pair).encode())
            yield f"record {number}", pair

    def _read_file(self, path: Path) -> Iterator[tuple[str, Pair]]:
        with open(path, "rb") as raw:
            self._raw = raw
            try:
                yield from self._read(path, raw)
            except (EOFError, zlib.error, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise
                raise FormatError(f"{path}: damaged compressed data: {error}") from None
            finally:
                self._raw = None
        self._finished += path.stat().st_size

    def _read(self, path: Path, raw: io.BufferedReader) -> Iterator[tuple[str, Pair]]:
        kind, compression = kind_of(path)
        stream = _decompressed(raw, compression)
        if kind is None and b"\0" in stream.peek(8192):  # as git tells them from text
            raise FormatError(
                f"{path}: unknown kind of file, and not text; known: {', '.join(KINDS)},"
                f" each also with {' or '.join(COMPRESSIONS)} after it"
            )
        if kind == "parquet":  # read from its end, so a compressed one has to be in memory
            file = io.BytesIO(stream.read()) if compression else raw
            return _read_parquet(file, self.field, path)
        if self.encoding is None:
            lines = _lines(stream, path, self.replace_invalid, self.foreign)
        else:
            lines = _lines_in(self.encoding, stream, path, self.replace_invalid)
        if kind in ("text", None):
            return _read_text(lines, self.separator)
        if kind == "jsonl":
            return _read_jsonl(lines, self.field, path)
        if kind == "json":
            return _read_json(lines, self.field, path)
        return _read_csv(lines, self.field, path, "\t" if kind == "tsv" else ",")


def split_instruct(text: str, where: str) -> Pair:
    """A text in TinyStories-Instruct's layout, cut behind ``Story:``.

    Lines that begin with Words:, Features:, Summary: or Random sentence:, in any order, then one
    that begins with Story: (Eldan and Li, arXiv 2305.07759). Raises FormatError for another text.
    """
    match = re.match(r"(?:Words|Features|Summary|Random sentence):.*?^Story:", text, re.M | re.S)
    if match is None:
        raise FormatError(
            f"{where}: not in the layout of TinyStories-Instruct: Words:, Features: or Summary: at"
            f" its beginning, then a line with Story:; it begins {text[:40]!r}"
        )
    return Pair(match[0], text[match.end() :])


def _decompressed(raw: io.BufferedReader, compression: str | None) -> io.BufferedReader:
    if compression == "gzip":
        return gzip.open(raw)  # type: ignore[return-value]
    if compression == "zstd":
        try:
            import pyarrow
        except ImportError:
            raise MissingExtraError("pyarrow", "data") from None
        return io.BufferedReader(pyarrow.input_stream(raw, compression="zstd"))
    return raw


def _take_as_windows_1252(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    # The five bytes Windows-1252 leaves undefined stay control characters, which ftfy knows.
    damaged = error.object[error.start : error.end]
    text = "".join(bytes([b]).decode("cp1252", "ignore") or chr(b) for b in damaged)
    return text, error.end


codecs.register_error("tinyllama-windows-1252", _take_as_windows_1252)


def _lines(
    stream: BinaryIO,
    path: Path,
    replace_invalid: Callable[[str], None] | None,
    foreign: dict[Path, int],
) -> Iterator[str]:
    """Lines of UTF-8 without a byte order mark, each with its ``\\n`` (``\\r\\n`` becomes one)."""
    offset = n_invalid = n_continuing = 0
    for number, line in enumerate(stream, 1):
        start = offset
        offset += len(line)
        if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise FormatError(
                f"{path}: UTF-16, expected UTF-8: `tinyllama data check --encoding utf-16 --repair`"
                " makes it that"
            )
        if number == 1 and line.startswith(codecs.BOM_UTF8):
            line = line[len(codecs.BOM_UTF8) :]
            start += len(codecs.BOM_UTF8)
        if line.endswith(b"\r\n"):
            line = line[:-2] + b"\n"
        try:
            text = line.decode()
            n_continuing += len(line) - len(text)
        except UnicodeDecodeError as error:
            at = start + error.start
            if replace_invalid is None:
                raise FormatError(
                    f"{path}: line {number}: not UTF-8: byte 0x{line[error.start]:02X}"
                    f" at offset {at} ({error.reason}); `tinyllama data check --repair` takes"
                    " stray bytes as Windows-1252, and reads other encodings with --encoding"
                ) from None
            text = line.decode(errors="tinyllama-windows-1252")
            sound = line.decode(errors="ignore")
            n_sound = len(sound.encode())
            n_continuing += n_sound - len(sound)
            n_invalid += len(line) - n_sound
            near = _around(text, len(line[: error.start].decode()))
            replace_invalid(f"{path}: line {number}: byte offset {at}: {near}")
        yield text
    if n_invalid > max(MAX_STRAY_BYTES, min(n_continuing, MAX_STRAY_SHARE * offset)):
        foreign[path] = n_invalid


class _Watched(io.BufferedIOBase):
    """A stream, and whether it has been UTF-8 so far: with how many characters of several bytes."""

    def __init__(self, stream: io.BufferedReader) -> None:
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self.is_utf8, self.n_characters = True, 0

    def readable(self) -> bool:
        return True

    def read1(self, size: int = -1) -> bytes:
        data = self._stream.read1(size)
        if self.is_utf8:
            try:
                text = self._decoder.decode(data, final=not data)
            except UnicodeDecodeError:
                self.is_utf8 = False
            else:
                self.n_characters += len(text) - len(text.encode("ascii", "ignore"))
        return data


def _lines_in(
    encoding: str,
    stream: io.BufferedReader,
    path: Path,
    replace_invalid: Callable[[str], None] | None,
) -> Iterator[str]:
    """The same of text in another encoding, its byte order mark, if any, taken off."""
    errors = "strict" if replace_invalid is None else "replace"
    watched, number = _Watched(stream), 0
    text = io.TextIOWrapper(watched, encoding, errors, newline="\n")  # type: ignore[type-var]
    try:
        for number, line in enumerate(text, 1):
            if replace_invalid and "\ufffd" in line:
                near = _around(line, line.index("\ufffd"))
                replace_invalid(f"{path}: line {number}: {near}")
            yield line[:-2] + "\n" if line.endswith("\r\n") else line
        is_utf8 = watched.is_utf8 and watched.n_characters >= LEAST_UTF8
        if is_utf8 and not codecs.lookup(encoding).name.startswith("utf-8"):
            raise FormatError(
                f"{path}: is UTF-8, not {encoding}: name files of one encoding at once, those in"
                " UTF-8 without --encoding"
            )
    except UnicodeError as error:  # its place is one in a piece of the file
        raise FormatError(f"{path}: behind line {number}: not {encoding}: {error}") from None
    finally:
        text.detach()  # or it would close the stream, whose place is still asked for


def _check_encoding(encoding: str) -> None:
    try:
        "".encode(encoding)
    except LookupError as error:
        raise ArgumentError(
            f"encoding is {encoding!r}: {error}; expected one that Python knows, such as"
            f" {ENCODINGS}"
        ) from None


def _around(text: str, at: int) -> str:
    return repr(text[max(0, at - 15) : at + 15].strip())


def _read_text(lines: Iterator[str], separator: str) -> Iterator[tuple[str, Pair]]:
    first, gathered = 1, list[str]()
    number = 0
    for number, line in enumerate(lines, 1):
        if line.strip() == separator:
            yield f"line {first}", Pair("", "".join(gathered))
            first, gathered = number + 1, []
        else:
            gathered.append(line)
    # What follows the last separator is a document only if there is something.
    if text := "".join(gathered).strip():
        yield f"line {first}", Pair("", text)


def _read_jsonl(lines: Iterator[str], field: str | None, path: Path) -> Iterator[tuple[str, Pair]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{path}: {where}: not JSON: {error}") from None
        yield where, _pair_of(record, field, f"{path}: {where}")


def _read_json(lines: Iterator[str], field: str | None, path: Path) -> Iterator[tuple[str, Pair]]:
    try:
        records = json.loads("".join(lines))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: not JSON: {error}") from None
    if not isinstance(records, list):
        raise FormatError(f"{path}: holds a JSON {_json_name(records)}, expected a list of objects")
    for number, record in enumerate(records, 1):
        where = f"record {number}"
        yield where, _pair_of(record, field, f"{path}: {where}")


def _read_csv(
    lines: Iterator[str], field: str | None, path: Path, delimiter: str
) -> Iterator[tuple[str, Pair]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents beyond 128 KiB
    reader = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        if reader.fieldnames:
            _choose(reader.fieldnames, field, f"{path}: line 1, which has to name the columns")
        for number, record in enumerate(reader, 1):
            where = f"record {number}"
            if None in record:
                raise FormatError(f"{path}: {where}: more values than the header has names")
            yield where, _pair_of(record, field, f"{path}: {where}")
    except csv.Error as error:
        raise FormatError(f"{path}: line {reader.reader.line_num}: damaged CSV: {error}") from None


def _read_parquet(stream: BinaryIO, field: str | None, path: Path) -> Iterator[tuple[str, Pair]]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError:
        raise MissingExtraError("pyarrow", "data") from None
    try:
        file = pyarrow.parquet.ParquetFile(stream)
        columns = list(_choose(file.schema_arrow.names, field, str(path)))
        number = 0
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                number += 1
                where = f"record {number}"
                yield where, _pair_of(record, field, f"{path}: {where}")
    except pyarrow.lib.ArrowException as error:
        raise FormatError(f"{path}: damaged Parquet data: {error}") from None


def _choose(names: Iterable[Any], field: str | None, where: str) -> tuple[str, ...]:
    """The field that holds the text, or those that hold prompt and completion."""
    names = list(names)
    for name in (field,) if field is not None else AUTO_FIELDS:
        if name in names:
            return (name,)
    if field is None and all(name in names for name in PAIR_FIELDS):
        return PAIR_FIELDS
    known = f"{', '.join(AUTO_FIELDS)}, or {' and '.join(PAIR_FIELDS)}"
    wanted = f"field {field!r}" if field is not None else f"any of {known}"
    has = ", ".join(map(str, names)) or "no fields"
    raise FormatError(
        f"{where}: does not have {wanted}: it has {has} (--field names one that holds"
        " the text; those of a pair are called prompt and completion)"
    )


def _pair_of(record: Any, field: str | None, where: str) -> Pair:
    if isinstance(record, str) and field is None:
        return Pair("", _checked(record, "the record", where))
    if not isinstance(record, dict):
        raise FormatError(f"{where}: holds a JSON {_json_name(record)}, expected an object")
    texts = [_checked(record[name], name, where) for name in _choose(record, field, where)]
    return Pair("", *texts) if len(texts) == 1 else Pair(*texts)


def _checked(text: Any, name: str, where: str) -> str:
    if not isinstance(text, str):
        raise FormatError(f"{where}: {name} is {_json_name(text)}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"{where}: {name} holds half a surrogate pair (U+{ord(text[error.start]):04X})"
            f" at character {error.start}"
        ) from None
    return text


def _json_name(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number" if isinstance(value, (int, float)) else "value")
