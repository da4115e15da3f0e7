# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a claim answers, and the states that a workload writes before a jump and finds after it.

A state on the wire is a memfd: u64 length, little-endian, then the bytes. khod makes it as large as was declared; nothing
can make it larger while it is preserved.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from khod.errors import FormatError, InvalidRequest

_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class Cold:
    """Nothing of that name came through a jump: start from disk, and register."""

    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    """It exists and must not be started, from disk neither: a second life would ruin what the first one wrote."""

    reason: str
    process: int = 0
    """Which has it already; 0 for none that is known."""


@dataclass(slots=True)
class Claimed:
    """It came through. Owns its descriptors, close-on-exec, until they are taken; a context manager closes the others."""

    name: str
    states: Mapping[str, bytes]
    """What the workload wrote when it stood still, by the state's name."""
    _fds: dict[str, int] = field(default_factory=dict)

    @property
    def fds(self) -> Mapping[str, int]:
        """Those that were not taken yet, by name; borrowed."""
        return dict(self._fds)

    def take(self, name: str) -> int:
        """The descriptor of that name; from here on the caller's to close. Raises InvalidRequest when it is not here."""
        try:
            return self._fds.pop(name)
        except KeyError:
            known = ", ".join(self._fds) or "none is left"
            raise InvalidRequest(f"{self.name} has no descriptor {name!r} to be taken", hint=f"there is {known}")

    def close(self) -> None:
        """Close what was not taken. Again: no effect."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class StateWriter:
    """One state of an instance that is asked to stand still. Its descriptor is the participant's."""

    def __init__(self, name: str, fd: int) -> None:
        self.name, self._fd = name, fd
        self.room = os.fstat(fd).st_size - _LENGTH.size
        """The most bytes that fit."""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Store `data`, replacing what was there. Raises InvalidRequest when it does not fit."""
        view = memoryview(data).cast("B")
        if len(view) > self.room:
            raise InvalidRequest(
                f"state {self.name!r} has {len(view)} bytes and room for {self.room}", hint="register it with a larger bound"
            )
        _write(self._fd, _LENGTH.size, view)
        _write(self._fd, 0, memoryview(_LENGTH.pack(len(view))))


def read_state(name: str, fd: int) -> bytes:
    """What was written to a state's descriptor, which is borrowed. Raises FormatError for what cannot be one."""
    room = os.fstat(fd).st_size - _LENGTH.size
    (length,) = _LENGTH.unpack(_read(fd, 0, _LENGTH.size).ljust(_LENGTH.size, b"\0"))
    if length > room:
        raise FormatError(f"state {name!r}: length {length} in a file with room for {max(room, 0)} bytes")
    return _read(fd, _LENGTH.size, length)


def _write(fd: int, offset: int, view: memoryview) -> None:
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def _read(fd: int, offset: int, length: int) -> bytes:
    """Up to `length` bytes at `offset`; shorter only at the end of the file."""
    parts = []
    while length and (part := os.pread(fd, length, offset)):  # one call gives 2 GiB at most
        parts.append(part)
        offset, length = offset + len(part), length - len(part)
    return b"".join(parts)
