"""Model: the noun that everything starts from, over the compiled core."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from . import _core
from .arguments import (
    Prompt,
    Tokens,
    check_names,
    checked_seed,
    checked_text,
    checked_tokens,
    refuse_several,
    shaped,
    split_prompts,
    takes_sampling,
)
from .config import Config, RopeScaling
from .errors import ArgumentError, ContextFullError, TinyllamaError
from .generation import Choice, Completion, OnDone, complete_prompts, end_tokens
from .sampling import SamplingParams, as_int
from .scheduler import Scheduler
from .session import Session

if TYPE_CHECKING:
    from llguidance import LLTokenizer

    from .aio import Streams
    from .evaluate.perplexity import Perplexity
    from .grammar import Matcher

StrPath: TypeAlias = "str | os.PathLike[str]"


class Tokenizer:
    """Text to tokens and back, by the vocabulary in the model's file."""

    def __init__(self, core: _core.Tokenizer) -> None:
        self._core = core
        self.vocab_size = core.vocab_size
        self.bos_id = None if core.bos_id < 0 else core.bos_id
        self.eos_id = None if core.eos_id < 0 else core.eos_id
        self.unk_id = None if core.unk_id < 0 else core.unk_id

    def __repr__(self) -> str:
        return f"<tinyllama.Tokenizer: {self.vocab_size:,} tokens>"

    def encode(self, text: str, bos: bool = True, eos: bool = False) -> list[int]:
        """Token ids of a text. ``bos`` and ``eos`` put the marks around it that the vocabulary has.

        Raises ArgumentError for anything but a string of valid Unicode.
        """
        bos, eos = bos and self.bos_id is not None, eos and self.eos_id is not None
        return self._core.encode(checked_text(text), bos, eos)

    def decode(self, tokens: Tokens) -> str:
        """The text of some tokens. Control tokens vanish; bytes that are no UTF-8 show as U+FFFD.

        Raises ArgumentError for an id outside the vocabulary.
        """
        return self._core.decode(checked_tokens(tokens, self.vocab_size)).decode("utf-8", "replace")


