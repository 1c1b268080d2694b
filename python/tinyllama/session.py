"""Session: one timeline of a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from . import _core
from .arguments import Prompt, checked_seed, checked_text, takes_sampling
from .errors import ArgumentError
from .generation import Choice, at_start, request_arguments, score_choices, stream_pieces
from .sampling import SamplingParams, as_int

if TYPE_CHECKING:
    from .grammar import Matcher
    from .model import Model

# Options of Model.generate that mean nothing here, with their defaults.
_NOT_IN_SESSIONS = {"seed": None, "num_return_sequences": 1, "return_full_text": False}


def refuse_options_of_models(options: SamplingParams) -> None:
    for name, default in _NOT_IN_SESSIONS.items():
        value = getattr(options, name)
        if value != default:
            raise ArgumentError(f"{name} is {value}; a session does not take it")


class Session:
    """One timeline: the tokens so far, what the model made of them, and a random state of its own.
    Used by one thread at a time; two at once raise BusyError. Made by :meth:`Model.session`.

    ``finish_reason``: why the last :meth:`generate` ended ("stop" or "length"), None before.
    """

    def __init__(
        self, model: Model, core: _core.Session, decoder: _core.StreamDecoder | None = None
    ) -> None:
        self.model = model
        self.finish_reason: str | None = None
        self._core = core
        self._decoder = decoder  # holds bytes of a character cut in two

    def __repr__(self) -> str:
        return f"<tinyllama.Session: {self.n_tokens} tokens, room for {self.room}>"

    @property
    def n_tokens(self) -> int:
        """How many tokens the timeline has."""
        return self._core.n_tokens

    @property
    def room(self) -> int:
        """How many more fit into the context."""
        return self.model.config.max_seq_len - self.n_tokens

    @property
    def tokens(self) -> list[int]:
        """Every token of the timeline, fed and generated; an end token the model drew is not in."""
        return self._core.tokens

    @property
    def text(self) -> str:
        """The timeline as text."""
        return self.model.tokenizer.decode(self._core.tokens)

    @property
    def seed(self) -> int:
        """What its random state was started from."""
        return self._core.seed

    def feed(self, text_or_tokens: Prompt) -> None:
        """Append text or tokens, and let the model read them.

        Text that comes first is put after the begin token. Later text continues what is there, as
        if written right behind it: give the space between words yourself. Token ids are taken as
        they are. Raises ContextFullError, and changes nothing, when they do not fit.
        """
        if tokens := self._tokens(text_or_tokens):
            _core.forward([self._core], [tokens])
            self._decoder = None

    def append(self, text_or_tokens: Prompt) -> None:
        """Like :meth:`feed`, but the model reads it only when somebody asks what comes next: at
        once, or piece by piece in a :class:`Scheduler`."""
        if tokens := self._tokens(text_or_tokens):
            self._core.append(tokens)
            self._decoder = None

    def _tokens(self, text_or_tokens: Prompt) -> list[int]:
        if isinstance(text_or_tokens, str) and self._core.n_tokens:
            return self.model.tokenizer._core.encode(
                checked_text(text_or_tokens), False, False, at_start=self._at_start()
            )
        return self.model._tokens(text_or_tokens)

    @takes_sampling
    def generate(self, *, params: SamplingParams | None = None, **sampling: Any) -> Iterator[str]:
        """Continue the timeline, handing out text while it is made: whole characters.

        Everything drawn enters the timeline (a stop string's tokens too), except an end token, so
        that it can go on. An empty timeline starts from the begin token. Leaving the iterator
        leaves the timeline where it is. The seed is the session's; num_return_sequences and
        return_full_text belong to Model.generate. Raises ArgumentError for a wrong option.
        """
        options = self.model._options(params, sampling)
        refuse_options_of_models(options)
        return self._generate(options, [], self.model._matcher(*options.form()))

    def _generate(
        self, options: SamplingParams, prompt: list[int], matcher: Matcher | None
    ) -> Iterator[str]:
        """Like :meth:`generate`, after ``prompt``."""
        if not self._core.n_tokens and not prompt:
            prompt = self.model._tokens("")
        decoder = self._text_decoder(prompt, options, matcher)
        request = _core.Request(
            *request_arguments(
                self.model._core, self._core, prompt, options, decoder, matcher=matcher
            )
        )
        scheduler = _core.Scheduler(self.model._core)
        scheduler.submit(request)
        self._decoder = None if options.form()[0] else decoder
        self.finish_reason = None
        yield from stream_pieces(scheduler, request)
        self.finish_reason = request.finish_reason

    def score_choices(self, choices: Iterable[str]) -> tuple[Choice, ...]:
        """How likely each of several texts is to come next, found in one batch. The timeline stays
        as it is. Raises ArgumentError for anything but strings, ContextFullError where the longest
        has no room."""
        choices = SamplingParams(choices=choices).form()[1]
        return score_choices(self.model._core, self._core, choices)

    def rewind(self, n_tokens: int) -> None:
        """Keep the first ``n_tokens`` of the timeline. The random state goes on, so that what
        follows is told anew. Raises ArgumentError when there are fewer."""
        self._core.rewind(as_int("n_tokens", n_tokens))
        self._decoder = None

    def fork(self, seed: int | None = None) -> Session:
        """A second timeline with the same past, which draws from ``seed``, or fresh entropy."""
        core = self._core.fork(checked_seed(seed))
        return Session(self.model, core, self._decoder and self._decoder.copy())

    def save(self, cache: bool = False) -> bytes:
        """Its tokens and its random state, to be restored by :meth:`Model.restore`, in another
        process or on another machine: two bytes per token, and about sixty. With ``cache``
        also what the model's reading made of whole blocks of 32 tokens, so that only the rest is
        read again; this takes ``model.info()["kv_bytes_per_token"]`` more for each."""
        return _core.save(self._core, self._decoder, cache)

    def drop_cache(self) -> None:
        """Give back the memory that the model's reading took, but for the tokens: for a character
        that rests. All is read again when it goes on, and is as it was."""
        self._core.drop_cache()

    def _text_decoder(
        self, prompt: list[int], options: SamplingParams, matcher: Matcher | None
    ) -> _core.StreamDecoder:
        """What shows text drawn after ``prompt``. A text of a certain form is whole by itself; and
        what a matcher sees is shown byte by byte: no space is dropped where the text begins."""
        if self._decoder is not None and not prompt and not options.form()[0]:
            return self._decoder
        tokenizer = self.model.tokenizer._core
        beginning = matcher is None and self._at_start() and at_start(tokenizer, prompt)
        return _core.StreamDecoder(tokenizer, beginning)

    def _at_start(self) -> bool:
        return at_start(self.model.tokenizer._core, self._core.tokens)
