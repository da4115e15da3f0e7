# SPDX-License-Identifier: LGPL-2.1-or-later
"""``early.py NAME``: a custodian as the restore stage leaves it, at an abstract address: a deposit, two sessions and what was
retrieved from them. Memfds stand for all of it, since there is no live update here; who takes over looks at no kind."""

from __future__ import annotations

import _socket
import os
import sys

from khod.custodian.keeper import Keeper
from khod.custodian.server import Server
from khod.custodian.store import Store
from khod.custodian.table import FILE, SESSION, Table


def memfd(text: str) -> int:
    fd = os.memfd_create("early", os.MFD_CLOEXEC)
    os.write(fd, text.encode())
    return fd


def main() -> None:
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    listener.bind(b"\0" + sys.argv[1].encode())
    listener.listen(4)
    keeper = Keeper(Table(256), Store("", 0), "/nowhere", "")

    def work(inherited: bool) -> None:
        if inherited:
            return
        file = memfd("a file that has a lower number than its session")
        for name in ("khod", "khod.u.1"):
            session = memfd(name)
            keeper._label(session, SESSION, name.encode())
            keeper.sessions[name.encode()] = session
        keeper._label(file, FILE, session=keeper.sessions[b"khod.u.1"], token=3)
        keeper._label(memfd("tree"), FILE, session=keeper.sessions[b"khod"], token=0)
        keeper.keep(b"early", memfd("the record"))

    Server(keeper, listener, {0, 1, 2, listener.fileno()}).run(b"ready\n", work)


if __name__ == "__main__":
    main()
