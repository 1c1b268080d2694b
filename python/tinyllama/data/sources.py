"""Which files and data sets the inputs of a command stand for, and of what kind each file is."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from ..errors import ArgumentError
from ..files import PathLike
from .hub import PREFIX, HubDataset

DEFAULT_SOURCE = "text"
KINDS = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NAMED = re.compile("([A-Za-z0-9_-]+)=(.+)")


def find_sources(
    inputs: PathLike | Iterable[PathLike],
) -> dict[str, list[Path | HubDataset]]:
    """What ``inputs`` stand for: for each source, by name, its files and data sets, in order."""
    sources: dict[str, list[Path | HubDataset]] = {}
    source_of: dict[str, str] = {}
    for given in listed(inputs):
        source, place = _parted(given)
        is_hub = isinstance(place, str) and place.startswith(PREFIX)
        for item in [HubDataset(str(place))] if is_hub else find_files(Path(place)):
            key = os.path.realpath(item) if isinstance(item, Path) else str(item)
            before = source_of.get(key)
            if before is None:
                source_of[key] = source
                sources.setdefault(source, []).append(item)
            elif before != source:
                raise ArgumentError(f"{item} is in two sources, {before} and {source}")
    if not sources:
        raise ArgumentError("no input was named")
    return sources


def listed(inputs: PathLike | Iterable[PathLike]) -> list[PathLike]:
    """The inputs, one or many, as a list."""
    return [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)


def title(given: PathLike) -> str:
    """An input with its source, but without the folder it lies in."""
    source, place = _parted(given)
    if not str(place).startswith(PREFIX):
        place = Path(os.path.abspath(place)).name
    return f"{source}={place}"


def _parted(given: PathLike) -> tuple[str, PathLike]:
    named = NAMED.fullmatch(given) if isinstance(given, str) else None
    return (named[1], named[2]) if named else (DEFAULT_SOURCE, given)


def find_files(path: Path) -> list[Path]:
    """The files that a file, a folder or a glob stands for, in order."""
    if path.is_dir():
        _refuse_what_is_no_text(path)
        files = sorted(
            file
            for file in path.rglob("*")
            if _is_known_file(file) and not _is_hidden(file.relative_to(path))
        )
        if not files:
            raise ArgumentError(f"{path}: the folder holds no {', '.join(KINDS)} file")
        return files
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        raise FileNotFoundError(f"{path}: no such file or folder")
    files = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    files = [file for file in files if _is_known_file(file)]
    if not files:
        raise FileNotFoundError(f"{path}: no file matches that ends in {', '.join(KINDS)}")
    return files


def _refuse_what_is_no_text(folder: Path) -> None:
    # Their .json files would be read as records, and what is wrong with them told.
    weights = chain(folder.glob("*.safetensors"), folder.glob("*.bin"))
    if (folder / "config.json").is_file() and any(weights):
        raise ArgumentError(f"{folder}: the folder of a model, not of text")
    if (folder / "manifest.json").is_file() and any(folder.glob("train-*.bin")):
        raise ArgumentError(f"{folder}: a folder of prepared tokens, not of text")


def kind_of(path: Path) -> tuple[str | None, str | None]:
    """What a name says of a file's kind and of its compression; None where it says nothing."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = COMPRESSIONS.get(suffixes[-1]) if suffixes else None
    if compression:
        suffixes.pop()
    return KINDS.get(suffixes[-1]) if suffixes else None, compression


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _is_known_file(path: Path) -> bool:
    return path.is_file() and kind_of(path)[0] is not None
