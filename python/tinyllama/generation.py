"""Continuing texts: many at once, one token each per pass through the model."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from . import _core
from .errors import ArgumentError
from .sampling import SamplingParams

if TYPE_CHECKING:
    from .grammar import Matcher

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
class Choice:
    """One of several ways for a text to go on.

    ``logprob``: the natural logarithm of the probability of its tokens under the model itself, one
    after the other. ``probability``: its share among the choices, which sum to 1; one that begins
    another has that other's share too.
    """

    text: str
    tokens: tuple[int, ...]
    logprob: float
    probability: float


@dataclass(frozen=True)
class Completion:
    """One finished continuation.

    ``tokens``: what was generated, without the end token; where a stop string cut the text, its
    tokens are still here. ``logprobs``: one TokenLogprob per token, or None when not asked for.
    ``finish_reason``: "stop" (the model ended the text, or a stop string was met) or "length"
    (max_new_tokens, or the context is full). ``seed``: alone, gives this very text again.
    ``choices``: where those were given, each with its probability; None where they were not, or do
    not fit into the context.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: str
    usage: Usage
    seed: int
    choices: tuple[Choice, ...] | None = None


OnDone: TypeAlias = "Callable[[int, int, Completion], object]"


def request_arguments(
    model: _core.Model,
    session: _core.Session,
    prompt: list[int],
    options: SamplingParams,
    decoder: _core.StreamDecoder,
    n_top: int | None = None,
    priority: int = 0,
    deadline_ms: float | None = None,
    matcher: Matcher | None = None,
) -> tuple[Any, ...]:
    """The arguments of a _core.Request: a session that has still to read ``prompt``. ``matcher``:
    for a form of text that needs one."""
    return (
        session,
        prompt,
        decoder,
        options.for_core(model.tokenizer.vocab_size),
        options.max_new_tokens,
        options.min_new_tokens,
        end_tokens(model.tokenizer),
        [stop.encode("utf-8", "surrogatepass") for stop in options.stop_strings()],
        options.on_overflow,
        options.n_keep,
        n_top,
        priority,
        deadline_ms,
        *options.form(),
        matcher and matcher.copy(),
    )


def score_choices(
    model: _core.Model, session: _core.Session, choices: Sequence[str]
) -> tuple[Choice, ...]:
    """How likely each of ``choices`` is to come next, found in one batch; the session stays."""
    beginning = at_start(model.tokenizer, session.tokens)
    ways = [model.spell(choice, beginning) for choice in choices]
    for choice, way in zip(choices, ways, strict=True):
        if not way:
            raise ArgumentError(f"the vocabulary has no tokens for the choice {choice!r}")
    scores = _core.score_ways(session, ways)
    most = max(scores)
    total = sum(math.exp(score - most) for score in scores)
    return tuple(
        Choice(choice, tuple(way), score, math.exp(score - most) / total)
        for choice, way, score in zip(choices, ways, scores, strict=True)
    )


def end_tokens(tokenizer: _core.Tokenizer) -> list[int]:
    """The tokens by which a model ends a text: another's beginning as well."""
    return sorted({tokenizer.eos_id, tokenizer.bos_id} - {-1})


def stream_pieces(scheduler: _core.Scheduler, request: _core.Request) -> Iterator[str]:
    """Text piece by piece of the one request submitted. Every token is in the session before its
    text is handed out, so that the session can be read, forked or fed, and left, at any moment."""
    done = False  # there may be an end, and text, before the first step
    while not done:
        for event in scheduler.step():
            request.rethrow()
            if event.text:
                yield event.text
            done = event.done


def complete_prompts(
    model: _core.Model,
    prompts: Sequence[list[int]],
    params: SamplingParams,
    n_top: int | None = None,
    on_done: OnDone | None = None,
    matcher: Matcher | None = None,
    choices: Sequence[tuple[Choice, ...] | None] = (),
) -> list[list[Completion]]:
    """Continue every prompt ``params.num_return_sequences`` times; a list of them per prompt.

    Sequence j of prompt i draws from the seed :func:`sequence_seed` (seed, i · n + j), whatever
    else runs beside it. ``on_done`` is called with (i, j, completion) as soon as a text has ended.
    ``choices`` go into the completions, those of prompt i for each of its own.
    """
    n = params.num_return_sequences
    first_seed = new_seed() if params.seed is None else params.seed
    waiting = deque((i, j) for i in range(len(prompts)) for j in range(n))
    live: dict[_core.Request, tuple[int, int]] = {}
    done: dict[tuple[int, int], Completion] = {}
    scheduler = _core.Scheduler(model)
    while waiting or live:
        for i, j in [waiting.popleft() for _ in range(min(len(waiting), MAX_LIVE - len(live)))]:
            session = _core.Session(model, sequence_seed(first_seed, i * n + j))
            beginning = matcher is None and at_start(model.tokenizer, prompts[i])
            decoder = _core.StreamDecoder(model.tokenizer, beginning)
            arguments = request_arguments(
                model, session, prompts[i], params, decoder, n_top, matcher=matcher
            )
            request = _core.Request(*arguments)
            live[request] = i, j
            scheduler.submit(request)
        for request in scheduler.run():
            request.rethrow()
            i, j = live.pop(request)
            seed = sequence_seed(first_seed, i * n + j)
            scored = choices[i] if choices else None
            done[i, j] = _completion(model, request, len(prompts[i]), n_top, seed, scored)
            if on_done is not None:
                on_done(i, j, done[i, j])
    return [[done[i, j] for j in range(n)] for i in range(len(prompts))]


def _completion(
    model: _core.Model,
    request: _core.Request,
    n_prompt: int,
    n_top: int | None,
    seed: int,
    choices: tuple[Choice, ...] | None,
) -> Completion:
    tokens = tuple(request.tokens)
    logprobs = tuple(
        TokenLogprob(token, _piece(model, token), logprob, tuple(top))
        for token, logprob, top in request.logprobs
    )
    return Completion(
        text=request.text,
        tokens=tokens,
        logprobs=None if n_top is None else logprobs,
        finish_reason=request.finish_reason or "",
        usage=Usage(n_prompt, len(tokens)),
        seed=seed,
        choices=choices,
    )


def _piece(model: _core.Model, token: int) -> str:
    return model.tokenizer.token_bytes(token).decode("utf-8", "replace")


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
