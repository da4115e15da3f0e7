# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bytes and descriptors of one connection in the event loop: bounded in memory, in time, and in work at a time.

Written here, and not taken from asyncvarlink 0.3.3, because a peer must not be able to stall the loop or to fill memory. That
library's transport reads until nothing is left, keeps every answer that is not taken, receives descriptors without
close-on-exec, and forgets those of a message that takes more than one read.
"""

from __future__ import annotations

import array
import asyncio
import os
import select
import socket
from collections.abc import Callable, Sequence

MAX_FDS = 253
"""Descriptors beside one message: SCM_MAX_FD, include/net/scm.h."""
_SLICE = 1 << 16


class HangUps:
    """Tells when peers hang up, also of connections that nobody reads: a second epoll that looks for nothing else."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._epoll = select.epoll()
        self._told: dict[int, Callable[[], None]] = {}
        loop.add_reader(self._epoll.fileno(), self._look)

    def watch(self, sock: socket.socket, told: Callable[[], None]) -> None:
        """Call `told` once the peer has closed. `forget` belongs to it."""
        self._told[sock.fileno()] = told
        self._epoll.register(sock.fileno(), 0)  # EPOLLHUP and EPOLLERR come unasked

    def forget(self, sock: socket.socket) -> None:
        """Before it is closed."""
        if self._told.pop(sock.fileno(), None) is not None:
            self._epoll.unregister(sock.fileno())

    def _look(self) -> None:
        for number, _ in self._epoll.poll(0, 64):
            self._epoll.unregister(number)
            self._told.pop(number)()

    def close(self) -> None:
        """Look no longer."""
        self._loop.remove_reader(self._epoll.fileno())
        self._epoll.close()


class Stream:
    """One socket, which is owned. Messages end in a NUL; one is read at a time, after `resume`, and given to `received`
    without its NUL and with its descriptors, which are the receiver's to close. `ended` is told the reason, once: '' when the
    peer has said all (it may still listen: the receiver closes), else the stream is closed already."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        *,
        longest: int,
        slow: float,
        received: Callable[[bytes, list[int]], None],
        ended: Callable[[str], None],
    ) -> None:
        self._loop, self._sock = loop, sock
        self._longest, self._slow = longest, slow
        self._received, self._ended = received, ended
        self._part = bytearray()
        self._fds: list[int] = []
        self._reading = False
        self._sending = False
        self._deadline: asyncio.TimerHandle | None = None
        self._room: asyncio.Future[None] | None = None
        sock.setblocking(False)

    @property
    def closed(self) -> bool:
        """Whether it is."""
        return self._sock.fileno() < 0

    @property
    def torn(self) -> bool:
        """Whether an answer was begun and not ended: nothing can follow it."""
        return self._sending

    def hung_up(self) -> bool:
        """Whether the peer has closed: nobody would take an answer."""
        if self.closed:
            return True
        poll = select.poll()
        poll.register(self._sock, 0)
        return bool(poll.poll(0))

    def resume(self) -> None:
        """Read the next message."""
        if not self.closed and not self._reading:
            self._reading = True
            self._loop.add_reader(self._sock, self._readable)

    def pause(self) -> None:
        """Leave what comes in the socket."""
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._sock)

    def close(self) -> None:
        """Hang up. Nobody is told."""
        if not self.closed:
            self.pause()
            if self._room is not None:
                self._loop.remove_writer(self._sock)
                if not self._room.done():
                    self._room.set_exception(BrokenPipeError())
            self._sock.close()
        self._forget_part()

    def _forget_part(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._part.clear()
        fds, self._fds = self._fds, []
        for fd in fds:
            os.close(fd)

    def _drop(self, why: str) -> None:
        self.close()
        self._ended(why)

    def _readable(self) -> None:
        """One slice, of one message: descriptors arrive with the first byte of theirs, so that a read which stays inside one
        says whose they are."""
        try:
            peeked = self._sock.recv(_SLICE, socket.MSG_PEEK)
            if not peeked:
                self._forget_part()
                self.pause()
                self._ended("")
                return
            length = peeked.find(b"\0") + 1 or len(peeked)
            # Not socket.recv_fds: it drops the flags that it is given (CPython 3.11), and with them close-on-exec.
            data, beside, flags, _ = self._sock.recvmsg(length, socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._drop(f"reading failed: {error.strerror}")
            return
        fds = array.array("i")
        for level, kind, content in beside:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) // 4 * 4])
        if problem := self._keep(data, fds.tolist(), flags):
            self._drop(problem)
        elif data.endswith(b"\0"):
            message, taken = bytes(self._part[:-1]), self._fds
            self._fds = []
            self._forget_part()
            self.pause()
            self._received(message, taken)

    def _keep(self, data: bytes, fds: list[int], flags: int) -> str:
        """What is wrong with it, '' for nothing."""
        twice = bool(fds and self._fds)
        self._fds += fds
        self._part += data
        if flags & socket.MSG_CTRUNC:
            return "descriptors were lost: khod has too many open"
        if twice:
            return "descriptors in two parts of one message"
        if len(self._part) > self._longest:
            return f"a message of more than {self._longest} bytes"
        if self._deadline is None:
            self._deadline = self._loop.call_later(self._slow, self._drop, "a message was begun and not ended")
        return ""

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send `data`, with borrowed descriptors beside it. One at a time.

        Raises OSError (BrokenPipeError, and TimeoutError after the time that a peer has) when it was not taken whole: the
        stream is of no more use then, and closed by the receiver.
        """
        if self.closed or self._sending:
            raise BrokenPipeError
        self._sending = True
        rest, beside = memoryview(data), list(fds)
        async with asyncio.timeout(self._slow):
            while rest:
                try:
                    sent = socket.send_fds(self._sock, [rest], beside) if beside else self._sock.send(rest)
                except (BlockingIOError, InterruptedError):
                    await self._writable()
                else:
                    rest, beside = rest[sent:], []
        self._sending = False

    async def _writable(self) -> None:
        room = self._room = self._loop.create_future()
        self._loop.add_writer(self._sock, _wake, room)
        try:
            await room
        finally:
            self._room = None
            if not self.closed:
                self._loop.remove_writer(self._sock)


def _wake(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)
