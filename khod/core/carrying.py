# SPDX-License-Identifier: LGPL-2.1-or-later
"""Copies and hashes of much memory, by several threads: system calls, memmove and SHA-256 all let others run."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

from khod.core.ports import Files

logger = logging.getLogger(__name__)

PIECE = 16 << 20
"""Bytes that are hashed as one. The hash of a file is SHA-256 over the SHA-256 of its pieces, in order."""
HASH = 32
"""Bytes of it."""
_WORKERS = min(8, os.cpu_count() or 1)


class Interrupted(Exception):
    """Nobody waits for the copy any more."""


class Crew:
    """Threads that work for one freeze or restore. `interrupt` ends what is under way within a piece."""

    def __init__(self) -> None:
        self._stop = threading.Event()

    def interrupt(self) -> None:
        """Stop soon: whoever works raises Interrupted."""
        self._stop.set()

    def copy(self, what: str, files: Files, source: int, target: int, size: int, page_size: int) -> int:
        """Copy all `size` bytes, in pieces of whole pages of `page_size`. Returns the nanoseconds that it took, 1 at least."""
        step = max(PIECE, page_size)
        done = _Progress(what, size)

        def one(offset: int) -> None:
            self._check()
            length = min(step, size - offset)
            files.copy(source, target, offset, length)
            done.add(length)

        with _workers() as run:
            run(one, range(0, size, step))
        return done.end()

    def digest(self, files: Files, fd: int, size: int) -> bytes:
        """The hash of a file that can be read."""

        def one(offset: int) -> bytes:
            self._check()
            return hashlib.sha256(files.read(fd, offset, min(PIECE, size - offset))).digest()

        with _workers() as run:
            return hashlib.sha256(b"".join(run(one, range(0, size, PIECE)))).digest()

    def _check(self) -> None:
        if self._stop.is_set():
            raise Interrupted


@contextmanager
def _workers() -> Iterator[Callable[[Callable[[int], Any], range], list[Any]]]:
    """A function that calls another for each number, several at once, with the results in order. What one raises ends all."""
    with ThreadPoolExecutor(_WORKERS, "khod-carry") as pool:
        try:
            yield lambda work, numbers: list(pool.map(work, numbers))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class _Progress:
    """Says in the log how far a copy is, at every quarter, and how fast it was."""

    def __init__(self, what: str, size: int) -> None:
        self._what, self._size = what, size
        self._lock = threading.Lock()
        self._done = self._quarters = 0
        self._started = time.monotonic_ns()

    def add(self, length: int) -> None:
        with self._lock:
            self._done += length
            quarters = 4 * self._done // self._size
            if quarters > self._quarters < 3 and quarters < 4:
                self._quarters = quarters
                logger.info("%s: %d %% of %d bytes", self._what, 25 * quarters, self._size)

    def end(self) -> int:
        took = max(1, time.monotonic_ns() - self._started)
        logger.info("%s: %s", self._what, figure(self._size, took))
        return took


def figure(size: int, nanoseconds: int) -> str:
    """How fast it was, for people."""
    return f"{size} bytes in {nanoseconds / 1e9:.3f} s, {size / max(1, nanoseconds) * 1e9 / (1 << 20):.0f} MiB/s"
