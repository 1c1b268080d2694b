"""Many texts continued together, a few milliseconds at a time."""

from __future__ import annotations

import math
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import _core
from .arguments import Prompt, takes_sampling
from .errors import ArgumentError
from .generation import request_arguments
from .sampling import SamplingParams, as_int
from .session import Session, refuse_options_of_models

if TYPE_CHECKING:
    from .model import Model


def check_milliseconds(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ArgumentError(f"{name} is {value!r}; it must be 0 or more")


class Request(_core.Request):
    """One text on its way. ``session`` holds its tokens, prompt and all; it can be read, forked or
    rewound at any time between steps, and goes on from there.

    ``text``: what was made so far, whole characters; ``tokens``: what was drawn so far, without an
    end token. ``finish_reason``: None while it goes on; then "stop" (the model ended the text, or a
    stop string was met), "length", "cancelled", "deadline", or "error" (see :attr:`error`).
    ``cancel()`` ends it before the next piece of work, also while its prompt is read; ``pause()``
    lets it rest from then on, until ``resume()``. Any thread may use all of it but the session,
    which is for the thread that steps, between its steps: in the background, nobody's until the
    request has ended.
    """

    session: Session
    _background: weakref.ref[_core.Background] | None = None

    def __repr__(self) -> str:
        return f"<tinyllama.Request: {len(self.tokens)} tokens, {self.finish_reason or 'live'}>"

    def save(self, cache: bool = False) -> bytes:
        """Like :meth:`Session.save`, with all that the request still has to do: the options, what
        was drawn, how long to the deadline. For :meth:`Scheduler.restore`. Raises ArgumentError for
        one that ended with an error."""
        if background := self._background and self._background():
            return background.save(self, cache)
        return super().save(cache)

    def cancel(self) -> None:
        """End it."""
        super().cancel()
        self._wake()

    def resume(self) -> None:
        """Let it go on."""
        super().resume()
        self._wake()

    def _wake(self) -> None:
        if background := self._background and self._background():
            background.wake()

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None

    @property
    def error(self) -> Exception | None:
        """What ended it with "error"."""
        try:
            self.rethrow()
        except Exception as error:
            return error
        return None


class Scheduler:
    """Continues many texts of one model together, each as if it were alone: the same tokens,
    whatever runs beside it, however time is cut. Used by one thread at a time; a second one gets
    BusyError. Made by :meth:`Model.scheduler`.

    In the background it works on a thread of its own, which sleeps while there is nothing to do;
    :meth:`step` then only delivers, and any thread may use it. It is stopped, and what has not
    ended is cancelled, by :meth:`close`, by leaving a ``with`` block, or with the last reference.
    """

    def __init__(
        self,
        model: Model,
        max_sessions: int = 64,
        reserve_tokens: int = 0,
        background: bool = False,
    ) -> None:
        self.model = model
        max_sessions = as_int("max_sessions", max_sessions, 1, 2**31 - 1)
        reserve_tokens = as_int("reserve_tokens", reserve_tokens, 0, 2**63 - 1)
        self._core: _core.Scheduler | _core.Background | None
        if background:
            self._core = _core.Background(model._core, max_sessions, reserve_tokens)
            # Before the interpreter ends, too: the thread may need it.
            self._stop = weakref.finalize(self, self._core.stop)
        else:
            self._core = _core.Scheduler(model._core, max_sessions)
            self._core.warm_up()
            self._core.reserve(reserve_tokens)
        self._live: set[Request] = set()  # what events name, whether anybody else holds it or not

    @takes_sampling
    def submit(
        self,
        prompt_or_session: Prompt | Session,
        *,
        priority: int = 0,
        deadline_ms: float | None = None,
        params: SamplingParams | None = None,
        **sampling: Any,
    ) -> Request:
        """Queue a text to be continued from the next step on.

        A prompt begins a session of its own; a session goes on as it is (add text to it with
        :meth:`Session.append`, which does not read it yet), and its own seed counts. Where not
        all fit into a step, those of higher ``priority`` come first, then those whose deadline is
        nearer. ``deadline_ms`` from now a request that has not ended does, with finish_reason
        "deadline". More than ``max_sessions`` wait for others to end.

        What begins like another request (one that goes on, or that ended and is still held by
        somebody), for 16 tokens or more, is neither read nor stored again: a persona given to
        64 characters at once is read once.

        Raises ArgumentError for a wrong option or token id, ContextFullError for a prompt longer
        than the context, BusyError for a session in use.
        """
        options = self.model._options(params, sampling)
        if deadline_ms is not None:
            check_milliseconds("deadline_ms", deadline_ms)
        session, prompt = prompt_or_session, []
        if not isinstance(session, Session):
            prompt = self.model._tokens(session, options)
            session = self.model.session(options.seed)
            options = replace(options, seed=None)
        refuse_options_of_models(options)
        matcher = self.model._matcher(*options.form())
        decoder = session._text_decoder(prompt, options, matcher)
        request = Request(
            *request_arguments(
                self.model._core,
                session._core,
                prompt,
                options,
                decoder,
                priority=as_int("priority", priority, -(2**31), 2**31 - 1),
                deadline_ms=deadline_ms,
                matcher=matcher,
            )
        )
        self._submit(request, session)
        session._decoder = None if options.form()[0] else decoder
        return request

    def _submit(self, request: Request, session: Session) -> Request:
        request.session = session
        core = self._open()
        if isinstance(core, _core.Background):
            request._background = weakref.ref(core)
        self._live.add(request)
        try:
            core.submit(request)
        except Exception:
            self._live.discard(request)
            raise
        return request

    def _open(self) -> _core.Scheduler | _core.Background:
        if self._core is None:
            raise ArgumentError("the scheduler is closed")
        return self._core

    def close(self) -> None:
        """Stop, and cancel what has not ended. Its sessions are free again."""
        for request in list(self._live):
            request.cancel()
        if isinstance(self._core, _core.Background):
            self._stop()
        elif self._core is not None:
            self.step(0)
        self._core = None
        self._live.clear()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def restore(self, blob: bytes) -> Request:
        """Queue a request that :meth:`Request.save` saved: it goes on where it was, as it would
        have. Raises what :meth:`Model.restore` does, and ArgumentError for a saved session."""
        core, _, state = self.model._restore(blob)
        if state is None:
            raise ArgumentError("a session was saved, not a request: submit(model.restore(blob))")
        request = Request(core, state, self.model._matcher(*state.form))
        decoder = None if state.form[0] else request.decoder
        return self._submit(request, Session(self.model, core, decoder))

    def step(self, budget_ms: float | None = None) -> list[_core.Event]:
        """Work for at most ``budget_ms``, and return what came of it, one event per request.

        No piece of work (half a layer for all who speak, a part of the output head, some draws) is
        begun that would, by what such pieces have cost so far, not be over in time; a pass through
        the model that does not fit goes on in the next step. 0 only ends what was cancelled or is
        too late. None: work until some request has drawn a token or ended.

        In the background: what has come since the last call, at once, perhaps several events of one
        request; with None, as soon as there is something, or nothing left that could come. There a
        request may be done before its last event was taken: go by the events.
        """
        if budget_ms is not None:
            check_milliseconds("budget_ms", budget_ms)
        events = self._open().step(budget_ms)
        for event in events:
            if event.done:
                self._live.discard(event.request)
        return events

    def stats(self) -> dict[str, Any]:
        """What is there and what was done since the beginning.

        n_live requests, and n_waiting ones (for their first token); tokens_read; tokens_shared: not
        read, as another request with the same beginning had; tokens_drawn; pieces of work and the
        milliseconds spent_ms in them; next_piece_ms: what the next piece is thought to take (a
        budget below that does nothing); kv_bytes: memory for keys and values in use, by all
        sessions of the model, a part that several share counted once."""
        return self._open().stats
