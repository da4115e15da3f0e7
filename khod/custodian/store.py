# SPDX-License-Identifier: LGPL-2.1-or-later
"""PID 1's fd store, by the protocol of sd_notify(3), which needs no libsystemd.

PID 1 has what was given to it when it has closed the pipe of a BARRIER=1 that was sent after it: `barrier` waits for that, and
what is not confirmed is not said to be safe. Descriptors that are more than FileDescriptorStoreMax= it drops without a word, so
we count.
"""

from __future__ import annotations

import _socket  # the half of it that is written in C: see the package
import os
import select
from struct import pack

PATIENCE = 10.0
"""Seconds that PID 1 has for each word."""
NAMES = (128 << 10) - len("LISTEN_FDNAMES=") - 1
"""Bytes of all names, a colon after each: the kernel takes no longer string into an environment (MAX_ARG_STRLEN)."""
LONGEST_MARK = 11
"""Bytes of a name in the store: that of a deposit and one letter."""
LISTEN_FDS_START = 3


class Silent(Exception):
    """PID 1 did not take a message, or did not confirm it in time."""


class Store:
    """The store of our unit. `room` is $FDSTORE: how many descriptors it takes; 0 where there is none (before systemd 254, or
    no systemd). `address` is $NOTIFY_SOCKET."""

    def __init__(self, address: str, room: int, patience: float = PATIENCE) -> None:
        self.room = room if address else 0
        self._patience = patience
        self._address: bytes | None = None
        if address:
            self._address = b"\0" + os.fsencode(address[1:]) if address[0] == "@" else os.fsencode(address)
            self._socket = _socket.socket(_socket.AF_UNIX, _socket.SOCK_DGRAM | _socket.SOCK_CLOEXEC)
            self._socket.settimeout(patience)

    @property
    def fileno(self) -> int:
        """The descriptor of its socket; -1 for none."""
        return self._socket.fileno() if self._address else -1

    def tell(self, text: str) -> None:
        """A word about our state, if anybody listens: being heard is no condition of anything."""
        try:
            self._send(text)
        except Silent:
            pass

    def add(self, mark: bytes, fd: int) -> None:
        """Give it a duplicate. One that it has already is no second one, and keeps the mark that it had. Raises Silent."""
        # Not polled: a pipe whose other end is closed is dropped by default, and we alone drop.
        self._send(f"FDSTORE=1\nFDNAME={mark.decode()}\nFDPOLL=0", fd)

    def remove(self, mark: bytes) -> None:
        """Have it close what is called so; nothing of that name: no effect. Raises Silent."""
        self._send(f"FDSTOREREMOVE=1\nFDNAME={mark.decode()}")

    def barrier(self) -> None:
        """Return when all that was said before has been done. Raises Silent."""
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            try:
                self._send("BARRIER=1", theirs)
            finally:
                os.close(theirs)
            poll = select.poll()
            poll.register(ours, 0)  # POLLHUP, which is always reported, when the last other end is closed
            if not poll.poll(self._patience * 1000):
                raise Silent(f"PID 1 did not confirm within {self._patience:g} s what it was given to keep")
        finally:
            os.close(ours)

    def _send(self, text: str, fd: int = -1) -> None:
        if self._address is None:
            return
        rights = [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, pack("i", fd))] if fd >= 0 else []
        try:
            self._socket.sendmsg([text.encode()], rights, _socket.MSG_NOSIGNAL, self._address)
        except OSError as error:
            raise Silent(f"PID 1 cannot be told {text.partition(chr(10))[0]}: {error.strerror or error}")


def listened() -> list[tuple[int, bytes]]:
    """Descriptors that PID 1 gave us at our start, each with its name in the store; [] when they are another process's."""
    environment = os.environ
    if environment.get("LISTEN_PID") != str(os.getpid()):
        return []
    try:
        number = int(environment.get("LISTEN_FDS", ""))
    except ValueError:
        return []
    names = environment.get("LISTEN_FDNAMES", "").encode().split(b":")
    names += [b""] * (number - len(names))
    return [(LISTEN_FDS_START + i, names[i]) for i in range(number)]
