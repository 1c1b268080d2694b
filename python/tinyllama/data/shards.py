"""Documents to shards of tokens on disk, in parallel, resumable, the same bytes every time.

The documents are cut, in order, into units of a few megabytes. A unit becomes tokens in one
process and is written to ``DIR/.units`` under a name that is the hash of its text and of all that
decides its tokens: a run that was killed finds what it had finished. Once all units exist they are
joined, in order, into shards, and the manifest is written last: a folder without one is unfinished.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import ArgumentError, FormatError, TinyllamaError
from ..files import PathLike, whole_file
from ..formats.sentencepiece import read_sentencepiece
from .documents import SEPARATOR, Documents, Pair
from .encoding import Encoder, Encoding, choose_encoding
from .folder import open_folder, remove_units
from .sources import listed, title
from .splits import SPLITS, check_splits, fraction_for_one, is_validation, text_key

UNIT_BYTES = 4 << 20
SHARD_BYTES = 256 << 20


@dataclass
class Count:
    """How much a split, a source, a shard or a unit holds; bytes are those of the text.

    ``pairs`` are the documents with a prompt, ``prompt_bytes`` the part of ``bytes`` in prompts.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0
    pairs: int = 0
    prompt_bytes: int = 0

    def add(self, other: Count) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.bytes += other.bytes
        self.pairs += other.pairs
        self.prompt_bytes += other.prompt_bytes

    def entry(self) -> dict[str, Any]:
        """As the manifest has it: nothing is said of pairs where there are none."""
        plain = {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes}
        return asdict(self) if self.pairs else plain


class Unit(NamedTuple):
    """Documents of one source that are encoded together, and the split they are for."""

    split: str
    source: str
    pairs: list[Pair]


class Encoded(NamedTuple):
    """A unit on disk: its name there, its source, and what it adds to each split."""

    name: str
    source: str
    counts: dict[str, Count]


