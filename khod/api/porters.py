# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who takes in what peers send beside their messages: a process for each user, which may wait for that user's file system for
as long as it likes (`khod.kernel.porter_helper` says why). khod itself gets descriptors of kinds that have no server.

A porter that waits is not replaced: what others of its user send stays in a queue, and those who sent it are hung up on after
the time that a message has. So no user has more than one, and after `MOST` users those who come have one together. What is in
that queue costs khod descriptors: when somebody has `BACKLOG` there, he is let in no more, and what is not let in yet is
kept from sending descriptors (`khod.api.door`).
"""

from __future__ import annotations

import array
import asyncio
import errno
import fcntl
import logging
import os
import select
import socket
import sys
import termios
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from khod.kernel import porter_helper
from khod.kernel.porter_helper import DROP, GO, KHOD_TAKES, LOST, MAX_BYTES, MAX_FDS, REPLY, REQUEST, TAKE

__all__ = ["KHOD_TAKES", "MAX_FDS", "Brought", "Porter", "Porters", "let_go"]

logger = logging.getLogger(__name__)

MOST = 64
IDLE = 10.0
"""Seconds after which one that has nothing to do is ended."""
BACKLOG = 1024
"""Requests of one user that are not done yet."""
PAUSE = 0.1
"""Seconds until one that the system had no room for is sent again."""
FAREWELL = 1.0
"""Seconds that one has to end in when khod does."""
_ROOM = REPLY.size + 4096 + MAX_BYTES
_PROGRAM = Path(porter_helper.__file__)


@dataclass(frozen=True, slots=True)
class Brought:
    """What was received."""

    data: bytes = b""
    fds: list[int] = field(default_factory=list)
    """Owned, close-on-exec, of kinds that khod can keep."""
    lost: bool = False
    """Whether there were more, and no room for them."""
    refused: str = ""
    """What is wrong with the descriptors, of which then none is here; '' for nothing."""
    failed: int = 0
    """An errno: nothing was received."""


def let_go(loop: asyncio.AbstractEventLoop, fds: list[int], then: Callable[[], None] = lambda: None) -> None:
    """Close descriptors in a thread, for the last one of a memfd frees its memory, and call `then` when it is done."""
    if not fds:
        then()
        return
    loop.run_in_executor(None, _close, fds).add_done_callback(lambda _: then())


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


class Porter:
    """One user's. `changed` is told when what it has to do has become more or less, and `ended`, when the process has ended,
    which connections it was not given any more: they are owned by who is told."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        changed: Callable[[], None],
        ended: Callable[[Porter, list[int]], None],
    ) -> None:
        self._loop, self._changed, self._ended = loop, changed, ended
        self._asked: dict[int, Callable[[Brought | None], None]] = {}
        self._open: set[int] = set()
        """Requests of which not everything is closed yet."""
        self._waiting: deque[tuple[bytes, int]] = deque()
        self._number = 0
        self._idle: asyncio.TimerHandle | None = None
        self.ending = False
        """Whether it takes nothing more: it has done all, and goes."""
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setblocking(False)
        with theirs:
            self.pid = os.posix_spawn(
                sys.executable,
                [sys.executable, "-I", "-S", str(_PROGRAM)],
                {"LANG": "C.UTF-8"},
                file_actions=[(os.POSIX_SPAWN_DUP2, theirs.fileno(), 0), (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)],
                setsid=True,  # a terminal's Ctrl-C is for khod
            )
        self._pidfd = os.pidfd_open(self.pid)
        loop.add_reader(self._channel, self._hear)
        loop.add_reader(self._pidfd, self._died)

    def take(self, connection: socket.socket, length: int, told: Callable[[Brought | None], None]) -> None:
        """Receive so many bytes from a connection, which is borrowed, and what comes beside them. `told` is called in the event
        loop, once, with None when nothing can be had; or never, while the porter waits for a peer."""
        self._ask(TAKE, os.dup(connection.fileno()), length, told)

    def drop(self, connection: int) -> None:
        """Close a connection, which is consumed, and with it what is in its queue."""
        self._ask(DROP, connection, 0, lambda _: None)
        self._waiting.append((REQUEST.pack(self._number, GO, 0), -1))
        self._send()

    @property
    def backlog(self) -> int:
        """How much is not done yet."""
        return len(self._open)

    def _ask(self, operation: int, fd: int, length: int, told: Callable[[Brought | None], None]) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        self._number = self._number % 0xFFFFFFFF + 1
        self._asked[self._number] = told
        self._open.add(self._number)
        self._changed()
        self._waiting.append((REQUEST.pack(self._number, operation, length), fd))
        self._send()

    def _send(self) -> None:
        if self._pidfd < 0:
            return
        self._loop.remove_writer(self._channel)
        while self._waiting:
            request, fd = self._waiting[0]
            try:
                socket.send_fds(self._channel, [request], [fd] if fd >= 0 else [])
            except BlockingIOError:
                self._loop.add_writer(self._channel, self._send)
                return
            except OSError as error:
                if error.errno not in (errno.EPIPE, errno.ECONNRESET):  # else it is dead, and that is told soon
                    self._loop.call_later(PAUSE, self._send)
                return
            self._waiting.popleft()
            if fd >= 0:
                os.close(fd)  # which is not the last one: that is on its way, and stays there until GO

    def _hear(self) -> None:
        try:
            packet, beside, flags, _ = self._channel.recvmsg(_ROOM, socket.CMSG_SPACE(4 * MAX_FDS), socket.MSG_CMSG_CLOEXEC)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            packet = b""
        if len(packet) < REPLY.size:
            self._loop.remove_reader(self._channel)  # it is dead, and that is told soon
            return
        fds = [
            int.from_bytes(content[place : place + 4], sys.byteorder)
            for level, kind, content in beside
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            for place in range(0, len(content) // 4 * 4, 4)
        ]
        number, failed, length = REPLY.unpack_from(packet)
        if failed == -1:
            self._open.discard(number)
            self._asked.pop(number, None)
            self._changed()
            if not self._open:
                self._idle = self._loop.call_later(IDLE, self.end)
            return
        lost = bool(length & LOST or flags & socket.MSG_CTRUNC)
        text, data = packet[REPLY.size :][: length & ~LOST], packet[REPLY.size + (length & ~LOST) :]
        self._asked.pop(number)(Brought(data, fds, lost, text.decode("utf-8", "replace"), failed))

    def end(self) -> None:
        """Have it end when it has done what it was asked. Again: no effect."""
        self.ending = True
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)

    def _died(self) -> None:
        os.waitpid(self.pid, 0)
        if not self.ending:
            logger.warning("the process that takes a user's descriptors (pid %d) was killed", self.pid)
        self.ending = True
        left = [fd for _, fd in self._waiting if fd >= 0]
        self._waiting.clear()
        self.forget()
        asked, self._asked = self._asked, {}
        self._open.clear()
        self._ended(self, left)
        self._changed()
        for told in asked.values():
            told(None)

    def forget(self) -> None:
        """Look at it no longer, whether it has ended or not. Connections that wait for it stay open."""
        if self._pidfd < 0:
            return
        if self._idle is not None:
            self._idle.cancel()
        self._loop.remove_reader(self._channel)
        self._loop.remove_writer(self._channel)
        self._loop.remove_reader(self._pidfd)
        self._channel.close()
        os.close(self._pidfd)
        self._pidfd = -1


