# SPDX-License-Identifier: LGPL-2.1-or-later
"""Becomes a program with the descriptors that PID 1 would give it: run as ``launch.py NAMES PROGRAM…``, with a socket on
standard input over which they come, as many as there are names."""

from __future__ import annotations

import os
import socket
import sys


def main() -> None:
    names = sys.argv[1].split(":") if sys.argv[1] else []
    received: list[int] = []
    with socket.socket(fileno=0) as channel:
        while len(received) < len(names):
            received += socket.recv_fds(channel, 1, 128)[1]
    os.open(os.devnull, os.O_RDONLY)  # standard input again
    assert received == list(range(3, 3 + len(names)))
    for fd in received:
        os.set_inheritable(fd, True)
    if names:
        os.environ |= {"LISTEN_FDS": str(len(names)), "LISTEN_FDNAMES": ":".join(names)}
        os.environ.setdefault("LISTEN_PID", str(os.getpid()))
    os.execv(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
