"""A run while it runs: a line on stderr, how fast it is, and a signal that stops it."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

from .peak import flops_per_token
from .recipe import Recipe


class Progress:
    """The steps of a run as a bar of tokens, and the speed of the latest.

    ``peak`` is the measured peak of all devices together in FLOP/s. Seconds are those of the steps
    alone: validation, samples and checkpoints do not slow them.
    """

    def __init__(self, recipe: Recipe, step: int, peak: float, shown: bool) -> None:
        self.bar = tqdm(
            total=recipe.steps * recipe.tokens_per_step,
            initial=step * recipe.tokens_per_step,
            unit="tok",
            unit_scale=True,
            mininterval=0.5 if sys.stderr.isatty() else 30.0,
            disable=not shown,
        )
        self._tokens_per_step = recipe.tokens_per_step
        self._share_per_tok_per_s = flops_per_token(recipe.model, recipe.seq_len) / peak
        self._steps, self._seconds = 0, 0.0

    def add(self, seconds: float, nats: float, learning_rate: float) -> None:
        """A step has been made."""
        self._steps += 1
        self._seconds += seconds
        share = self.tok_per_s * self._share_per_tok_per_s
        self.bar.set_postfix_str(
            f"loss={nats:.3f}, lr={learning_rate:.2g}, mfu={share:.0%}", refresh=False
        )
        self.bar.update(self._tokens_per_step)

    @property
    def tok_per_s(self) -> float:
        """Since :meth:`speed` was asked last."""
        return self._steps * self._tokens_per_step / self._seconds

    def speed(self) -> dict[str, float]:
        """``tok_per_s`` and ``peak_share`` since it was asked last, as metrics keep them."""
        tok_per_s = self.tok_per_s
        self._steps, self._seconds = 0, 0.0
        share = tok_per_s * self._share_per_tok_per_s
        return {"tok_per_s": round(tok_per_s, 1), "peak_share": round(share, 4)}


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """An event that the first SIGINT or SIGTERM sets; a second one acts as it always does."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: object) -> None:
        stop.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
