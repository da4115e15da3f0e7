# SPDX-License-Identifier: LGPL-2.1-or-later
"""The disposable process that asks the kernel to preserve (decision 8): the kernel kills it, and not khod, when a file
needs more memory than there is.

Run as a program, by path and without site packages, with a SOCK_SEQPACKET socket as standard input. Each packet is a
token with two descriptors, the session and the file; the answer is the errno, 0 for done. Nothing else is imported and
nothing received is kept: a descriptor left behind here would keep a session, and all the memory in it, alive.
"""

from __future__ import annotations

import fcntl
import os
import socket
import struct

PRESERVE_FD = 0xBA40  # LIVEUPDATE_SESSION_PRESERVE_FD of khod.abi.liveupdate, which cannot be imported from here


def preserve(session: int, fd: int, token: int) -> int:
    """One PRESERVE_FD; returns its errno."""
    try:
        fcntl.ioctl(session, PRESERVE_FD, bytearray(struct.pack("=IiQ", 16, fd, token)))
    except OSError as e:
        return e.errno or -1
    return 0


def serve(channel: socket.socket) -> None:
    """Answer until the other end is closed."""
    while True:
        packet, fds, _flags, _ = socket.recv_fds(channel, 8, 2)
        if not packet:
            return
        try:
            status = preserve(fds[0], fds[1], *struct.unpack("=Q", packet))
        finally:
            for fd in fds:
                os.close(fd)
        channel.send(struct.pack("=i", status))


def main() -> None:
    """Offer ourselves to the OOM killer, then serve."""
    with open("/proc/self/oom_score_adj", "w") as f:
        f.write("1000")
    with socket.socket(fileno=0) as channel:
        serve(channel)


if __name__ == "__main__":
    main()
