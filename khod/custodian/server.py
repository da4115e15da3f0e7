# SPDX-License-Identifier: LGPL-2.1-or-later
"""Serving, and taking over from a twin that is dead.

One request is done at a time, whole, before the next is read. Clients may wait for each other, but not for /dev/liveupdate or
for anything else that is busy: that is answered, and the client asks again.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the half that is written in C: see the package
import _socket
import os
import select
from struct import pack, unpack

from khod.custodian import protocol
from khod.custodian.keeper import Keeper, Refusal
from khod.custodian.log import ERROR, WARNING, say
from khod.custodian.store import Silent
from khod.custodian.twins import SIGKILL, clone, outlive

TYPE_CHECKING = False  # typing takes longer to import than all that is done here
if TYPE_CHECKING:
    from collections.abc import Callable

SIGHUP, SIGINT, SIGTERM = 1, 2, 15
CLIENTS = 32
"""Connections at a time, well below `keeper.SPARE`. A client has one for the length of a call."""
RETRY = 1000
"""Milliseconds until a twin that could not be made is tried again."""
_PAGE = 16 << 10
_RIGHTS = _socket.CMSG_SPACE(protocol.MAX_FDS * 4)


class Server:
    """`keeper` behind `listener`. `ours` are the program's own descriptors, which a survivor leaves open."""

    def __init__(self, keeper: Keeper, listener: _socket.socket, ours: set[int]) -> None:
        self._keeper, self._listener, self._ours = keeper, listener, ours
        self._clients: set[int] = set()
        self._twin = self._twin_pid = self._own = -1
        self._wake = (-1, -1)
        self._told = self._inherited = False

    def run(self, ready: bytes, work: Callable[[bool], object] = lambda inherited: None) -> None:
        """Serve. Whichever process this is at the time: the twin of the one that is dead comes back here, and goes on.

        `ready` is written to standard output once there are two and `work` is done, which is told whether it is done in the
        place of one that is dead.
        """
        while True:
            self._become()
            if self._make_twin():
                continue
            if self._inherited:
                self._announce(ready)
                self._keeper.recover(self._all_ours())
                work(True)
            else:
                work(False)
                self._announce(ready)
            self._serve()

    def _become(self) -> None:
        # What the dead one had in its own memory, and is here as it was when we were made, is nothing to us: numbers of
        # descriptors that are another file's by now. `recover` closes what it left open.
        self._clients, self._twin, self._told = set(), -1, False
        self._own = os.pidfd_open(os.getpid())
        self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        _signal.set_wakeup_fd(self._wake[1], warn_on_full_buffer=False)
        _signal.signal(SIGTERM, self._hear)

    def _make_twin(self) -> bool:
        """Make one; True in it, as soon as we are dead. Where it cannot be made, it is tried again while we serve."""
        try:
            pid = clone()
        except OSError as error:
            say(f"there is no twin, and the end of this process would be that of all that it holds: {error}", ERROR)
            return False
        if pid == 0:
            _signal.signal(SIGTERM, _signal.SIG_IGN)  # whoever serves decides
            _signal.set_wakeup_fd(-1)
            outlive(self._own)
            self._inherited = True
            return True
        self._twin_pid, self._twin = pid, os.pidfd_open(pid)  # a child that is not waited for keeps its number
        return False

    def _announce(self, ready: bytes) -> None:
        state = f"MAINPID={os.getpid()}\nSTATUS=Holding, with a twin (pid {self._twin_pid})"
        self._keeper.store.tell(state if self._inherited else f"READY=1\n{state}")
        if self._inherited:
            say(f"the process that served is dead; this one serves on, and {self._twin_pid} is its twin", WARNING)
        elif ready:
            os.write(1, ready)
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.close(null)

    def _all_ours(self) -> set[int]:
        return self._ours | {self._own, self._twin, *self._wake}

    def _hear(self, _number: int, _frame: object) -> None:
        self._told = True

    def _serve(self) -> None:
        """Until this process is the twin of what it was, and that is dead."""
        while True:
            poll = select.poll()
            for fd in (self._listener.fileno(), self._wake[0], *self._clients, *([self._twin] if self._twin >= 0 else [])):
                poll.register(fd, select.POLLIN)
            ready = [fd for fd, _ in poll.poll(RETRY if self._twin < 0 else None)]
            if self._twin in ready:
                self._bury()
            if self._twin < 0 and self._make_twin():
                return
            if self._wake[0] in ready:
                os.read(self._wake[0], 512)
            if self._told:
                self._told = False
                self._asked_to_end()
            for fd in ready:
                if fd in self._clients:
                    self._answer(fd)
            if self._listener.fileno() in ready:
                self._accept()

    def _bury(self) -> None:
        os.waitpid(self._twin_pid, 0)
        os.close(self._twin)
        self._twin = -1
        say(f"the twin (pid {self._twin_pid}) is dead; there will be another", WARNING)

    def _asked_to_end(self) -> None:
        held = self._keeper.holds()
        if held and not self._keeper.store.room:
            # Nothing else has these descriptors: our end would be that of the memory behind them (decision 25).
            say(f"not ending: {held} descriptors are held here and nowhere else; `khoctl status` says whose", ERROR)
            self._keeper.store.tell(f"STATUS=Not ending: {held} descriptors are held here and nowhere else")
            return
        self.end()

    def end(self) -> None:
        """End both, whatever is held."""
        self._keeper.store.tell("STOPPING=1")
        if isinstance(path := self._listener.getsockname(), str):  # bytes are no file's
            os.unlink(path)  # pathlib takes as long to import as all else
        if self._twin >= 0:
            _signal.pidfd_send_signal(self._twin, SIGKILL)
            os.waitpid(self._twin_pid, 0)
        os._exit(0)

    # -- clients

    def _accept(self) -> None:
        try:
            fd, _ = self._listener._accept()  # type: ignore[attr-defined]
        except OSError:
            return  # who wanted to connect is gone
        client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
        try:
            uid = unpack("3i", client.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))[1]
        finally:
            client.detach()
        if uid in (0, os.geteuid()) and len(self._clients) < CLIENTS:
            self._clients.add(fd)
        else:
            os.close(fd)

    def _answer(self, fd: int) -> None:
        # The object lives for this one exchange and owns nothing: see `twins`.
        client = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET, 0, fd)
        try:
            good = self._exchange(client)
        except OSError:
            good = False  # gone, or does not read its answers
        finally:
            client.detach()
        if not good:
            self._clients.discard(fd)
            os.close(fd)

    def _exchange(self, client: _socket.socket) -> bool:
        flags = _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
        packet, rights, got, _ = client.recvmsg(protocol.MAX_PACKET + 1, _RIGHTS, flags)
        fds: list[int] = []
        for level, kind, data in rights:
            if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                fds += unpack(f"{len(data) // 4}i", data[: len(data) // 4 * 4])
        leave = good = False
        result = -1
        try:
            if not packet and not fds:
                return False
            _whole(packet, got)
            operation, first, second, text = protocol.read_request(packet)
            number, answer, result = self._do(operation, first, second, text, fds)
            reply, good = protocol.answer(protocol.DONE, number, answer), True
            leave = operation in (protocol.LEAVE, protocol.YIELD)
        except ValueError as error:  # no packet of ours: whoever sends such a thing is not spoken to any longer
            reply = protocol.answer(protocol.INVALID, 0, str(error).encode())
        except Refusal as refusal:
            reply, good = protocol.answer(refusal.status, 0, refusal.text.encode()), True
        except Silent as error:
            reply, good = protocol.answer(protocol.SILENT, 0, str(error).encode()), True
        except OSError as error:
            say(f"a request failed: {error}", ERROR)
            reply, good = protocol.answer(error.errno or protocol.INVALID, 0, b"custodian"), True
        finally:
            for fd in fds:
                self._close_unless_kept(fd)
        sent = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, pack("i", result))] if result >= 0 else []
        client.sendmsg([reply], sent, _socket.MSG_DONTWAIT | _socket.MSG_NOSIGNAL)
        if leave:
            self.end()
        return good

    def _close_unless_kept(self, fd: int) -> None:
        if fd >= self._keeper.table.numbers or not self._keeper.table.kind(fd):
            os.close(fd)

    def _do(self, operation: int, first: int, second: int, text: bytes, fds: list[int]) -> tuple[int, bytes, int]:
        """One request: the answer's number, text and descriptor. Raises Refusal, Silent, ValueError, OSError."""
        keeper, nothing = self._keeper, (0, b"", -1)
        wanted = {protocol.KEEP: 1, protocol.RETRIEVE_FD: 1, protocol.OFFER: len(fds)}.get(operation, 0)
        if len(fds) != wanted:
            raise ValueError(f"request {operation} has {len(fds)} descriptors and must have {wanted}")
        if operation == protocol.KEEP:
            keeper.keep(text, fds[0])
        elif operation == protocol.TAKE:
            return 0, b"", keeper.take(text)
        elif operation == protocol.DROP:
            keeper.drop(text.split(b"\0"))
        elif operation == protocol.KEPT:
            return (*_page(keeper.deposits, text), -1)
        elif operation == protocol.SESSIONS:
            return (*_page(keeper.sessions, text), -1)
        elif operation == protocol.RETRIEVE_SESSION:
            return 0, b"", keeper.retrieve_session(text)
        elif operation == protocol.RETRIEVE_FD:
            return 0, b"", keeper.retrieve_fd(fds[0], first)
        elif operation == protocol.RELEASE:
            keeper.release(text)
        elif operation == protocol.OFFER:
            keeper.offer(fds, bool(first))
        elif operation == protocol.WITHDRAW:
            keeper.withdraw()
        elif operation == protocol.ROOM:
            return keeper.room(), b"", -1
        elif operation == protocol.DOUBT:
            from khod.custodian.doubt import doubt

            return 0, doubt(first, second, keeper.table_room()).encode(), -1
        elif operation == protocol.LEAVE:
            if held := keeper.holds():
                raise Refusal(protocol.HOLDING, f"{held} descriptors are held")
        elif operation == protocol.NEXT:
            return self._next(first)
        elif operation == protocol.YIELD:
            if isinstance(self._listener.getsockname(), str):
                raise Refusal(protocol.REFUSED, "only the restore stage's custodian gives up what it holds")
        else:
            raise ValueError(f"there is no request {operation}")
        return nothing

    def _next(self, after: int) -> tuple[int, bytes, int]:
        place, fd = self._keeper.next_held(after)
        if fd < 0:
            return 0, b"", -1
        label = self._keeper.table.read(fd)
        return place, protocol.HELD.pack(label.kind, label.session, label.token) + label.name, fd


def _whole(packet: bytes, flags: int) -> None:
    if flags & _socket.MSG_TRUNC or len(packet) > protocol.MAX_PACKET:
        raise ValueError(f"a request is at most {protocol.MAX_PACKET} bytes")
    if flags & _socket.MSG_CTRUNC:
        raise Refusal(protocol.FULL, f"more than {protocol.MAX_FDS} descriptors at once, or no room (LimitNOFILE=)")


def _page(names: dict[bytes, int], after: bytes) -> tuple[int, bytes]:
    """Names in order, from the one after `after`, as many as go into one answer; and whether there are more."""
    page: list[bytes] = []
    size = 0
    for name in sorted(name for name in names if name > after):
        size += len(name) + 1
        if size > _PAGE:
            return 1, b"\0".join(page)
        page.append(name)
    return 0, b"\0".join(page)
