# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors that come in with a call and go out with an answer: who owns which, at every step and on every error.

In:  the message's array owns real descriptors -> `adopt` takes them -> the machine owns them -> the service consumes them.
Out: the service gives machine descriptors -> `export` makes real ones of them and closes them -> the answer's array owns
them and closes them once they are sent, or once it is clear that they never will be.

Both work in threads: a machine's calls may block.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from typing import Protocol

from asyncvarlink import FileDescriptor

from khod.errors import InvalidRequest


class Bridge(Protocol):
    """The part of `khod.core.ports.Files` that the API needs: descriptors across, and their end."""

    def adopt(self, real: int) -> int:
        """A machine's descriptor for one of this process, which is consumed."""
        ...

    def export(self, fd: int) -> int:
        """A descriptor of this process for one of the machine, owned by the caller."""
        ...

    def close(self, fd: int) -> None:
        """Close a machine's descriptor."""
        ...


async def adopt(files: Bridge, received: Sequence[tuple[str, FileDescriptor]]) -> list[tuple[str, int]]:
    """Machine descriptors for those of a message, by name; the caller owns them.

    Raises InvalidRequest when the message gives one twice; on any error nothing stays open that was open here.
    """
    if len({id(descriptor) for _, descriptor in received}) != len(received):
        raise InvalidRequest("one descriptor of the message is named twice")
    reals = [(name, _taken(descriptor)) for name, descriptor in received]
    return await asyncio.to_thread(_move, reals, files.adopt, os.close, files.close)


async def export(files: Bridge, given: Sequence[int]) -> list[FileDescriptor]:
    """Descriptors that can be sent, for machine descriptors, which are consumed."""

    def one(fd: int) -> int:
        try:
            return files.export(fd)
        finally:
            files.close(fd)

    pairs = await asyncio.to_thread(_move, [("", fd) for fd in given], one, files.close, os.close)
    return [FileDescriptor(real, should_close=True) for _, real in pairs]


def _taken(descriptor: FileDescriptor) -> int:
    real = descriptor.take()
    assert isinstance(real, int)
    return real


def _move(
    here: Sequence[tuple[str, int]],
    cross: Callable[[int], int],
    close_here: Callable[[int], None],
    close_there: Callable[[int], None],
) -> list[tuple[str, int]]:
    """Every descriptor across, or none left on either side. `cross` consumes what it is given, even when it fails."""
    there: list[tuple[str, int]] = []
    rest = list(here)
    try:
        while rest:
            name, fd = rest.pop(0)
            there.append((name, cross(fd)))
    except BaseException:
        for _, fd in rest:
            close_here(fd)
        for _, fd in there:
            close_there(fd)
        raise
    return there
