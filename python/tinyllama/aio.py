"""Texts for asyncio: all that are awaited at once continue together, in the background."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from .generation import MAX_LIVE
from .sampling import SamplingParams
from .scheduler import Request

if TYPE_CHECKING:
    from . import _core
    from .model import Model


class Streams:
    """The texts of a model that coroutines wait for. A thread hands out what the scheduler's own
    thread makes, and ends when there is nothing more to come."""

    def __init__(self, model: Model) -> None:
        self._scheduler = model.scheduler(MAX_LIVE, background=True)
        self._lock = threading.Lock()  # guards what follows
        self._queues: dict[
            Request, tuple[asyncio.AbstractEventLoop, asyncio.Queue[_core.Event]]
        ] = {}
        self._thread: threading.Thread | None = None

    async def stream(self, prompt: list[int], options: SamplingParams) -> AsyncIterator[str]:
        """The text after ``prompt``, piece by piece; leaving it cancels the work."""
        queue: asyncio.Queue[_core.Event] = asyncio.Queue()
        request = self._submit(prompt, options, queue)
        try:
            done = False
            while not done:
                event = await queue.get()
                if event.text:
                    yield event.text
                done = event.done
            request.rethrow()
        finally:
            request.cancel()

    def _submit(
        self, prompt: list[int], options: SamplingParams, queue: asyncio.Queue[_core.Event]
    ) -> Request:
        loop = asyncio.get_running_loop()
        with self._lock:
            request = self._scheduler.submit(prompt, params=options)
            self._queues[request] = loop, queue
            if self._thread is None:
                self._thread = threading.Thread(target=self._hand_out)
                self._thread.start()
        return request

    def _hand_out(self) -> None:
        while True:
            events = self._scheduler.step()
            with self._lock:
                for event in events:
                    loop, queue = self._queues[event.request]
                    if event.done:
                        del self._queues[event.request]
                    try:
                        if not threading.main_thread().is_alive():
                            raise RuntimeError("the interpreter ends")
                        loop.call_soon_threadsafe(queue.put_nowait, event)
                    except RuntimeError:  # the loop is closed: nobody waits any more
                        event.request.cancel()
                if not self._queues:
                    self._thread = None
                    return
