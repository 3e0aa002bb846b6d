"""Slow work behind quick sliders: the latest request wins, results come back on the document's own loop."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from bokeh.document import Document, without_document_lock

CURVES = ThreadPoolExecutor(32, "curves")
"""One thread for each session that is computing, so that a slow request holds up nobody else's."""
BACKGROUND = ThreadPoolExecutor(2, "simulation")
"""Finite-sample overlays; they may queue."""


@dataclass(eq=False)
class _Background:
    document: Document
    work: Callable[..., Any]
    show: Callable[[Any, Any], None]
    fail: Callable[[Any, Exception], None]

    @property
    def _watched(self) -> bool:
        """Whether somebody still looks at the page."""
        return self.document.session_context is None or not self.document.session_context.destroyed


@dataclass(eq=False)
class Latest(_Background):
    """Runs work(request) on a thread, one request at a time; of those that arrive meanwhile only the last is kept.

    show(request, result) follows under the document's lock; where `work` raised an error, fail(request, error) instead.
    `busy` says whether a result is still to come.
    """

    busy: bool = False
    _wanted: list[Any] = field(default_factory=list)

    def ask(self, request: Any) -> None:
        """Replace whatever is waiting."""
        self._wanted = [request]
        if not self.busy:
            self.busy = True
            self.document.add_next_tick_callback(self._run)

    @without_document_lock
    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self._wanted:
            request = self._wanted.pop()
            follow: Callable[[], None]
            try:
                result = await loop.run_in_executor(CURVES, self.work, request)
                follow = partial(self.show, request, result)
            except Exception as error:  # whatever it is, the page says so and stays alive
                follow = partial(self.fail, request, error)
            if self._watched:
                self.document.add_next_tick_callback(follow)
        self.busy = False


@dataclass(eq=False)
class Repeated(_Background):
    """work(index, parameters), `replicates` times in the background; show(parameters, samples) after each.

    `start` begins again with other parameters, `stop` drops what is running; no result of earlier ones arrives later.
    """

    replicates: int = 0
    _generation: int = 0

    def stop(self) -> None:
        """Forget the experiment that is running."""
        self._generation += 1

    def start(self, parameters: dict) -> None:
        """Begin a new one."""
        self.stop()
        self.document.add_next_tick_callback(without_document_lock(partial(self._run, self._generation, parameters)))

    async def _run(self, generation: int, parameters: dict) -> None:
        loop, samples = asyncio.get_running_loop(), []
        for index in range(self.replicates):
            if generation != self._generation or not self._watched:
                return
            try:
                samples.append(await loop.run_in_executor(BACKGROUND, self.work, index, parameters))
            except Exception as error:
                self._deliver(generation, partial(self.fail, parameters, error))
                return
            self._deliver(generation, partial(self.show, parameters, list(samples)))

    def _deliver(self, generation: int, follow: Callable[[], None]) -> None:
        def current() -> None:
            if generation == self._generation:
                follow()

        if self._watched:
            self.document.add_next_tick_callback(current)
