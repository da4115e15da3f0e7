# SPDX-License-Identifier: LGPL-2.1-or-later
"""PRESERVE_FD by a process that may die of it (decision 8).

A preserve fills the file's holes and moves its pages out of CMA. When memory does not suffice the kernel kills whoever
asked, so khod never asks itself: a helper (`khod.kernel.preserve_helper`) gets session and file over a socket, and its
SIGKILL is our OutOfMemory. Helpers are kept for the next call; as many run as there are calls at the same time.
"""

from __future__ import annotations

import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

from khod.errors import MachineError, OutOfMemory

HELPER = Path(__file__).with_name("preserve_helper.py")


class _Helper:
    """One running helper, and our end of its socket."""

    def __init__(self) -> None:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(HELPER)],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env={"LANG": "C.UTF-8"},
                start_new_session=True,  # a terminal's Ctrl-C is for khod, not for a preserve under way
            )

    def call(self, session: int, fd: int, token: int) -> int | None:
        """The errno of one preserve; None when the helper is gone. Raises OSError (EBADF) for a closed descriptor."""
        try:
            socket.send_fds(self.channel, [struct.pack("=Q", token)], [session, fd])
            answer = self.channel.recv(4)
        except (BrokenPipeError, ConnectionResetError):
            return None
        return int.from_bytes(answer, sys.byteorder, signed=True) if answer else None

    def end(self) -> int:
        """Close the socket, which ends it if it still lives; its exit status, negative for a signal."""
        self.channel.close()
        return self.process.wait()


class Preserver:
    """A pool of helpers; safe to call from several threads."""

    def __init__(self) -> None:
        self._idle: list[_Helper] = []
        self._lock = threading.Lock()

    def preserve(self, session: int, fd: int, token: int) -> int:
        """PRESERVE_FD; returns the kernel's errno, 0 when it is done.

        Raises OutOfMemory when the kernel killed the helper, MachineError when it ended for any other reason, OSError
        (EBADF) when one of the descriptors is closed.
        """
        helper = self._take()
        keep = False
        try:
            status = helper.call(session, fd, token)
            keep = status is not None
        finally:
            ended = self._put(helper) if keep else helper.end()
        if status is not None:
            return status
        if ended == -signal.SIGKILL:
            raise OutOfMemory("the kernel killed the helper that asked it to preserve a file")
        raise MachineError(f"the helper that preserves files ended with status {ended}")

    def close(self) -> None:
        """End the idle helpers."""
        with self._lock:
            idle, self._idle = self._idle, []
        for helper in idle:
            helper.end()

    def _take(self) -> _Helper:
        while True:
            with self._lock:
                helper = self._idle.pop() if self._idle else None
            if helper is None:
                return _Helper()
            # One that was killed while idle (they are the OOM killer's first choice) has done nothing: take another.
            if helper.process.poll() is None:
                return helper
            helper.end()

    def _put(self, helper: _Helper) -> int:
        with self._lock:
            self._idle.append(helper)
        return 0
