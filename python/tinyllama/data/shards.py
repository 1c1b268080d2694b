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
from dataclasses import asdict, dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ArgumentError, FormatError, MissingExtraError, TinyllamaError
from ..files import whole_file
from ..formats.sentencepiece import read_sentencepiece
from .documents import SEPARATOR, Documents, Pair, PathLike
from .encoding import Encoder, Encoding, choose_encoding

UNIT_BYTES = 4 << 20
SHARD_BYTES = 256 << 20
SPLITS = ("train", "valid")


@dataclass
class Count:
    """How much a split, a shard or a unit holds: documents, tokens, and bytes of their text.

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

    ``inputs``: files, folders or globs, as ``Documents`` reads them. ``tokenizer``: a
    SentencePiece ``.model`` file, or a model whose tokenizer is to be used. A document is in
    the validation split when a hash of its text and ``seed`` falls below ``valid_fraction``: its
    split never depends on its place, and equal documents (white space aside) share one. With
    ``valid``, all documents of those inputs are the validation split, and no others. Empty
    documents are left out.

    Shards ``train-00000.bin``, ``valid-00000.bin``, … are little-endian uint16 (uint32 for more
    than 65,535 tokens), each document wrapped in BOS … EOS. Where a split has pairs, ``….prompts``
    beside a shard, little-endian int32, says how many tokens of each document, BOS with them, are
    its prompt (0: it has none). The bytes do not depend on ``n_workers``; with more than one, call
    this under ``if __name__ == "__main__"``. A killed run that is started again goes on where it
    was.

    Returns the manifest that ``out/manifest.json`` holds. Raises ArgumentError for a split left
    without documents and values out of range, FormatError for unreadable text or tokenizers,
    FileExistsError when ``out`` holds something else than an unfinished or finished preparation.
    """
    if not 0 <= valid_fraction < 1:
        raise ArgumentError(f"valid_fraction is {valid_fraction}, expected 0 up to below 1")
    if n_workers < 1:
        raise ArgumentError(f"n_workers is {n_workers}, expected at least 1")
    out = Path(out)
    valid_fraction = 0.0 if valid is not None else valid_fraction
    encoding = choose_encoding(tokenizer, valid_fraction, seed)
    form: dict[str, Any] = {"field": field, "separator": separator, "instruct": instruct}
    sources = [("train", Documents(inputs, **form))]
    if valid is not None:
        sources.append(("valid", Documents(valid, **form)))
    parts = _open_folder(out)
    try:
        names = _encode_sources(sources, encoding, parts, n_workers, progress)
        counts = _counts(names, parts)
        _check_splits(counts, valid is not None, valid_fraction)
    except (ArgumentError, FormatError):  # bad input leaves nothing behind
        _remove(parts)
        raise
    for stale in (out / "manifest.json", *out.glob("*-[0-9]*.*"), *out.glob(".*.part")):
        stale.unlink(missing_ok=True)
    manifest = _manifest(encoding, names, counts, parts, out)
    with whole_file(out / "tokenizer.model") as file:
        file.write(encoding.model)
    with whole_file(out / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=2).encode() + b"\n")
    shutil.rmtree(parts)
    return manifest