def prepare(
    inputs: PathLike | Iterable[PathLike],
    tokenizer: PathLike,
    out: PathLike,
    *,
    valid: PathLike | Iterable[PathLike] | None = None,
    valid_fraction: float = 0.01,
    seed: int = 0,
    n_workers: int = 1,
    field: str | None = None,
    separator: str = SEPARATOR,
    instruct: bool = False,
    progress: bool = False,
) -> dict[str, Any]:
    """Encode the documents of ``inputs`` into memory-mapped token shards in the folder ``out``.

    ``inputs``: what ``Documents`` reads; the manifest tells how much came of each source, and
    training may weight them. ``tokenizer``: a SentencePiece ``.model`` file, or a model whose
    tokenizer is to be used. A document is in the validation split when a hash of its text and
    ``seed`` falls below ``valid_fraction``: its split never depends on its place, and equal
    documents (white space aside) share one. Of few, where that holds none out, it is the one with
    the lowest hash. With ``valid``, the documents of those inputs are the validation split, and
    left out where ``inputs`` has them too (the manifest's ``left_out``), as empty ones are, and
    pairs without a completion (``empty``).

    Shards ``train-00000.bin``, ``valid-00000.bin``, … are little-endian uint16 (uint32 for more
    than 65,535 tokens), each document wrapped in BOS … EOS, the sources one after another. Where a
    split has pairs, ``….prompts`` beside a shard, little-endian int32, says how many tokens of each
    document, BOS with them, are its prompt (0: it has none). The bytes do not depend on
    ``n_workers``; with more than one, call this under ``if __name__ == "__main__"``. A killed run
    that is started again goes on where it was.

    Returns the manifest that ``out/manifest.json`` holds. Raises ArgumentError for a split left
    without documents and values out of range, FormatError for unreadable text or tokenizers,
    FileExistsError when ``out`` holds something else than an unfinished preparation, or a finished
    one by other arguments (the manifest's ``made_from``): no data is thrown away.
    """
    if not 0 <= valid_fraction < 1:
        raise ArgumentError(f"valid_fraction is {valid_fraction}, expected 0 up to below 1")
    if not -(2**63) <= seed < 2**63:
        raise ArgumentError(f"seed is {seed}, expected a number of 64 bits")
    if n_workers < 1:
        raise ArgumentError(f"n_workers is {n_workers}, expected at least 1")
    out = Path(out)
    valid_fraction = 0.0 if valid is not None else valid_fraction
    encoding = choose_encoding(tokenizer, valid_fraction, seed)
    form: dict[str, Any] = {"field": field, "separator": separator, "instruct": instruct}
    # Validation text first, so that it is known when the other is read.
    given = {"train": listed(inputs)}
    if valid is not None:
        given = {"valid": listed(valid), **given}
    splits = {
        split: Documents(text, progress=split if progress else "", **form)
        for split, text in given.items()
    }
    made_from = {
        "tokenizer": hashlib.sha256(encoding.model).hexdigest(),
        "sources": sorted(splits["train"].sources),
        "inputs": [title(text) for text in given["train"]],
        "valid": [title(text) for text in given.get("valid", [])],
        "valid_fraction": valid_fraction,
        "seed": seed,
        **form,
    }
    parts = open_folder(out, made_from)
    left_out = {"left_out": 0, "empty": 0}
    try:
        units = _encode_all(_units(splits, left_out), encoding, parts, n_workers)
        if valid_fraction and _may_hold_one_out(units, splits["train"]):
            encoding = replace(encoding, valid_fraction=fraction_for_one(splits["train"], seed))
            units = _encode_all(_units(splits, left_out), encoding, parts, n_workers)
        documents = {side: _sum(units, side).documents for side in SPLITS}
        names = {split: list(map(str, text)) for split, text in given.items()}
        check_splits(documents, names["train"], names.get("valid", []), valid_fraction)
    except (ArgumentError, FormatError):  # bad input leaves nothing behind
        remove_units(parts)
        raise
    manifest = _write_shards(encoding, units, parts, out)
    manifest |= {**left_out, "made_from": made_from}
    with whole_file(out / "tokenizer.model") as file:
        file.write(encoding.model)
    with whole_file(out / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    shutil.rmtree(parts)
    return manifest


def _may_hold_one_out(units: list[Encoded], documents: Documents) -> bool:
    """Whether nothing is held out, something could be, and what decides it can be read again."""
    few = not _sum(units, "valid").documents and _sum(units, "train").documents > 1
    return few and all(path.is_file() for path in documents.paths)


def _units(splits: dict[str, Documents], left_out: dict[str, int]) -> Iterator[Unit]:
    """The documents in units; ``left_out`` counts, anew, those that are in none, by the reason."""
    left_out.update(dict.fromkeys(left_out, 0))
    held_out: set[bytes] = set()
    for split, documents in splits.items():
        for source, group in groupby(documents.pairs(), lambda _: documents.source):  # noqa: B023
            pairs: list[Pair] = []
            size = 0
            for _, pair in group:
                if not pair.completion.strip():
                    left_out["empty"] += 1
                    continue
                text = "".join(pair)
                if split == "valid":
                    held_out.add(text_key(text))
                elif held_out and text_key(text) in held_out:
                    left_out["left_out"] += 1
                    continue
                pairs.append(pair)
                size += len(text.encode())
                if size >= UNIT_BYTES:
                    yield Unit(split, source, pairs)
                    pairs, size = [], 0
            if pairs:
                yield Unit(split, source, pairs)


def _encode_all(
    units: Iterator[Unit], encoding: Encoding, parts: Path, n_workers: int
) -> list[Encoded]:
    named = _encode_each(units, encoding, parts, n_workers)
    return [Encoded(name, source, _counts(parts / name)) for name, source in named]


def _encode_each(
    units: Iterator[Unit], encoding: Encoding, parts: Path, n_workers: int
) -> Iterator[tuple[str, str]]:
    """(name, source) of the units in order, each once it is on disk; few are in memory at once."""
    key = encoding.key()
    named = ((_unit_name(unit, key), unit) for unit in units)
    if n_workers == 1:
        _start_worker(encoding)
        for name, unit in named:
            if not (parts / f"{name}.json").exists():
                _encode_unit(unit, parts / name)
            yield name, unit.source
        return
    # Not forked: the caller may hold threads (torch's, OpenMP's) that do not survive a fork.
    with ProcessPoolExecutor(
        n_workers, get_context("spawn"), initializer=_start_process, initargs=(encoding,)
    ) as pool:
        waiting: deque[tuple[tuple[str, str], Future[None] | None]] = deque()
        try:
            for name, unit in named:
                finished = (parts / f"{name}.json").exists()
                job = None if finished else pool.submit(_encode_unit, unit, parts / name)
                waiting.append(((name, unit.source), job))
                while len(waiting) > 2 * n_workers:
                    yield _finished(waiting.popleft())
            while waiting:
                yield _finished(waiting.popleft())
        finally:
            for _, job in waiting:
                if job:
                    job.cancel()


def _finished(entry: tuple[tuple[str, str], Future[None] | None]) -> tuple[str, str]:
    unit, job = entry
    if job:
        try:
            job.result()
        except BrokenProcessPool:
            raise TinyllamaError(
                "a worker process was killed, most likely for lack of memory:"
                " try again with fewer workers; what is finished is kept"
            ) from None
    return unit


def _unit_name(unit: Unit, key: bytes) -> str:
    digest = hashlib.sha256(key + unit.split.encode())
    for text in (text for pair in unit.pairs for text in pair):
        data = text.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


_worker: Encoder  # this process's


def _start_worker(encoding: Encoding) -> None:
    global _worker
    _worker = Encoder(encoding)


def _start_process(encoding: Encoding) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that collects
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _start_worker(encoding)


def _end_with_parent() -> None:
    # The queue a worker waits on stays open when the process that fills it is killed.
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _encode_unit(unit: Unit, path: Path) -> None:
    """Write ``path``.train, ``path``.valid, their prompts and, last, ``path``.json with counts."""
    encoding = _worker.encoding
    counts = {name: Count() for name in SPLITS}
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    prompts: dict[str, list[int]] = {name: [] for name in SPLITS}
    for pair in unit.pairs:
        side, text = unit.split, "".join(pair)
        if side == "train" and is_validation(text, encoding.valid_fraction, encoding.seed):
            side = "valid"
        tokens, n_prompt = _worker.encode(pair)
        pieces[side].append(np.array(tokens, np.dtype(encoding.dtype).newbyteorder("<")))
        prompts[side].append(n_prompt)
        prompt_bytes = len(pair.prompt.encode())
        counts[side].add(Count(1, len(tokens), len(text.encode()), int(n_prompt > 0), prompt_bytes))
    for side in SPLITS:
        with whole_file(path.with_suffix(f".{side}")) as file:
            for array in pieces[side]:
                file.write(array.tobytes())
        with whole_file(path.with_suffix(f".{side}.prompts")) as file:
            file.write(np.array(prompts[side], "<i4").tobytes())
    with whole_file(path.with_suffix(".json")) as file:
        file.write(json.dumps({side: asdict(count) for side, count in counts.items()}).encode())


def _counts(path: Path) -> dict[str, Count]:
    unit = json.loads(path.with_suffix(".json").read_bytes())
    return {side: Count(**unit[side]) for side in SPLITS}


def _write_shards(
    encoding: Encoding, units: list[Encoded], parts: Path, out: Path
) -> dict[str, Any]:
    """Replace what ``out`` holds by the shards of ``units``: the manifest, still to be written."""
    ours = [f"{side}-[0-9]*.{kind}" for side in SPLITS for kind in ("bin", "prompts")]
    for stale in chain.from_iterable(map(out.glob, ("manifest.json", *ours, ".*.part"))):
        stale.unlink()
    splits: dict[str, Any] = {}
    for side in SPLITS:
        total = _sum(units, side)
        shards = []
        for number, members in enumerate(_shards(units, parts, side)):
            shard = out / f"{side}-{number:05d}.bin"
            files = [parts / f"{unit.name}.{side}" for unit in members]
            count = _sum(members, side).entry()
            entry = {"file": shard.name, **count, "sha256": _join(files, shard)}
            if total.pairs:
                prompts = shard.with_suffix(".prompts")
                digest = _join([Path(f"{file}.prompts") for file in files], prompts)
                entry["prompts"] = {"file": prompts.name, "sha256": digest}
            shards.append(entry)
        sources = []
        for name, of_source in groupby(units, lambda unit: unit.source):
            of_side = _sum(of_source, side)
            if of_side.documents:
                sources.append({"name": name, **of_side.entry()})
        splits[side] = {**total.entry(), "sources": sources, "shards": shards}
    vocabulary = read_sentencepiece(encoding.model)
    return {
        "format": "tinyllama-tokens",
        "version": 1,
        "dtype": encoding.dtype,
        "tokenizer": {
            "file": "tokenizer.model",
            "sha256": hashlib.sha256(encoding.model).hexdigest(),
            "vocab_size": len(vocabulary),
        },
        "bos_id": encoding.bos_id,
        "eos_id": encoding.eos_id,
        "splits": splits,
    }


def _shards(units: list[Encoded], parts: Path, side: str) -> Iterator[list[Encoded]]:
    """Which units make up each shard: whole ones, in order, until it is large enough."""
    gathered: list[Encoded] = []
    size = 0
    for unit in units:
        n_bytes = (parts / f"{unit.name}.{side}").stat().st_size
        if n_bytes:
            gathered.append(unit)
            size += n_bytes
        if size >= SHARD_BYTES:
            yield gathered
            gathered, size = [], 0
    if gathered:
        yield gathered


def _join(files: Iterable[Path], shard: Path) -> str:
    digest = hashlib.sha256()
    with whole_file(shard) as target:
        for file in files:
            data = file.read_bytes()
            digest.update(data)
            target.write(data)
    return digest.hexdigest()


def _sum(units: Iterable[Encoded], side: str) -> Count:
    total = Count()
    for unit in units:
        total.add(unit.counts[side])
    return total
