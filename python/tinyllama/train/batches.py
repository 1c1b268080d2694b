"""Token shards as training windows, mixed and shuffled without state, and as documents to score."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.documents import Pair
from ..errors import ConfigError, FormatError
from ..files import sha256_of

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

UNSCORED = -100  # a target that is no target: what torch's cross_entropy passes over


class TokenFolder:
    """A folder made by ``tinyllama data prepare``: its manifest, checked, and its splits.

    Raises OSError when ``path`` is no such folder or a file in it cannot be read, FormatError when
    the manifest is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        source = self.path / "manifest.json"
        if not source.is_file():
            raise FileNotFoundError(
                f"{path}: no folder of prepared tokens: make one with `tinyllama data prepare`"
            )
        raw = source.read_bytes()
        self.sha256 = hashlib.sha256(raw).hexdigest()
        try:
            manifest: dict[str, Any] = json.loads(raw)
            if manifest["format"] != "tinyllama-tokens" or manifest["version"] != 1:
                raise FormatError(f"{source}: not a tinyllama-tokens manifest of version 1")
            self.dtype = np.dtype({"uint16": "<u2", "uint32": "<u4"}[manifest["dtype"]])
            self.bos_id = int(manifest["bos_id"])
            self.eos_id = int(manifest["eos_id"])
            self.vocab_size = int(manifest["tokenizer"]["vocab_size"])
            self.tokenizer_entry: dict[str, Any] = manifest["tokenizer"]
            self.tokenizer = self.path / self.tokenizer_entry["file"]
            self.splits: dict[str, Any] = manifest["splits"]
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise FormatError(f"{source}: not JSON: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(f"{source}: field {error} is missing or wrong") from None

    @property
    def counts(self) -> dict[str, Any]:
        """Documents, tokens and bytes of each split, and of its sources by name."""
        return {
            name: {key: value for key, value in split.items() if key != "shards"}
            for name, split in self.splits.items()
        }

    def check_files(self, *splits: str) -> None:
        """Raise FormatError, naming the file, where one of these splits (none named: of any) or the
        tokenizer is not as the manifest's SHA-256 says."""
        named = [self.splits[name] for name in splits or self.splits]
        shards = [shard for split in named for shard in split["shards"]]
        prompts = [shard["prompts"] for shard in shards if "prompts" in shard]
        for entry in (self.tokenizer_entry, *shards, *prompts):
            file = self.path / entry["file"]
            if "sha256" in entry and sha256_of(file) != entry["sha256"]:
                raise FormatError(
                    f"{file}: is damaged (its SHA-256 is not the one in manifest.json): prepare the"
                    " data again"
                )

    def split(self, name: str) -> Split:
        """The documents of ``name`` ("train" or "valid")."""
        if name not in self.splits:
            raise FormatError(f"{self.path / 'manifest.json'}: there is no split {name!r}")
        try:
            return Split(self, name)
        except KeyError as error:
            raise FormatError(
                f"{self.path / 'manifest.json'}: split {name}: field {error} is missing"
            ) from None


class Split:
    """The documents of one split: memory-mapped tokens and where each document lies in them.

    ``shard``, ``start``, ``length``, ``prompt``: int arrays (n_documents,). A document is
    BOS … EOS; its first ``prompt`` tokens are given, not learned. ``n_bytes`` counts the UTF-8 of
    what is learned. ``sources``: the number of documents of each source, by name, in the order
    in which they lie.
    """

    def __init__(self, folder: TokenFolder, name: str) -> None:
        entry = folder.splits[name]
        self.name = f"{folder.path}, split {name}"
        self.n_bytes = int(entry["bytes"]) - int(entry.get("prompt_bytes", 0))
        self.shards: list[np.ndarray] = []
        where: list[np.ndarray] = []
        prompts = [np.zeros(0, np.int32)]
        for shard in entry["shards"]:
            file = folder.path / shard["file"]
            size = file.stat().st_size
            if size != shard["tokens"] * folder.dtype.itemsize:
                raise FormatError(
                    f"{file}: {size} bytes, the manifest promises {shard['tokens']} tokens"
                )
            if size == 0:
                continue
            tokens = np.memmap(file, folder.dtype, "r")
            start = np.flatnonzero(tokens == folder.bos_id)
            if len(start) != shard["documents"] or start[0] != 0:
                raise FormatError(
                    f"{file}: {len(start)} documents begin (token {folder.bos_id}),"
                    f" the manifest promises {shard['documents']}"
                )
            length = np.diff(np.append(start, len(tokens)))
            where.append(np.stack((np.full_like(start, len(self.shards)), start, length)))
            self.shards.append(tokens)
            prompts.append(_read_prompts(folder.path, shard, length))
        table = np.concatenate(where, axis=1) if where else np.zeros((3, 0), np.int64)
        self.shard: np.ndarray = table[0]
        self.start: np.ndarray = table[1]
        self.length: np.ndarray = table[2]
        self.prompt: np.ndarray = np.concatenate(prompts)
        self.n_tokens = int(self.length.sum())
        # Folders made before there were sources do not name any.
        named = entry.get("sources", [{"name": "text", "documents": len(self)}])
        self.sources = {source["name"]: int(source["documents"]) for source in named}
        if sum(self.sources.values()) != len(self):
            raise FormatError(
                f"{self.name}: its sources have {sum(self.sources.values())} documents,"
                f" its shards {len(self)}"
            )

    def __len__(self) -> int:
        return len(self.length)

    def document(self, i: int, first: int = 0, last: int | None = None) -> np.ndarray:
        """Tokens ``first`` to ``last`` of document ``i``: int64."""
        last = int(self.length[i]) if last is None else last
        begin = int(self.start[i])
        tokens: np.ndarray = self.shards[self.shard[i]][begin + first : begin + last]
        return np.array(tokens, np.int64)

    def targets(self, i: int, first: int, last: int) -> np.ndarray:
        """What is to be learned of :meth:`document`'s tokens: those of the prompt are UNSCORED."""
        tokens = self.document(i, first, last)
        tokens[: max(0, int(self.prompt[i]) - first)] = UNSCORED
        return tokens


class Texts:
    """What a folder holds out, as text: :meth:`pairs` of it, as of ``data.Documents``.

    ``size`` and ``position`` count bytes, for progress bars; they are equal in the end if the
    tokens tell all of the text, which those of some tokenizers do not.
    """

    def __init__(self, folder: TokenFolder, tokenizer: SentencePieceProcessor) -> None:
        self.split, self.tokenizer = folder.split("valid"), tokenizer
        self.size, self.position = int(folder.counts["valid"]["bytes"]), 0

    def pairs(self) -> Iterator[tuple[str, Pair]]:
        """(where, pair) of each document; of plain text the prompt is empty."""
        for i in range(len(self.split)):
            text = self.tokenizer.decode(self.split.document(i).tolist())
            self.position += len(text.encode())
            given = self.split.document(i, 0, int(self.split.prompt[i])).tolist()
            prompt = self.tokenizer.decode(given)
            pair = Pair(prompt, text.removeprefix(prompt))
            yield f"{self.split.name}: document {i + 1}", pair


def _read_prompts(folder: Path, shard: dict[str, Any], length: np.ndarray) -> np.ndarray:
    """How many tokens of each of a shard's documents are its prompt: int32."""
    if "prompts" not in shard:
        return np.zeros(len(length), np.int32)
    file = folder / shard["prompts"]["file"]
    prompts = np.fromfile(file, "<i4")
    if len(prompts) != len(length) or (prompts < 0).any() or (prompts >= length).any():
        raise FormatError(f"{file}: not the lengths of the prompts in {shard['file']}")
    return prompts


class Windows:
    """Training windows: a pure function of (seed, number of the window), so nothing to save.

    Each epoch shuffles the documents, joins them, cuts the text into windows at a phase of its
    own, and shuffles the windows. Window n is number ``n mod windows_per_epoch`` of epoch
    ``n div windows_per_epoch``. All but at most two windows' worth of an epoch's tokens are
    seen once as targets. Which documents an epoch has, and how often, is ``mixture``'s to say.

    Raises ConfigError when the text is smaller than one window, and as ``mixture`` does.
    """

    def __init__(
        self, split: Split, seq_len: int, seed: int, weights: Mapping[str, float] | None = None
    ) -> None:
        self.split, self.seq_len, self.seed = split, seq_len, seed
        self._mixture = mixture(split, weights or {}, seed)
        #: in an epoch, each as often as it is there
        self.n_documents = len(self._mixture)
        self.n_tokens = int(split.length[self._mixture].sum())
        self.windows_per_epoch = (self.n_tokens - seq_len) // seq_len
        if self.windows_per_epoch < 1:
            raise ConfigError(
                f"{split.name}: {self.n_tokens} tokens are fewer than one window needs"
                f" (seq_len {seq_len}, and up to {seq_len} more for its random phase)"
            )
        self._epoch = -1

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of windows ``first`` to ``first + count``: int64 (count, seq_len)."""
        windows = np.stack([self._window(n) for n in range(first, first + count)])
        return windows[:, :-1], windows[:, 1:]

    def _window(self, n: int) -> np.ndarray:
        epoch, index = divmod(n, self.windows_per_epoch)
        if epoch != self._epoch:
            self._shuffle(epoch)
        at = self._phase + int(self._windows[index]) * self.seq_len
        end = at + self.seq_len + 1
        pieces = []
        i = int(np.searchsorted(self._begin, at, side="right")) - 1
        while at < end:
            begin, document = int(self._begin[i]), int(self._documents[i])
            stop = min(end, begin + int(self.split.length[document]))
            pieces.append(self.split.document(document, at - begin, stop - begin))
            at, i = stop, i + 1
        return np.concatenate(pieces)

    def _shuffle(self, epoch: int) -> None:
        random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        self._documents = self._mixture[random.permutation(self.n_documents)]
        lengths = self.split.length[self._documents]
        self._begin = np.cumsum(lengths) - lengths
        self._phase = int(random.integers(self.seq_len))
        self._windows = random.permutation(self.windows_per_epoch)
        self._epoch = epoch


def mixture(split: Split, weights: Mapping[str, float], seed: int) -> np.ndarray:
    """The documents of an epoch: int64 (n,), a number as often as its source's weight says.

    Under a weight of k + f, f below 1, every document of a source is there k times, and once more
    as many of them as come nearest to f times the source's tokens; which, ``seed`` decides, the
    same for all epochs. Sources that ``weights`` does not name have weight 1.

    Raises ConfigError for a weight of a source that the split does not have, and for one that its
    documents are too few for: what comes out is a quarter of it off, or more.
    """
    for name in weights:
        if name not in split.sources:
            raise ConfigError(
                f"weights.{name}: {split.name}, has no source {name!r},"
                f" only {', '.join(split.sources)}"
            )
    times, end = [], 0
    for number, (name, n_documents) in enumerate(split.sources.items()):
        length, end = split.length[end : end + n_documents], end + n_documents
        whole, rest = divmod(weights.get(name, 1.0), 1.0)
        random = np.random.Generator(np.random.PCG64([seed, number, 1]))
        order = random.permutation(n_documents)
        reached = np.append(0, np.cumsum(length[order]))
        n_chosen = int(np.argmin(abs(reached - rest * reached[-1])))
        chosen, seen = order[:n_chosen], whole + reached[n_chosen] / max(1, reached[-1])
        if n_documents and abs(seen - whole - rest) > 0.25 * (whole + rest):
            raise ConfigError(
                f"weights.{name} is {whole + rest:g}: {split.name}, can come no nearer to that than"
                f" {seen:.2g} times {name}, whose documents are too few ({n_documents}); cut them"
                " (`tinyllama data check --max-bytes`)"
            )
        times.append(np.full(n_documents, int(whole)))
        times[-1][chosen] += 1
    return np.repeat(np.arange(len(split)), np.concatenate([*times, np.zeros(0, np.int64)]))