def text_key(text: str) -> bytes:
    """16 bytes that stand for a document's words: the same however its white space is set."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


def is_validation(text: str, valid_fraction: float, seed: int) -> bool:
    """Whether a document belongs to the validation split: decided by its words and the seed."""
    mixed = hashlib.blake2b(text_key(text) + seed.to_bytes(8, "little", signed=True)).digest()
    return int.from_bytes(mixed[:8], "little") < valid_fraction * 2.0**64


def _open_folder(out: Path) -> Path:
    """The folder for units. What an earlier run left in ``out`` stays until all units exist."""
    parts = out / ".units"
    ours = parts.is_dir() or (out / "manifest.json").is_file()
    if out.exists() and not ours and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out}: exists and holds no prepared tokens; name a new folder")
    out.mkdir(parents=True, exist_ok=True)  # first, so that an error names this folder
    parts.mkdir(exist_ok=True)
    for leftover in parts.glob(".*.part"):
        leftover.unlink()
    return parts


def _remove(parts: Path) -> None:
    shutil.rmtree(parts)
    if not any(parts.parent.iterdir()):
        parts.parent.rmdir()


def _encode_sources(
    sources: list[tuple[str, Documents]],
    encoding: Encoding,
    parts: Path,
    n_workers: int,
    progress: bool,
) -> list[str]:
    names: list[str] = []
    with _progress_bar(sources, progress) as bar:
        done = 0
        for split, documents in sources:
            units = _units(documents)
            for name in _encode_all(units, split, encoding, parts, n_workers):
                names.append(name)
                bar.update(done + documents.position - bar.n)
            done += documents.size
        bar.update(done - bar.n)
    return names


def _units(documents: Documents) -> Iterator[list[Pair]]:
    unit: list[Pair] = []
    size = 0
    for _, pair in documents.pairs():
        if pair.completion.strip():
            unit.append(pair)
            size += len("".join(pair).encode())
            if size >= UNIT_BYTES:
                yield unit
                unit, size = [], 0
    if unit:
        yield unit


def _encode_all(
    units: Iterator[list[Pair]], split: str, encoding: Encoding, parts: Path, n_workers: int
) -> Iterator[str]:
    """Names of the units in order, each once it is on disk; few are in memory at a time."""
    key = encoding.key()
    named = ((_unit_name(unit, split, key), unit) for unit in units)
    if n_workers == 1:
        _start_worker(encoding)
        for name, unit in named:
            if not (parts / f"{name}.json").exists():
                _encode_unit(unit, split, parts / name)
            yield name
        return
    # Not forked: the caller may hold threads (torch's, OpenMP's) that do not survive a fork.
    with ProcessPoolExecutor(
        n_workers, get_context("spawn"), initializer=_start_process, initargs=(encoding,)
    ) as pool:
        waiting: deque[tuple[str, Future[None] | None]] = deque()
        try:
            for name, unit in named:
                finished = (parts / f"{name}.json").exists()
                job = None if finished else pool.submit(_encode_unit, unit, split, parts / name)
                waiting.append((name, job))
                while len(waiting) > 2 * n_workers:
                    yield _finished(waiting.popleft())
            while waiting:
                yield _finished(waiting.popleft())
        finally:
            for _, job in waiting:
                if job:
                    job.cancel()


def _finished(entry: tuple[str, Future[None] | None]) -> str:
    name, job = entry
    if job:
        try:
            job.result()
        except BrokenProcessPool:
            raise TinyllamaError(
                "a worker process was killed, most likely for lack of memory:"
                " try again with fewer workers; what is finished is kept"
            ) from None
    return name


def _unit_name(unit: list[Pair], split: str, key: bytes) -> str:
    digest = hashlib.sha256(key + split.encode())
    for text in (text for pair in unit for text in pair):
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


def _encode_unit(unit: list[Pair], split: str, path: Path) -> None:
    """Write ``path``.train, ``path``.valid, their prompts and, last, ``path``.json with counts."""
    encoding = _worker.encoding
    counts = {name: Count() for name in SPLITS}
    pieces: dict[str, list[np.ndarray]] = {name: [] for name in SPLITS}
    prompts: dict[str, list[int]] = {name: [] for name in SPLITS}
    for pair in unit:
        text = "".join(pair)
        if split == "train" and is_validation(text, encoding.valid_fraction, encoding.seed):
            side = "valid"
        else:
            side = split
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


def _counts(names: list[str], parts: Path) -> list[dict[str, Count]]:
    units = (json.loads((parts / f"{name}.json").read_bytes()) for name in names)
    return [{side: Count(**unit[side]) for side in SPLITS} for unit in units]


def _manifest(
    encoding: Encoding,
    names: list[str],
    counts: list[dict[str, Count]],
    parts: Path,
    out: Path,
) -> dict[str, Any]:
    splits: dict[str, Any] = {}
    for side in SPLITS:
        total = _sum(unit[side] for unit in counts)
        shards = []
        for number, unit_range in enumerate(_shard_ranges(names, parts, side)):
            units = [parts / f"{names[index]}.{side}" for index in unit_range]
            shard = out / f"{side}-{number:05d}.bin"
            count = _sum(counts[index][side] for index in unit_range)
            entry = {"file": shard.name, **count.entry(), "sha256": _join(units, shard)}
            if total.pairs:
                prompts = shard.with_suffix(".prompts")
                digest = _join([Path(f"{unit}.prompts") for unit in units], prompts)
                entry["prompts"] = {"file": prompts.name, "sha256": digest}
            shards.append(entry)
        splits[side] = {**total.entry(), "shards": shards}
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


def _shard_ranges(names: list[str], parts: Path, side: str) -> Iterator[list[int]]:
    """Which units make up each shard: whole ones, in order, until it is large enough."""
    gathered: list[int] = []
    size = 0
    for index, name in enumerate(names):
        n_bytes = (parts / f"{name}.{side}").stat().st_size
        if n_bytes:
            gathered.append(index)
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


def _sum(counts: Iterable[Count]) -> Count:
    total = Count()
    for count in counts:
        total.add(count)
    return total


def _check_splits(counts: list[dict[str, Count]], named: bool, valid_fraction: float) -> None:
    documents = {side: sum(unit[side].documents for unit in counts) for side in SPLITS}
    if not documents["train"]:
        raise ArgumentError("the inputs leave no document to train on")
    if not documents["valid"] and named:
        raise ArgumentError("the validation inputs hold no document")
    if not documents["valid"] and valid_fraction:
        raise ArgumentError(
            f"valid_fraction {valid_fraction} leaves no validation document among"
            f" {documents['train']}: raise it, or name a validation file"
        )


def _progress_bar(sources: list[tuple[str, Documents]], progress: bool) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        raise MissingExtraError("tqdm", "train") from None
    return tqdm(
        total=sum(documents.size for _, documents in sources),
        desc="data",
        unit="B",
        unit_scale=True,
        disable=not progress,
    )
