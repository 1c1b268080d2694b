"""How much of a model's stories stands in the text it was trained on.

The stories are indexed and the documents pass by one at a time, so that memory depends on the
stories alone. Words are those of :func:`tinyllama.words.words`: case and punctuation count for
nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt

from ..errors import MissingExtraError
from ..words import words

SHORTEST_COPY = 4  # words


@dataclass(frozen=True)
class Overlap:
    """What one story has in common with the documents.

    ``copied``: words in the longest run that some document has too, 0 where none has 4;
    ``copied_text``: these words; ``copied_from``: the first document that has them, "" for none.
    ``rouge_2``, ``rouge_l``: the highest precision of ROUGE-2 and ROUGE-L (Lin 2004) with any
    document, 0 to 1: the share of the story's word pairs, and of its words in their order, that
    the document has; ``rouge_2_from``, ``rouge_l_from``: that document.
    """

    copied: int
    copied_text: str
    copied_from: str
    rouge_2: float
    rouge_2_from: str
    rouge_l: float
    rouge_l_from: str


def overlaps(stories: Sequence[str], documents: Iterable[tuple[str, str]]) -> list[Overlap]:
    """Each story's overlap with all ``documents`` (where, text), highest precision over documents
    as in TinyStories (Eldan and Li 2023, arXiv 2305.07759).

    Raises MissingExtraError where rapidfuzz is not installed.
    """
    try:
        from rapidfuzz.distance import LCSseq
        from rapidfuzz.process import cdist
    except ImportError:
        raise MissingExtraError("rapidfuzz", "eval") from None
    spelled = [words(story) for story in stories]
    # A word is one character, so that strings do the work of lists; "\0" is in no story.
    letter = {word: chr(i) for i, word in enumerate(dict.fromkeys(chain(*spelled)), 1)}
    texts = ["".join(letter[word] for word in story) for story in spelled]
    copies, pairs = _Copies(texts), _Pairs(texts)
    nearest_2, nearest_l = _Nearest(len(texts)), _Nearest(len(texts))
    for where, document in documents:
        text = "".join(letter.get(word, "\0") for word in words(document))
        copies.look_for(text, where)
        nearest_2.offer(pairs.shared(text), where)
        nearest_l.offer(cdist(texts, [text], scorer=LCSseq.similarity, dtype=np.int32)[:, 0], where)
    return [
        Overlap(
            copied=copies.length[i],
            copied_text=" ".join(story[copies.begin[i] : copies.begin[i] + copies.length[i]]),
            copied_from=copies.where[i],
            rouge_2=float(nearest_2.shared[i]) / max(len(story) - 1, 1),
            rouge_2_from=nearest_2.where[i],
            rouge_l=float(nearest_l.shared[i]) / max(len(story), 1),
            rouge_l_from=nearest_l.where[i],
        )
        for i, story in enumerate(spelled)
    ]


class _Copies:
    """The longest run of each text that a document has, by an index of all its runs of 4."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts
        self._places: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for i, text in enumerate(texts):
            for begin in range(len(text) - SHORTEST_COPY + 1):
                self._places[text[begin : begin + SHORTEST_COPY]].append((i, begin))
        self.length = [0] * len(texts)
        self.begin = [0] * len(texts)
        self.where = [""] * len(texts)

    def look_for(self, document: str, where: str) -> None:
        for at in range(len(document) - SHORTEST_COPY + 1):
            for i, begin in self._places.get(document[at : at + SHORTEST_COPY], ()):
                # Only what is longer than the longest so far is worth a look.
                n = max(self.length[i] + 1, SHORTEST_COPY)
                while at + n <= len(document) and self._texts[i].startswith(
                    document[at : at + n], begin
                ):
                    self.length[i], self.begin[i], self.where[i] = n, begin, where
                    n += 1


class _Pairs:
    """How often each pair of words stands in each text: (pairs, texts)."""

    def __init__(self, texts: list[str]) -> None:
        counts = [_count_pairs(text) for text in texts]
        self._row = {pair: row for row, pair in enumerate(dict.fromkeys(chain(*counts)))}
        self._counts = np.zeros((len(self._row), len(texts)), np.int32)
        for i, count in enumerate(counts):
            for pair, n in count.items():
                self._counts[self._row[pair], i] = n

    def shared(self, document: str) -> npt.NDArray[np.int32]:
        """Pairs that each text has in common with a document, each as often as both have it."""
        found = [(self._row[p], n) for p, n in _count_pairs(document).items() if p in self._row]
        rows, most = np.array(found, np.int32).reshape(-1, 2).T
        shared: npt.NDArray[np.int32] = np.minimum(self._counts[rows], most[:, None]).sum(axis=0)
        return shared


class _Nearest:
    """The highest count of each text, and the document it was found in."""

    def __init__(self, n: int) -> None:
        self.shared = np.zeros(n, np.int32)
        self.where = [""] * n

    def offer(self, shared: npt.NDArray[np.int32], where: str) -> None:
        for i in np.flatnonzero(shared > self.shared):
            self.shared[i], self.where[i] = shared[i], where


def _count_pairs(text: str) -> Counter[str]:
    return Counter(text[i : i + 2] for i in range(len(text) - 1))
