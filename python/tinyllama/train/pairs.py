"""Pairs of prompt and completion as training windows in which every completion sees its prompt."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping

import numpy as np

from ..errors import ConfigError
from .batches import UNSCORED, Split, mixture


class PairWindows:
    """Training windows of pairs: a pure function of (seed, number of the window), as ``Windows``.

    A window holds whole documents, so that no completion is cut from its prompt; windows are
    filled by best-fit packing (Ding et al., arXiv 2404.10830) and padded with tokens that are no
    targets, as prompts and begin tokens are none. A document longer than a window is cut into
    pieces, each token a target once. Each epoch shuffles the windows.

    Which documents an epoch has, and how often, is ``mixture``'s to say.

    Raises ConfigError when no completion token lies in any window, and as ``mixture`` does.
    """

    def __init__(
        self, split: Split, seq_len: int, seed: int, weights: Mapping[str, float] | None = None
    ) -> None:
        self.split, self.seq_len, self.seed = split, seq_len, seed
        documents = mixture(split, weights or {}, seed)
        #: in an epoch, each as often as it is there
        self.n_documents = len(documents)
        self.n_tokens = int(split.length[documents].sum())
        self._pieces = _cut(split, documents, seq_len)
        if not len(self._pieces):
            raise ConfigError(f"{split.name}: there is no completion to learn")
        order = np.random.Generator(np.random.PCG64([seed])).permutation(len(self._pieces))
        self._pieces = self._pieces[order]
        # Only what begins with BOS is kept apart from what is before it (document_mask).
        first = self._pieces[:, 1] > 0
        self._windows = pack(self._pieces[:, 2] - self._pieces[:, 1], seq_len + 1, first)
        self.windows_per_epoch = len(self._windows)
        self._epoch = -1

    def batch(self, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and targets of windows ``first`` to ``first + count``: int64 (count, seq_len).

        Targets that are not to be learned are UNSCORED.
        """
        tokens = np.zeros((count, self.seq_len + 1), np.int64)
        targets = np.full((count, self.seq_len + 1), UNSCORED, np.int64)
        for row in range(count):
            end = 0
            for piece in self._window(first + row):
                document, begin, stop = (int(x) for x in self._pieces[piece])
                place = slice(end, end + stop - begin)
                tokens[row, place] = self.split.document(document, begin, stop)
                targets[row, place] = self.split.targets(document, begin, stop)
                targets[row, end] = UNSCORED  # BOS, or the target of the piece before
                end = place.stop
        return tokens[:, :-1], targets[:, 1:]

    def _window(self, n: int) -> list[int]:
        epoch, index = divmod(n, self.windows_per_epoch)
        if epoch != self._epoch:
            random = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            self._order = random.permutation(self.windows_per_epoch)
            self._epoch = epoch
        return self._windows[self._order[index]]


def pack(lengths: np.ndarray, room: int, first: np.ndarray) -> list[list[int]]:
    """Indices of ``lengths`` in groups whose sums are at most ``room``, by best fit, longest first.

    Each goes where it leaves the least room, or begins a group; those that ``first`` says do so.
    """
    groups: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(room + 1)]  # groups by what is left in them
    rooms: list[int] = []  # those with groups, ascending
    for i in np.lexsort((-lengths, ~first)):
        length = int(lengths[i])
        at = bisect_left(rooms, length)
        if at < len(rooms) and not first[i]:
            left = rooms[at]
            group = by_room[left].pop()
            if not by_room[left]:
                rooms.pop(at)
        else:
            left, group = room, len(groups)
            groups.append([])
        groups[group].append(int(i))
        rest = left - length
        if not by_room[rest]:
            insort(rooms, rest)
        by_room[rest].append(group)
    return groups


def _cut(split: Split, documents: np.ndarray, seq_len: int) -> np.ndarray:
    """Their pieces of at most seq_len + 1 tokens that hold targets: (document, first,
    last), int64 (n, 3). Two pieces share a token, the last of one and the first of the next."""
    pieces = [
        (i, first, min(first + seq_len + 1, int(length)))
        for i, length in zip(documents, split.length[documents], strict=True)
        for first in range(0, int(length) - 1, seq_len)
    ]
    table = np.array(pieces, np.int64).reshape(-1, 3)
    return table[table[:, 2] > split.prompt[table[:, 0]]]
