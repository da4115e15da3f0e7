# SPDX-License-Identifier: LGPL-2.1-or-later
"""A khod served on a real socket, in a thread of its own: clients in tests are blocking, as they are in life."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from khod.api.server import Server, serve
from khod.config import Limits, Rule
from tests.integration.api.fake_service import FakeFiles, FakeService

T = TypeVar("T")


class Served:
    """What a test may touch of it; `run` and `call` are for what must happen in the loop's thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: FakeFiles
        self.service: FakeService
        self.server: Server
        self.loop: asyncio.AbstractEventLoop
        self.complaints: list[dict[str, Any]] = []
        """What the event loop had to complain of: must be empty in the end."""

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(10)

    def call(self, function: Callable[[], T]) -> T:
        async def inside() -> T:
            return function()

        return self.run(inside())

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until something is so, looking whenever the loop comes round."""

        async def inside() -> None:
            async with asyncio.timeout(10):
                while not condition():  # noqa: ASYNC110 - there is no event for it: it is the peer's doing
                    await asyncio.sleep(0.001)

        self.run(inside())


@contextmanager
def served(
    path: Path, rules: Sequence[Rule] = (), limits: Limits | None = None, listener: socket.socket | None = None
) -> Iterator[Served]:
    """A fake khod at `path` for the length of the context; nothing it held may be left open."""
    here = Served(path)
    ready = threading.Event()
    stop: list[Callable[[], None]] = []

    async def main() -> None:
        end = asyncio.Event()
        here.loop = asyncio.get_running_loop()
        here.loop.set_exception_handler(lambda _, context: here.complaints.append(context))
        stop.append(lambda: _set(here.loop, end))
        here.files = FakeFiles()
        here.service = FakeService(here.files)
        async with serve(here.service, here.files, path, listener, rules=rules, limits=limits) as here.server:
            ready.set()
            await end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert ready.wait(10)
    try:
        yield here
    finally:
        stop[0]()
        thread.join(10)
    assert not here.complaints, here.complaints
    for real in here.files.table.values():
        os.close(real)


def _set(loop: asyncio.AbstractEventLoop, event: asyncio.Event) -> None:
    loop.call_soon_threadsafe(event.set)