class Model:
    """Weights, tokenizer and hyperparameters. It never changes, and any number of threads may use
    it at once. Made by :func:`load`."""

    def __init__(
        self, core: _core.Model, source: StrPath | bytes, config: Config | None = None
    ) -> None:
        self._core = core
        self._source = source
        self._config = config
        self._max_seq_len: int = core.config["max_seq_len"]
        self.tokenizer = Tokenizer(core.tokenizer)

    def __repr__(self) -> str:
        info = self.info()
        return (
            f"<tinyllama.Model {info['path']}: {info['parameters']:,} parameters, {info['dtype']}>"
        )

    @cached_property
    def config(self) -> Config:
        """The hyperparameters. ``max_seq_len`` is the context this model was opened with."""
        config = self._config or _config(self._core.config, self._source)
        return replace(config, max_seq_len=self._max_seq_len)

    def info(self) -> dict[str, Any]:
        """Facts about this model as it is loaded: path, dtype (of the matrices), isa (kernel set in
        use), n_threads, n_threads_alone (for a step of a single token), parameters, bytes
        (of the weights), kv_dtype, kv_bytes_per_token (memory that one token of context takes)."""
        return dict(self._core.info)

    @takes_sampling
    def generate(
        self, prompt: Any = "", *, params: SamplingParams | None = None, **sampling: Any
    ) -> Any:
        """Continue a prompt, or several at once: text as one string per prompt.

        ``prompt``: a string, token ids (taken as they are), or a list of either; text is put after
        the begin token. Returns a str for one prompt and a list for several; with
        ``num_return_sequences`` above 1, a list of str in place of each str. The text ends where
        the model ends it unless told otherwise. See :class:`SamplingParams` for the options;
        ``params`` holds a set of them, which single arguments override.

        With a ``seed``, the first sequence draws from it and the others from seeds derived from it
        and their place: the same call gives the same texts, on any number of threads.

        Raises ArgumentError for a wrong option or token id, ContextFullError for a prompt longer
        than the context.
        """
        options = self._options(params, sampling)
        prompts, many = split_prompts(prompt)
        texts = []
        for one, group in zip(prompts, self._complete(prompts, options), strict=True):
            before = self._text(one) if options.return_full_text else ""
            texts.append([before + completion.text for completion in group])
        return shaped(texts, many, options)

    @takes_sampling
    def complete(
        self,
        prompt: Any = "",
        logprobs: int | None = None,
        *,
        params: SamplingParams | None = None,
        on_done: OnDone | None = None,
        **sampling: Any,
    ) -> Any:
        """Like :meth:`generate`, but each text comes as a :class:`Completion`, which also tells its
        tokens, why it ended, and with ``logprobs=n`` every token's log-probability and the n
        likeliest alternatives (0: none). ``on_done(i, j, completion)`` is called as soon as
        sequence j of prompt i has ended, in whatever order they end."""
        options = self._options(params, sampling)
        n_top = None if logprobs is None else as_int("logprobs", logprobs)
        if n_top is not None and n_top > self.tokenizer.vocab_size:
            raise ArgumentError(
                f"logprobs is {n_top}; the model has {self.tokenizer.vocab_size} tokens"
            )
        prompts, many = split_prompts(prompt)
        scored = [self._scored(one, options) for one in prompts] if options.choices else []
        groups = self._complete(prompts, options, n_top, on_done, scored)
        if options.return_full_text:
            groups = [
                [replace(c, text=self._text(one) + c.text) for c in group]
                for one, group in zip(prompts, groups, strict=True)
            ]
        return shaped(groups, many, options)

    @takes_sampling
    def stream(
        self, prompt: Prompt = "", *, params: SamplingParams | None = None, **sampling: Any
    ) -> Iterator[str]:
        """Continue one prompt, handing out the text while it is made: whole characters, together
        exactly what :meth:`generate` returns. Closing the iterator stops the work."""
        options = self._options(params, sampling)
        refuse_several(prompt, options, "stream")
        tokens = self._tokens(prompt, options)
        before = self._text(prompt) if options.return_full_text else ""
        return self._stream(tokens, before, options, self._matcher(*options.form()))

    def _stream(
        self, tokens: list[int], before: str, options: SamplingParams, matcher: Matcher | None
    ) -> Iterator[str]:
        session = self.session(options.seed)
        if before:
            yield before
        options = replace(options, seed=None, return_full_text=False)
        yield from session._generate(options, tokens, matcher)

    @takes_sampling
    def astream(
        self, prompt: Prompt = "", *, params: SamplingParams | None = None, **sampling: Any
    ) -> AsyncIterator[str]:
        """:meth:`stream` for asyncio: ``async for piece in model.astream(...)``. All that are under
        way at once are continued together, up to 64 of them, on a thread in the background."""
        options = self._options(params, sampling)
        refuse_several(prompt, options, "astream")
        tokens = self._tokens(prompt, options)
        before = self._text(prompt) if options.return_full_text else ""
        return self._astream(tokens, before, replace(options, return_full_text=False))

    async def _astream(
        self, tokens: list[int], before: str, options: SamplingParams
    ) -> AsyncIterator[str]:
        if before:
            yield before
        async for piece in self._streams.stream(tokens, options):
            yield piece

    @cached_property
    def _streams(self) -> Streams:
        from .aio import Streams

        return Streams(self)

    def logits(self, tokens: Prompt) -> npt.NDArray[np.float32]:
        """Scores of the next token after each of ``tokens``: float32 (n_tokens, vocab_size).

        Text is encoded with the begin token. Raises ContextFullError for more tokens than the
        context holds.
        """
        ids = self._tokens(tokens)
        return _core.forward([_core.Session(self._core, 0)], [ids], all_logits=True)[0]

    def perplexity(self, text: str) -> Perplexity:
        """How well the model foretells a text: see :func:`.evaluate.perplexity.of_text`."""
        from .evaluate import perplexity

        return perplexity.of_text(self, text)

    def score_choices(self, prompt: Prompt, choices: Iterable[str]) -> tuple[Choice, ...]:
        """How likely each of several texts is to come right after ``prompt``: as
        :meth:`Session.score_choices`, and as ``choices`` in a :class:`Completion`."""
        session = self.session(0)
        session.append(self._tokens(prompt))
        return session.score_choices(choices)

    def session(self, seed: int | None = None) -> Session:
        """A new, empty timeline, which draws from ``seed``, or from fresh entropy."""
        return Session(self, _core.Session(self._core, checked_seed(seed)))

    def restore(self, blob: bytes) -> Session:
        """The session that :meth:`Session.save` or :meth:`Request.save` saved: what it makes from
        there is bit for bit what the other would have made, on the same kernel set and with the
        same kv_dtype.

        Raises FormatError with the reason for bytes that are damaged, of another version of the
        format, or saved with another model or tokenizer; ContextFullError where this model was
        opened with too short a context.
        """
        session, decoder, _ = self._restore(blob)
        return Session(self, session, decoder)

    def _restore(
        self, blob: bytes
    ) -> tuple[_core.Session, _core.StreamDecoder | None, _core.RequestState | None]:
        try:
            return _core.restore(self._core, blob)
        except TinyllamaError:
            raise
        except (TypeError, ValueError, BufferError):
            raise ArgumentError(f"blob is {type(blob).__name__}; it must be bytes") from None

    def scheduler(
        self, max_sessions: int = 64, reserve_tokens: int = 0, background: bool = False
    ) -> Scheduler:
        """A :class:`Scheduler`, which continues up to ``max_sessions`` texts together: under a time
        budget in :meth:`Scheduler.step`, or in the ``background``, on a thread of its own beside
        which no more cores work than the model was opened with (``n_threads``).

        Memory for the keys and values of ``reserve_tokens``, all texts together, is taken now, so
        that no frame has to wait for it; each takes ``info()["kv_bytes_per_token"]``, in blocks of
        32 tokens per text. What is taken beyond that is kept while the scheduler lives. Making
        one measures how long passes take, for some milliseconds. Raises MemoryError.
        """
        return Scheduler(self, max_sessions, reserve_tokens, background)

    def _options(self, params: SamplingParams | None, sampling: dict[str, Any]) -> SamplingParams:
        if params is not None and not isinstance(params, SamplingParams):
            raise ArgumentError(f"params is {params!r}; it must be SamplingParams")
        check_names(sampling)
        options = SamplingParams(**sampling) if params is None else replace(params, **sampling)
        banned = end_tokens(self._core.tokenizer) if options.min_new_tokens else []
        options.for_core(self.tokenizer.vocab_size, banned)  # complains before any work
        return options

    def _complete(
        self,
        prompts: list[Prompt],
        options: SamplingParams,
        n_top: int | None = None,
        on_done: OnDone | None = None,
        choices: Sequence[tuple[Choice, ...] | None] = (),
    ) -> list[list[Completion]]:
        tokens = [self._tokens(prompt, options) for prompt in prompts]
        matcher = self._matcher(*options.form())
        return complete_prompts(self._core, tokens, options, n_top, on_done, matcher, choices)

    def _scored(self, prompt: Prompt, options: SamplingParams) -> tuple[Choice, ...] | None:
        try:
            return self.score_choices(prompt, options.form()[1])
        except ContextFullError:
            return None

    def _matcher(self, kind: str, texts: list[str]) -> Matcher | None:
        """What keeps to a form of text that the core alone does not know."""
        if kind in ("", "choices"):
            return None
        from .grammar import Matcher

        return Matcher.of(self._guidance_tokenizer, kind, texts[0])

    @cached_property
    def _guidance_tokenizer(self) -> LLTokenizer:
        from .grammar import guidance_tokenizer

        return guidance_tokenizer(self._core)

    def _text(self, prompt: Prompt) -> str:
        return prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)

    def _tokens(self, prompt: Prompt, options: SamplingParams | None = None) -> list[int]:
        """The tokens of a prompt, checked: ids in the vocabulary, not empty, within the context
        unless ``options`` say that it is to be cut."""
        if isinstance(prompt, str):
            bos = self._core.tokenizer.add_bos or not prompt
            tokens = self.tokenizer.encode(prompt, bos=bos)
            if not tokens:
                tokens = self.tokenizer.encode("")  # a text of blanks, all stripped
        else:
            tokens = checked_tokens(prompt, self.tokenizer.vocab_size)
        if not tokens:
            raise ArgumentError("the prompt has no tokens, and there is nothing else to start from")
        if len(tokens) > self._max_seq_len and not (options and options.cuts_prompts):
            raise ContextFullError(
                f"the prompt has {len(tokens)} tokens; the context holds {self._max_seq_len}"
            )
        return tokens


def _config(values: dict[str, Any], source: StrPath | bytes) -> Config:
    """The core's hyperparameters as a Config; it knows no rotary scaling, only its factors."""
    factors = np.array(values.pop("rope_factors"))
    if (factors != factors[0]).any():
        from .formats.gguf_read import read_gguf

        return read_gguf(source).config
    for name in ("rope_theta", "norm_eps"):  # float32 in the file: 1e-5, not 9.99999974e-06
        values[name] = float(str(np.float32(values[name])))
    scaling = None if factors[0] == 1 else RopeScaling("linear", float(factors[0]))
    return Config(**values, rope_scaling=scaling)
