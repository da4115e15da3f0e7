# SPDX-License-Identifier: LGPL-2.1-or-later
"""Bytes and descriptors of one connection in the event loop: bounded in memory, in time, and in work at a time.

Written here, and not taken from asyncvarlink 0.3.3, because a peer must not be able to stall the loop or to fill memory. That
library's transport reads until nothing is left, keeps every answer that is not taken, receives descriptors without
close-on-exec, and forgets those of a message that takes more than one read. And what comes beside a message is not received
here at all, but by the user's porter (`khod.api.porters`).
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable, Sequence

from khod.api.porters import Brought, Porters, let_go

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
        """Before it is closed: the socket is not gone as long as a porter has it."""
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
    without its NUL and with its descriptors, which are the receiver's to close, or with what is wrong with these. `ended` is
    told the reason, once: '' when the peer has said all (it may still listen: the receiver closes), else the stream is closed
    already. `porters` take in what the user sends, and what he has left in the socket; `hang_ups` hear that it is closed."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        *,
        longest: int,
        slow: float,
        porters: Porters,
        uid: int,
        hang_ups: HangUps,
        received: Callable[[bytes, list[int], str], None],
        ended: Callable[[str], None],
    ) -> None:
        self._loop, self._sock = loop, sock
        self._longest, self._slow = longest, slow
        self._porters, self._uid, self._hang_ups = porters, uid, hang_ups
        self._received, self._ended = received, ended
        self._part = bytearray()
        self._fds: list[int] = []
        self._refused = ""
        self._reading = False
        self._fetching = False
        """Whether the porter reads, and nobody else may."""
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
        if not self.closed and not self._reading and not self._fetching:
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
            self._hang_ups.forget(self._sock)
            self._porters.hang_up(self._uid, self._sock)
        self._forget_part()

    def _forget_part(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        self._part.clear()
        self._refused = ""
        fds, self._fds = self._fds, []
        let_go(self._loop, fds)

    def _drop(self, why: str) -> None:
        self.close()
        self._ended(why)

    def _readable(self) -> None:
        """One slice, of one message: descriptors arrive with the first byte of theirs, so that a read which stays inside one
        says whose they are."""
        try:
            # Without room for descriptors: none are received, and the flag says whether there are any.
            peeked, _, flags, _ = self._sock.recvmsg(_SLICE, 0, socket.MSG_PEEK)
            if not peeked:
                self._forget_part()
                self.pause()
                self._ended("")
                return
            length = peeked.find(b"\0") + 1 or len(peeked)
            if flags & socket.MSG_CTRUNC:
                self._fetch(length)
                return
            data = self._sock.recv(length)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._drop(f"reading failed: {error.strerror}")
            return
        self._read(Brought(data))

    def _fetch(self, length: int) -> None:
        """Have the porter read. Raises OSError when there is none."""
        self._porters.of(self._uid).take(self._sock, length, self._fetched)
        self.pause()
        self._fetching = True
        self._begin()

    def _fetched(self, brought: Brought | None) -> None:
        self._fetching = False
        if self.closed:
            let_go(self._loop, brought.fds if brought else [])
        elif brought is None or brought.failed:
            self._drop("what came beside its message could not be taken")
        else:
            self.resume()
            self._read(brought)

    def _read(self, brought: Brought) -> None:
        if problem := self._keep(brought):
            self._drop(problem)
        elif brought.data.endswith(b"\0"):
            message, taken, refused = bytes(self._part[:-1]), self._fds, self._refused
            self._fds = []
            self._forget_part()
            self.pause()
            self._received(message, taken, refused)

    def _keep(self, brought: Brought) -> str:
        """What is wrong with it, '' for nothing."""
        twice = bool((brought.fds or brought.refused) and (self._fds or self._refused))
        self._fds += brought.fds
        self._refused = self._refused or brought.refused
        self._part += brought.data
        if brought.lost:
            return "descriptors were lost: khod has too many open"
        if twice:
            return "descriptors in two parts of one message"
        if len(self._part) > self._longest:
            return f"a message of more than {self._longest} bytes"
        self._begin()
        return ""

    def _begin(self) -> None:
        """A message has begun, and is to end in time."""
        if self._deadline is None:
            self._deadline = self._loop.call_later(self._slow, self._is_late)

    def _is_late(self) -> None:
        untaken = "what came beside a message could not be taken in time"
        self._drop(untaken if self._fetching else "a message was begun and not ended")

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
