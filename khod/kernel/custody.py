# SPDX-License-Identifier: LGPL-2.1-or-later
"""The port `Custody`, by a custodian (khod.custodian) over its socket.

A connection lives for one call. When the process that answers is killed in the middle of one, its twin serves the same socket,
and the call is made again. Every one may be: a custodian that was asked the same thing twice, by one who does not know whether
the first was done, has done it once. Keeping the same open file under the same name again has no effect; what is retrieved is
remembered; what is to be let go of is gone. (It takes that one name is not kept by one thread while another drops it.)
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import struct
import sys
import threading
from array import array
from collections.abc import Sequence

from khod import custodian
from khod.core.refusals import refusal, session_name
from khod.custodian import protocol
from khod.custodian.luo import DEVICE
from khod.errors import CustodianGone, CustodyFull, InvalidRequest, KhodError, MachineError, Refused

logger = logging.getLogger(__name__)

PROGRAM = os.path.join(os.path.dirname(str(custodian.__file__)), "__main__.py")  # noqa: PTH118, PTH120
PATIENCE = 300
"""Seconds for one answer. Retrieving takes the kernel some 30 s for each terabyte."""
ATTEMPTS = 5
"""Each is the death of a process that no OOM killer chooses."""
CONNECTIONS = 16
"""Calls at a time; the custodian takes twice as many connections."""
_STATUSES = {protocol.INVALID: InvalidRequest, protocol.FULL: CustodyFull, protocol.REFUSED: Refused, protocol.HOLDING: Refused}
_GONE = {errno.ENOENT, errno.ECONNREFUSED}
_BROKEN = {errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN}


class KernelCustody:
    """The port `Custody` of the running kernel, and the calls that `KernelLiveUpdate` has made by the custodian.

    With `start`, a custodian is started when the first call finds none: on a host without systemd. It is then a session of its
    own, but in khod's control group, which only a service manager could change. One that was there and is gone is not
    started anew: it would answer that nothing is kept.
    """

    def __init__(
        self, path: str = protocol.SOCKET, *, start: bool = False, device: str = DEVICE, patience: float = PATIENCE
    ) -> None:
        self._path, self._device, self._patience = path, device, patience
        self._start = start
        self._child = self._words = -1
        self._starting = threading.Lock()
        self._connections = threading.BoundedSemaphore(CONNECTIONS)

    def begin(self) -> None:
        """Have one start while khod does other things, where it would be started anyway; the first call waits for it."""
        if self._start:
            with self._starting:
                if self._words < 0:
                    try:
                        self._connect().close()
                    except CustodianGone:
                        self._spawn()

    # -- the port

    def keep(self, name: str, fd: int) -> None:
        """See the port."""
        self._call(protocol.KEEP, _bytes(name), fds=[fd])

    def kept(self) -> Sequence[str]:
        """See the port."""
        return self._names(protocol.KEPT)

    def take(self, name: str) -> int:
        """See the port."""
        return self._descriptor(protocol.TAKE, _bytes(name))

    def drop(self, names: Sequence[str]) -> None:
        """See the port."""
        for i in range(0, len(names), 500):
            part = [_bytes(name) for name in names[i : i + 500]]
            self._call(protocol.DROP, b"\0".join(name for name in part if _may_be_kept(name)))

    def sessions(self) -> Sequence[str]:
        """See the port."""
        return self._names(protocol.SESSIONS)

    def release(self, session: str) -> None:
        """See the port."""
        self._call(protocol.RELEASE, session_name(session))

    def offer(self, sessions: Sequence[int]) -> None:
        """See the port."""
        parts = [sessions[i : i + protocol.MAX_FDS] for i in range(0, len(sessions), protocol.MAX_FDS)] or [[]]
        for part in parts:
            self._call(protocol.OFFER, first=int(part is parts[-1]), fds=part)

    def withdraw(self) -> None:
        """See the port."""
        self._call(protocol.WITHDRAW)

    def room(self) -> int:
        """See the port."""
        return self._call(protocol.ROOM)[0]

    def doubt(self, size: int, files: int) -> str:
        """See the port."""
        return _text(self._call(protocol.DOUBT, first=size, second=files)[1])

    # -- for KernelLiveUpdate, and for whoever started it

    def retrieve_session(self, name: str) -> int:
        """RETRIEVE_SESSION. Raises OSError where the device could not be opened, and what the port `LiveUpdate` says."""
        try:
            return self._descriptor(protocol.RETRIEVE_SESSION, session_name(name))
        except _KernelSaid as said:
            if said.call == "open_device":
                raise
            raise refusal(said.call, said.errno or 0, f"session {name!r}")

    def retrieve_fd(self, session: int, token: int) -> int | None:
        """RETRIEVE_FD; None for a session that is not in custody. Raises what the port `LiveUpdate` says."""
        try:
            return self._descriptor(protocol.RETRIEVE_FD, first=token, fds=[session])
        except _Unheld:
            return None
        except _KernelSaid as said:
            raise refusal(said.call, said.errno or 0, f"token {token:#x} of session {session}")

    def leave(self) -> bool:
        """Have the custodian end, unless it holds anything; whether it does."""
        try:
            self._call(protocol.LEAVE)
        except Refused:
            return False
        return True

    # -- one call

    def _names(self, operation: int) -> list[str]:
        names: list[str] = []
        more = 1
        while more:
            more, page, _ = self._call(operation, names[-1].encode("utf-8", "surrogateescape") if names else b"")
            names += [_text(name) for name in page.split(b"\0") if name]
        return names

    def _descriptor(self, operation: int, text: bytes = b"", *, first: int = 0, fds: Sequence[int] = ()) -> int:
        fd = self._call(operation, text, first=first, fds=fds)[2]
        if fd < 0:
            raise MachineError("a descriptor from the custodian was lost: khod's own limit is reached", errno=errno.EMFILE)
        return fd

    def _call(
        self, operation: int, text: bytes = b"", *, first: int = 0, second: int = 0, fds: Sequence[int] = ()
    ) -> tuple[int, bytes, int]:
        """The number, the text and the descriptor (or -1) of an answer."""
        try:
            request = protocol.request(operation, text, first, second)
        except ValueError as error:
            raise InvalidRequest(str(error))
        with self._connections:
            for _ in range(ATTEMPTS):
                reply = self._exchange(request, fds)
                if reply is not None:
                    self._start = False
                    return _judged(*reply)
                logger.warning("the custodian died, or closed the connection, in the middle of a call; asking again")
        raise CustodianGone(f"the custodian at {self._path} closed the connection {ATTEMPTS} times", hint=_hint())

    def _exchange(self, request: bytes, fds: Sequence[int]) -> tuple[bytes, int] | None:
        """An answer and its descriptor; None when the connection broke."""
        with self._connected() as channel:
            try:
                socket.send_fds(channel, [request], list(fds))
                packet, fd = _receive(channel)
            except OSError as error:
                if error.errno in _BROKEN:
                    return None
                if error.errno == errno.EBADF:
                    raise refusal("duplicate", errno.EBADF, f"descriptors {list(fds)}")
                raise CustodianGone(f"the custodian at {self._path} does not answer: {error.strerror}", hint=_hint())
        return (packet, fd) if packet else None

    def _connected(self) -> socket.socket:
        if not self._start:
            return self._connect()
        with self._starting:
            if self._words < 0:
                try:
                    return self._connect()
                except CustodianGone:
                    self._spawn()
            self._await()
            return self._connect()

    def _connect(self) -> socket.socket:
        channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        # Not settimeout(): its connect() fails at once where this one waits for room in the queue.
        seconds = struct.pack("ll", int(self._patience), int(self._patience % 1 * 1_000_000))
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, seconds)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, seconds)
        try:
            channel.connect(self._path)
        except OSError as error:
            channel.close()
            nobody = "nobody answers" if error.errno in _GONE else str(error.strerror)
            raise CustodianGone(f"there is no custodian at {self._path}: {nobody}", hint=_hint())
        return channel

    def _spawn(self) -> None:
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        argv = [sys.executable, "-I", "-S", PROGRAM, "--socket", self._path, "--device", self._device, "--say-ready"]
        try:
            self._child = os.posix_spawn(
                argv[0],
                argv,
                {"LANG": "C.UTF-8"},
                file_actions=[(os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0), (os.POSIX_SPAWN_DUP2, theirs, 1)],
                setsid=True,  # a terminal's Ctrl-C is for khod
            )
        except OSError as error:
            os.close(ours)
            raise CustodianGone(f"a custodian could not be started: {error.strerror}")
        finally:
            os.close(theirs)
        self._words = ours

    def _await(self) -> None:
        """Return when there are two processes, or when the one that was started has ended."""
        pipe, self._words = self._words, -1
        with open(pipe, "rb") as words:
            if words.readline() == b"ready\n":
                logger.info("started a custodian (pid %d), in khod's own control group", self._child)
                return
        _, status = os.waitpid(self._child, 0)
        logger.warning("the custodian that was started ended with status %d", os.waitstatus_to_exitcode(status))


class _KernelSaid(OSError):
    """The kernel refused what the custodian asked of it, in `call`."""

    def __init__(self, number: int, call: str) -> None:
        super().__init__(number, os.strerror(number))
        self.call = call


class _Unheld(Exception):
    """The session is not in custody."""


def _receive(channel: socket.socket) -> tuple[bytes, int]:
    # socket.recv_fds() does not pass its flags on, and without this one a process that another thread starts inherits it.
    packet, rights, _, _ = channel.recvmsg(protocol.MAX_PACKET, socket.CMSG_LEN(4), socket.MSG_CMSG_CLOEXEC)
    received = [fd for *_, data in rights for fd in array("i", data[: len(data) // 4 * 4])]
    return packet, received[0] if received else -1


def _judged(packet: bytes, fd: int) -> tuple[int, bytes, int]:
    try:
        status, number, text = protocol.read_answer(packet)
        if status == protocol.DONE:
            found, fd = fd, -1
            return number, text, found
    except ValueError as error:
        raise CustodianGone(str(error), hint="khod and its custodian are of different versions: restart khod-custodian.service")
    finally:
        if fd >= 0:
            os.close(fd)
    words = _text(text)
    if status == protocol.UNHELD:
        raise _Unheld
    if status == protocol.SILENT:
        raise MachineError(f"the custodian's store: {words}", errno=errno.ETIMEDOUT, hint="is PID 1 alive?")
    if status > 0:
        raise _KernelSaid(status, words)
    kind: type[KhodError] = _STATUSES.get(status, InvalidRequest)
    raise kind(words)


def _hint() -> str:
    return "systemctl status khod-custodian.service; what it held is in PID 1's store, and comes back with it"


def _bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _may_be_kept(name: bytes) -> bool:
    # Of others there are none, and their bytes are not for the wire.
    return len(name) <= protocol.MAX_NAME and b"\0" not in name


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "surrogateescape")
