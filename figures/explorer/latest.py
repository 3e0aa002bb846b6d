"""Slow work behind quick sliders: the latest request wins, results come back on the document's own loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from bokeh.document import Document, without_document_lock

CURVES = ThreadPoolExecutor(32, "curves")
"""One thread for each session that is computing, so that a slow request holds up nobody else's."""
BACKGROUND = ThreadPoolExecutor(2, "simulation")
"""Finite-sample overlays; they may queue."""


class Latest:
    """Runs work(request) on a thread, one request at a time; of those that arrive meanwhile only the last is kept.

    show(request, result) follows under the document's lock; where `work` raised ValueError, fail(request, error) instead.
    """

    def __init__(
        self,
        document: Document,
        work: Callable[[Any], Any],
        show: Callable[[Any, Any], None],
        fail: Callable[[Any, Exception], None],
    ):
        self._document, self._work, self._show, self._fail = document, work, show, fail
        self._wanted: list[Any] = []
        self._running = False

    @property
    def busy(self) -> bool:
        """Whether a result is still to come."""
        return self._running

    def ask(self, request: Any) -> None:
        """Replace whatever is waiting."""
        self._wanted = [request]
        if not self._running:
            self._running = True
            self._document.add_next_tick_callback(self._run)

    @without_document_lock
    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._wanted:
            request = self._wanted.pop()
            follow: Callable[[], None]
            try:
                result = await loop.run_in_executor(CURVES, self._work, request)
                follow = partial(self._show, request, result)
            except Exception as error:  # whatever it is, the page says so and stays alive
                follow = partial(self._fail, request, error)
            if _open(self._document):
                self._document.add_next_tick_callback(follow)
        self._running = False


class Repeated:
    """replicate(index, parameters), `replicates` times in the background; show(parameters, samples) after each.

    `start` begins again with other parameters, `stop` drops what is running; no result of earlier ones arrives later.
    """

    def __init__(
        self,
        document: Document,
        replicate: Callable[..., dict],
        replicates: int,
        show: Callable[[Any, list[dict]], None],
        fail: Callable[[Any, Exception], None],
    ):
        self._document, self._replicate, self.replicates = document, replicate, replicates
        self._show, self._fail = show, fail
        self._generation = 0

    def stop(self) -> None:
        """Forget the experiment that is running."""
        self._generation += 1

    def start(self, parameters: dict) -> None:
        """Begin a new one."""
        self.stop()
        self._document.add_next_tick_callback(without_document_lock(partial(self._run, self._generation, parameters)))

    async def _run(self, generation: int, parameters: dict) -> None:
        loop, samples = asyncio.get_running_loop(), []
        for index in range(self.replicates):
            if generation != self._generation or not _open(self._document):
                return
            try:
                sample = await loop.run_in_executor(BACKGROUND, partial(self._replicate, index, parameters))
            except Exception as error:
                self._deliver(generation, partial(self._fail, parameters, error))
                return
            samples.append(sample)
            self._deliver(generation, partial(self._show, parameters, list(samples)))

    def _deliver(self, generation: int, follow: Callable[[], None]) -> None:
        def current() -> None:
            if generation == self._generation:
                follow()

        if _open(self._document):
            self._document.add_next_tick_callback(current)


def _open(document: Document) -> bool:
    """Whether somebody still looks at the page."""
    return document.session_context is None or not document.session_context.destroyed
