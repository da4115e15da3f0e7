# SPDX-License-Identifier: LGPL-2.1-or-later
"""System calls off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


async def blocking(function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a port's call in a thread.

    A system call under way cannot be cancelled. When the caller is (an abort, a deadline), this waits for the call to end all
    the same: what it works on must not be closed, or its number taken by another file, beneath it.
    """
    return await uninterrupted(asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs)), lambda _: None)


async def opening(close: Callable[[int], Any], function: Callable[P, int], /, *args: P.args, **kwargs: P.kwargs) -> int:
    """Like `blocking`, for a call that returns an owned descriptor: it is closed if the caller was cancelled meanwhile."""
    return await uninterrupted(asyncio.ensure_future(asyncio.to_thread(function, *args, **kwargs)), close)


async def uninterrupted(
    call: asyncio.Future[T], discard: Callable[[T], Any], interrupt: Callable[[], None] = lambda: None
) -> T:
    """Wait for a call to end even when the waiting is cancelled, however often: by an abort, and then by a deadline. What it
    gives after that is handed to `discard`. `interrupt` is called when it is cancelled, to have the call end soon."""
    try:
        return await asyncio.shield(call)
    except asyncio.CancelledError:
        interrupt()
        while not call.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([call])
        if not call.cancelled() and call.exception() is None:
            discard(call.result())
        raise
