"""How well a model foretells text: nats per token, and bits per byte.

Nats per token depend on the tokenizer; bits per byte do not, so that models with different
vocabularies can be compared: total nats / ln 2 / UTF-8 bytes of the text.

Every token after the begin token is scored, given all before it. Text longer than the context is
scored in windows that overlap by half: each token once, with at least half a context before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from .. import _core
from ..errors import ArgumentError

if TYPE_CHECKING:
    from ..model import Model


@dataclass(frozen=True)
class Perplexity:
    """Mean loss over ``n_tokens`` scored tokens, and total loss in bits over the text's bytes."""

    nats_per_token: float
    bits_per_byte: float
    n_tokens: int


def of_text(model: Model, text: str) -> Perplexity:
    """Score one text, which need not be whole: its end is not scored.

    Raises ArgumentError when it is empty or no text.
    """
    nats, n_tokens = _score(model, _core.Session(model._core, 0), "", text, whole=False)
    return _perplexity(nats, n_tokens, len(text.encode()))


def of_documents(model: Model, documents: Iterable[str | tuple[str, str]]) -> Perplexity:
    """Score whole documents, each on its own; empty ones are passed over.

    A document is a text, or a pair of prompt and completion, of which only the completion counts.
    A document's end is scored as one token more: that the text stops, by the end token or by the
    begin token of the next document, their probabilities together (models trained without end
    tokens, such as llama2.c's, stop the second way).

    Raises ArgumentError when there is no text at all.
    """
    session = _core.Session(model._core, 0)
    nats, n_tokens, n_bytes = 0.0, 0, 0
    for document in documents:
        prompt, text = ("", document) if isinstance(document, str) else document
        if not text:
            continue
        document_nats, document_tokens = _score(model, session, prompt, text, whole=True)
        nats += document_nats
        n_tokens += document_tokens
        n_bytes += len(text.encode())
    return _perplexity(nats, n_tokens, n_bytes)


def _perplexity(nats: float, n_tokens: int, n_bytes: int) -> Perplexity:
    if n_tokens == 0:
        raise ArgumentError("there is no text to score")
    return Perplexity(nats / n_tokens, nats / math.log(2) / n_bytes, n_tokens)


def _score(
    model: Model, session: _core.Session, prompt: str, text: str, whole: bool
) -> tuple[float, int]:
    """(total nats, number of tokens scored) of one text, in windows; uses up ``session``."""
    tokenizer, context = model.tokenizer, model.config.max_seq_len
    first = 0  # to be foretold is the token after this one
    if prompt:  # encoded apart, as where a model continues it
        tokens = tokenizer.encode(prompt)
        first = len(tokens) - 1
        tokens += tokenizer._core.encode(text, False, False, at_start=False)
    else:
        tokens = tokenizer.encode(text)
    ends = [end for end in (tokenizer.eos_id, tokenizer.bos_id) if end is not None]
    n_targets = len(tokens) - 1 + (whole and bool(ends))
    nats, begin, scored = 0.0, 0, first
    while scored < n_targets:
        # A window reads tokens[begin:stop] and foretells the one after each of them.
        stop = min(begin + context, n_targets)
        if stop > scored:  # else all of it is prompt
            session.rewind(0)
            log_probabilities = _core.score(session, tokens[begin:stop])[1:]
            nats -= float(log_probabilities[scored - begin :].sum())
            after = [tokens[stop]] if stop < len(tokens) else ends
            nats -= _log_probability(session.logits(), after)
            scored = stop
        begin = stop - context // 2
    return nats, max(n_targets - first, 0)


def _log_probability(logits: npt.NDArray[np.float32], tokens: list[int]) -> float:
    """ln of the probability that the next token is one of ``tokens``."""
    scores = logits.astype(np.float64)
    return float(np.logaddexp.reduce(scores[tokens]) - np.logaddexp.reduce(scores))
