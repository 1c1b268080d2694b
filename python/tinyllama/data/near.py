"""Near duplicates: documents that share most of their runs of five words."""

from __future__ import annotations

from array import array
from functools import partial
from typing import BinaryIO, NamedTuple

from ..errors import ArgumentError, MissingExtraError
from ..words import words

N_WORDS = 5
N_HASHES = 128
MOST_MISSED = 0.01
SEED = 1


def shingles(text: str) -> set[str]:
    """All runs of five words in lower case, without punctuation; a shorter text is one run."""
    spelled = words(text)
    if not spelled:
        return set()
    return {" ".join(spelled[i : i + N_WORDS]) for i in range(max(1, len(spelled) - N_WORDS + 1))}


def jaccard(a: set[str], b: set[str]) -> float:
    """What two sets share of all that is in either of them: 0 to 1."""
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)


class Likeness(NamedTuple):
    """An earlier document, and how alike the two are."""

    where: str
    jaccard: float


class NearDuplicates:
    """Finds for each text an earlier one whose shingles have a Jaccard index of ``threshold`` up.

    MinHash signatures (Broder, "On the resemblance and containment of documents", 1997) are cut
    into bands, and texts that agree in one are compared by their shingles themselves, as Lee et
    al. do for training text (arXiv 2107.06499). So what is found is alike; of pairs just at the
    threshold at most one in a hundred is missed, of closer ones fewer.

    Memory holds about 2 KB for each text; the texts go to ``file``, which is empty and may be read
    and written. Raises ArgumentError for a threshold outside of 0.5 to 1.
    """

    def __init__(self, threshold: float, file: BinaryIO) -> None:
        if not 0.5 <= threshold <= 1:
            raise ArgumentError(f"near is {threshold}, expected 0.5 up to 1")
        try:
            import rensa
        except ImportError:
            raise MissingExtraError("rensa", "data") from None
        self.threshold = threshold
        n_bands, n_rows = bands(threshold)
        self._new_sketch = partial(rensa.RMinHash, n_bands * n_rows, SEED)
        self._index = rensa.RMinHashLSH(threshold, n_bands * n_rows, n_bands)
        self._texts = file
        self._ends = array("Q", [0])

    def find(self, where: str, text: str) -> Likeness | None:
        """An earlier text that this one is a near duplicate of; without one, it is remembered."""
        runs = shingles(text)
        if not runs:
            return None
        sketch = self._new_sketch()
        sketch.update(list(runs))
        for number in sorted(set(self._index.query(sketch))):
            earlier, earlier_text = self._remembered(number)
            likeness = jaccard(runs, shingles(earlier_text))
            if likeness >= self.threshold:
                return Likeness(earlier, likeness)
        self._index.insert(len(self._ends) - 1, sketch)
        self._texts.seek(self._ends[-1])
        self._ends.append(self._ends[-1] + self._texts.write(f"{where}\n{text}".encode()))
        return None

    def _remembered(self, number: int) -> list[str]:
        start, end = self._ends[number : number + 2]
        self._texts.seek(start)
        return self._texts.read(end - start).decode().split("\n", 1)


def bands(threshold: float) -> tuple[int, int]:
    """(number of bands, rows of each): the longest bands that miss few pairs at ``threshold``.

    A pair of Jaccard index s agrees in all rows r of one of b bands with 1 - (1 - s^r)^b.
    """
    shapes = ((N_HASHES // n_rows, n_rows) for n_rows in range(N_HASHES, 0, -1))
    return next(
        (n_bands, n_rows)
        for n_bands, n_rows in shapes
        if (1 - threshold**n_rows) ** n_bands <= MOST_MISSED
    )