class Porters:
    """All of them. `crowded` is told whenever it changes whether somebody has a full queue. Make it inside a running loop."""

    def __init__(self, crowded: Callable[[bool], None] = lambda _: None) -> None:
        self._loop = asyncio.get_running_loop()
        self._by_user: dict[int, Porter] = {}
        self._all: set[Porter] = set()
        self._none = asyncio.Event()
        self._none.set()
        self._crowded, self._tell_crowded = False, crowded
        self._closed = False

    def __len__(self) -> int:
        return len(self._all)

    def full(self, uid: int) -> bool:
        """Whether a user's queue is."""
        porter = self._by_user.get(self._who(uid))
        return porter is not None and porter.backlog >= BACKLOG

    def _who(self, uid: int) -> int:
        shares = uid not in self._by_user and len(self._by_user) >= MOST and uid not in (0, os.geteuid())
        return -1 if shares else uid

    def of(self, uid: int) -> Porter:
        """A user's. Raises OSError when none can be started."""
        uid = self._who(uid)
        porter = self._by_user.get(uid)
        if porter is None or porter.ending:
            porter = self._by_user[uid] = Porter(self._loop, self._changed, lambda *ended: self._ended(uid, *ended))
            self._all.add(porter)
            self._none.clear()
        return porter

    def _changed(self) -> None:
        crowded = any(porter.backlog >= BACKLOG for porter in self._all)
        if crowded != self._crowded:
            self._crowded = crowded
            self._tell_crowded(crowded)

    def _ended(self, uid: int, porter: Porter, left: list[int]) -> None:
        self._all.discard(porter)
        if self._by_user.get(uid) is porter:
            del self._by_user[uid]
        if left and not self._closed:  # who closes the last one of them here may wait
            with suppress(OSError):
                successor = self.of(uid)
                for fd in left:
                    successor.drop(fd)
        if not self._all:
            self._none.set()

    def hang_up(self, uid: int, sock: socket.socket) -> None:
        """Close a user's connection, which is consumed. What it has in its queue may be descriptors: who closes the last of
        these may wait."""
        with suppress(OSError):
            sock.shutdown(socket.SHUT_RDWR)  # from here on nothing comes in
        if _carries_descriptors(sock):
            with suppress(OSError):
                porter = self.of(uid)
                porter.drop(sock.detach())
                return
        sock.close()

    def close_listener(self, sock: socket.socket) -> None:
        """Close a listening socket, which is consumed, and with it whoever waits there."""
        waits = select.poll()
        waits.register(sock, select.POLLIN)
        if waits.poll(0):
            with suppress(OSError):
                porter = self.of(os.geteuid())
                porter.drop(sock.detach())
                return
        sock.close()

    async def aclose(self) -> None:
        """Let them end. One that waits for a peer is left behind, and ends when it has not to wait any more."""
        self._closed = True
        for porter in self._all:
            porter.end()
        with suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL):
                await self._none.wait()
        for porter in list(self._all):
            logger.warning("process %d still waits for the file system of a user, and is left behind", porter.pid)
            porter.forget()


def _carries_descriptors(sock: socket.socket) -> bool:
    """Whether there are any in what nobody has read of a socket to which nothing comes any more."""
    unread = array.array("i", [0])
    try:
        fcntl.ioctl(sock, termios.FIONREAD, unread)
        if not unread[0]:
            return False
        data, _, flags, _ = sock.recvmsg(unread[0], 0, socket.MSG_PEEK | socket.MSG_DONTWAIT)
    except OSError:
        return True
    return bool(flags & socket.MSG_CTRUNC) or len(data) < unread[0]
