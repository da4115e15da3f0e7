# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal's bytes: the port `Store`, one file that is only ever appended to.

A direct jump writes nothing back, so whatever must be known to the next kernel is on the disk when a call returns: the
bytes, the size and the directory entry.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from khod.errors import MachineError

_HINTS = {
    errno.ENOSPC: "free space on that disk: without its journal khod starts no update",
    errno.EDQUOT: "raise the quota: without its journal khod starts no update",
    errno.EROFS: "remount it read-write: without its journal khod starts no update",
}


class FileStore:
    """The port `Store`: the file `name` in `directory`, which is made if need be."""

    def __init__(self, directory: Path, name: str = "journal") -> None:
        self._path = directory / name
        self._lock = threading.Lock()

    def read(self) -> bytes:
        """See the port."""
        try:
            return self._path.read_bytes()
        except FileNotFoundError:
            return b""
        except OSError as e:
            raise MachineError(f"read {self._path}", errno=e.errno)

    def append(self, data: bytes) -> None:
        """See the port."""
        with self._opened("append to", os.O_APPEND | os.O_CREAT) as fd:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]

    def cut(self, length: int) -> None:
        """See the port."""
        with self._opened("cut", os.O_CREAT) as fd:
            if length < os.fstat(fd).st_size:
                os.ftruncate(fd, length)

    @contextmanager
    def _opened(self, verb: str, flags: int) -> Iterator[int]:
        """The file to write to; on leaving, it and the directory are on the disk."""
        directory = self._path.parent
        with self._lock:
            try:
                new = not self._path.exists()
                _make(directory)
                fd = os.open(self._path, os.O_WRONLY | os.O_CLOEXEC | flags, 0o600)
                try:
                    yield fd
                    os.fsync(fd)
                finally:
                    os.close(fd)
                if new:
                    _sync_directory(directory)
            except OSError as e:
                raise MachineError(f"{verb} {self._path}", errno=e.errno, hint=_HINTS.get(e.errno or 0))


def _make(directory: Path) -> None:
    if not directory.is_dir():
        _make(directory.parent)
        directory.mkdir(mode=0o700)
        _sync_directory(directory.parent)


def _sync_directory(directory: Path) -> None:
    # Without this a file that is new may be gone after the jump, however well its own bytes were synced.
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
