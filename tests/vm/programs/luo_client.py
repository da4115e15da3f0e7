# SPDX-License-Identifier: LGPL-2.1-or-later
"""``luo_client before ID`` and ``luo_client after ID``: a client of luo-agent's protocol, by a socket and the kernel's requests
alone. It knows nothing of khod.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from typing import Any

from khod.abi import liveupdate
from tests.vm.content import fill, filled
from tests.vm.programs.inside import tell

SOCKET = "/run/luod/liveupdate.sock"
SIZE = 1 << 20
TOKEN = 7


def heard(connection: socket.socket) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """What comes, line by line, with the descriptors beside it."""
    pending = b""
    fds: list[int] = []
    while True:
        data, came, _, _ = socket.recv_fds(connection, 4096, 4)
        assert data, "the agent hung up"
        fds += came
        *lines, pending = (pending + data).split(b"\n")
        for line in lines:
            yield json.loads(line), fds
            fds = []


def say(connection: socket.socket, **line: str) -> None:
    connection.sendall(json.dumps(line).encode() + b"\n")


def before(connection: socket.socket, name: str) -> None:
    ram = os.memfd_create("ram", 0x10)  # MFD_EXEC
    os.ftruncate(ram, SIZE)
    fill(ram, SIZE)
    say(connection, cmd="SUBSCRIBE", id=name)
    tell("subscribed")
    session = -1
    for said, fds in heard(connection):
        if said["event"] == "START_PRESERVATION":
            (session,) = fds
            fcntl.ioctl(session, liveupdate.LIVEUPDATE_SESSION_PRESERVE_FD, liveupdate.file(ram, TOKEN))
            say(connection, cmd="READY")
        else:
            os.close(session)  # or the memory stays preserved in it
            tell("heard", **said)


def after(connection: socket.socket, name: str) -> None:
    say(connection, cmd="CLAIM", id=name)
    said, fds = next(heard(connection))
    assert fds, said
    asked = liveupdate.file(-1, TOKEN)
    fcntl.ioctl(fds[0], liveupdate.LIVEUPDATE_SESSION_RETRIEVE_FD, asked)
    intact = filled(liveupdate.fd_of(asked), SIZE)
    fcntl.ioctl(fds[0], liveupdate.LIVEUPDATE_SESSION_FINISH, liveupdate.finish())
    tell("claimed", said=said, intact=intact)


if __name__ == "__main__":
    with socket.socket(socket.AF_UNIX) as agent:
        agent.connect(SOCKET)
        {"before": before, "after": after}[sys.argv[1]](agent, sys.argv[2])
