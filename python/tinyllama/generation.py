"""Continuing texts: many at once, one token each per pass through the model."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from . import _core
from .sampling import SamplingParams

# More sequences than this wait until others have ended, so that memory stays bounded. What is
# generated does not depend on it: a sequence's tokens are the same in any batch.
MAX_LIVE = 64


@dataclass(frozen=True)
class TokenLogprob:
    """One generated token: its id, its own text (a character cut in two shows as U+FFFD), the
    natural logarithm of its probability under the model itself, before temperature, penalties and
    filters, and the likeliest tokens of that step as (id, logprob), best first."""

    token: int
    piece: str
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Usage:
    """Tokens read and tokens written; an end token is not counted."""

    prompt_tokens: int
    completion_tokens: int

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Completion:
    """One finished continuation.

    ``tokens``: what was generated, without the end token; where a stop string cut the text, its
    tokens are still here. ``logprobs``: one TokenLogprob per token, or None when not asked for.
    ``finish_reason``: "stop" (the model ended the text, or a stop string was met) or "length"
    (max_new_tokens, or the context is full). ``seed``: alone, gives this very text again.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str
    usage: Usage
    seed: int


OnDone: TypeAlias = "Callable[[int, int, Completion], object]"


class StopMatcher:
    """Ends a text before the first of some strings, holding back what may become one of them."""

    def __init__(self, stops: tuple[str, ...]) -> None:
        self.found = False
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> str:
        """The part of the text so far that is certain and was not returned before."""
        text = self._held + text
        hits = [at for at in map(text.find, self._stops) if at >= 0]
        if hits:
            self.found, self._held = True, ""
            return text[: min(hits)]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        certain = len(text) - n_held
        self._held = text[certain:]
        return text[:certain]

    def flush(self) -> str:
        """What was held back for a stop string that did not come."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop`` without completing it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Continuation:
    """One text being continued, on a core session that has read the prompt.

    Drawing a token and feeding it to the session is the caller's part, so that many sessions can
    share both. ``token`` is the last one accepted, None for an end token.
    """

    def __init__(
        self,
        session: _core.Session,
        decoder: _core.StreamDecoder,
        model: _core.Model,
        params: SamplingParams,
        n_top: int | None = None,
    ) -> None:
        tokenizer = model.tokenizer
        self.session = session
        self.token: int | None = None
        self.tokens: list[int] = []
        self.finish_reason: str | None = None
        self._pieces: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self.decoder = decoder
        self._tokenizer = tokenizer
        self._stops = StopMatcher(params.stop_strings())
        self._n_top = n_top
        self._ends = {tokenizer.eos_id, tokenizer.bos_id} - {-1}
        n_prompt = session.n_tokens
        self._params = params.for_core(tokenizer.vocab_size, n_prompt)
        self._n_banned = params.min_new_tokens if self._ends else 0
        if self._n_banned:
            self._early_params = params.for_core(tokenizer.vocab_size, n_prompt, self._ends)
        self._room = model.config["max_seq_len"] - n_prompt
        if params.max_new_tokens is not None:
            self._room = min(self._room, params.max_new_tokens)
        if self._room == 0:
            self.finish_reason = "length"

    def accept(self, token: int) -> str:
        """Take the token that was drawn: the text that became certain with it, possibly none."""
        text = self._accept(token)
        self._pieces.append(text)
        return text

    def params(self) -> _core.SamplingParams:
        """By which the next token is to be drawn, with ``decoder`` as the text so far."""
        return self._early_params if len(self.tokens) < self._n_banned else self._params

    def completion(self, n_prompt: int) -> Completion:
        """What the steps made, after a prompt of ``n_prompt`` tokens."""
        return Completion(
            text="".join(self._pieces),
            tokens=tuple(self.tokens),
            logprobs=None if self._n_top is None else tuple(self._logprobs),
            finish_reason=self.finish_reason or "",
            usage=Usage(n_prompt, len(self.tokens)),
            seed=self.session.seed,
        )

    def _accept(self, token: int) -> str:
        n = len(self.tokens)
        if token in self._ends:
            self.token, self.finish_reason = None, "stop"
            text = self._stops.push(self.decoder.finish())
            return text if self._stops.found else text + self._stops.flush()
        self.token = token
        self.tokens.append(token)
        if self._n_top is not None:
            logprob = _core.logprob(self.session, token)
            piece = self._tokenizer.token_bytes(token).decode("utf-8", "replace")
            top = tuple(_core.top_logprobs(self.session, self._n_top)) if self._n_top else ()
            self._logprobs.append(TokenLogprob(token, piece, logprob, top))
        text = self._stops.push(self.decoder.push(token))
        if self._stops.found:
            self.finish_reason = "stop"
        elif n + 1 == self._room:
            # A character that the limit cuts in two is left out: half of it means nothing.
            self.finish_reason = "length"
            text += self._stops.flush()
        return text


def draw(continuations: Sequence[Continuation]) -> list[int]:
    """The next token of each, side by side."""
    return _core.sample_each(
        [c.session for c in continuations],
        [c.params() for c in continuations],
        [c.decoder for c in continuations],
    )


def stream_pieces(continuation: Continuation) -> Iterator[str]:
    """Text piece by piece. Every token is in the session before its text is handed out, so that
    the session can be read, forked or fed at any moment, and left at any moment."""
    while continuation.finish_reason is None:
        text = continuation.accept(draw([continuation])[0])
        if continuation.token is not None:
            _core.forward([continuation.session], [[continuation.token]])
        if text:
            yield text


def complete_prompts(
    model: _core.Model,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    n_top: int | None = None,
    on_done: OnDone | None = None,
) -> list[list[Completion]]:
    """Continue every prompt ``params.num_return_sequences`` times; a list of them per prompt.

    Sequence j of prompt i draws from the seed :func:`sequence_seed` (seed, i · n + j), whatever
    else runs beside it. A prompt is read once and its session forked for the others. ``on_done``
    is called with (i, j, completion) as soon as a text has ended.
    """
    first_seed = new_seed() if params.seed is None else params.seed
    n = params.num_return_sequences
    waiting = deque((i, j) for i in range(len(prompts)) for j in range(n))
    read: dict[int, _core.Session] = {}  # prompts of which sequences are still to start
    live: dict[tuple[int, int], Continuation] = {}
    done: dict[tuple[int, int], Completion] = {}
    while waiting or live:
        starting = [waiting.popleft() for _ in range(min(len(waiting), MAX_LIVE - len(live)))]
        unread = [i for i in dict.fromkeys(i for i, _ in starting) if i not in read]
        for i in unread:
            read[i] = _core.Session(model, sequence_seed(first_seed, i * n + n - 1))
        _core.forward(
            [c.session for c in live.values()] + [read[i] for i in unread],
            [[c.tokens[-1]] for c in live.values()] + [prompts[i] for i in unread],
        )
        for i, j in starting:
            # The last sequence of a prompt takes the session that read it, the others copies.
            last = j == n - 1
            session = read.pop(i) if last else read[i].fork(sequence_seed(first_seed, i * n + j))
            decoder = _core.StreamDecoder(model.tokenizer, at_start(model.tokenizer, prompts[i]))
            live[i, j] = Continuation(session, decoder, model, params, n_top)
        going = [c for c in live.values() if c.finish_reason is None]
        for continuation, token in zip(going, draw(going), strict=True):
            continuation.accept(token)
        for (i, j), continuation in list(live.items()):
            if continuation.finish_reason is not None:
                done[i, j] = continuation.completion(len(prompts[i]))
                del live[i, j]
                if on_done is not None:
                    on_done(i, j, done[i, j])
    return [[done[i, j] for j in range(n)] for i in range(len(prompts))]


def at_start(tokenizer: _core.Tokenizer, tokens: Sequence[int]) -> bool:
    """Whether these tokens show no text yet: then the next one begins it, without the space that
    the tokenizer puts before a text's first word."""
    return not tokenizer.decode(tokens, at_start=False)


def new_seed() -> int:
    """64 random bits from the operating system."""
    return int.from_bytes(os.urandom(8), "little")


def sequence_seed(seed: int, index: int) -> int:
    """The seed of one of several sequences: ``seed`` itself for the first, then the outputs of
    SplitMix64 (Steele, Lea and Flood 2014) started from it."""
    if index == 0:
        return seed
    mask = 2**64 - 1
    z = (seed + index * 0x9E3779B97F4A7C15) & mask
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
    return z ^ (z >> 31)
