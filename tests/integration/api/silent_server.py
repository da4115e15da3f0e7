# SPDX-License-Identifier: LGPL-2.1-or-later
"""A user who serves a file system himself (FUSE), hands a file of it to khod, and never answers again.

Run as root with a directory, khod's socket and a message; its mount is in a mount namespace of its own. The message goes to
khod with the file beside it. Standard output has a line for each thing that happens: ``open`` and the number of the file's
descriptor, ``answer`` and what khod said, and the number of each request of the kernel that stays without an answer. It ends
when both its processes are killed: then the kernel lets everybody go on who waits for it. Without a message it keeps the file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import stat
import struct
import sys

LOOKUP, GETATTR, OPEN, FLUSH, INIT = 1, 3, 14, 25, 26
"""enum fuse_opcode of linux/fuse.h."""
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x20000, 0x4000, 1 << 18
_IN = struct.Struct("=IIQQIIIHH")
_OUT = struct.Struct("=IiQ")
_ATTR = struct.pack("=6Q10I", 2, 4096, 8, 0, 0, 0, 0, 0, 0, stat.S_IFREG | 0o666, 1, 0, 0, 0, 4096, 0)
_ANSWERS = {
    INIT: struct.pack("=IIIIHHIIHHI7I", 7, 31, 0, 0, 16, 12, 4096, 1, 0, 0, 0, *[0] * 7),
    LOOKUP: struct.pack("=QQQQII", 2, 0, 0, 0, 0, 0) + _ATTR,  # valid for no time: each stat(2) asks anew
    GETATTR: struct.pack("=QII", 0, 0, 0) + _ATTR,
    OPEN: struct.pack("=QII", 1, 0, 0),
}
_ROOT = struct.pack("=6Q10I", 1, 0, 0, 0, 0, 0, 0, 0, 0, stat.S_IFDIR | 0o777, 2, 0, 0, 0, 4096, 0)


def serve(device: int) -> None:
    """Answer until a file is opened."""
    opened = False
    while True:
        request = os.read(device, 1 << 17)
        _, operation, unique, node, *_ = _IN.unpack_from(request)
        if opened:
            print(operation, flush=True)
            continue
        answer, failed = _ANSWERS.get(operation, b""), 0 if operation in _ANSWERS else -errno.ENOSYS
        if operation == GETATTR and node == 1:
            answer = answer[:16] + _ROOT
        os.write(device, _OUT.pack(_OUT.size + len(answer), failed, unique) + answer)
        opened = operation == OPEN


def mount(directory: bytes, device: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    for result in (
        libc.unshare(CLONE_NEWNS),
        libc.mount(None, b"/", None, ctypes.c_ulong(MS_REC | MS_PRIVATE), None),
        libc.mount(b"silent", directory, b"fuse", ctypes.c_ulong(0), options),
    ):
        if result != 0:
            raise OSError(ctypes.get_errno(), "cannot mount a file system of a user")


def main() -> None:
    directory, path, message = sys.argv[1:]
    try:
        device = os.open("/dev/fuse", os.O_RDWR)
        mount(directory.encode(), device)
    except OSError as error:
        sys.exit(f"no file system of a user's can be had: {error}")
    # Two processes: one that has a file of its own open, and is killed, waits for itself.
    if os.fork() == 0:
        serve(device)
    os.close(device)
    file = os.open(f"{directory}/guest", os.O_RDWR)
    print("open", file, flush=True)
    if not message:
        signal.pause()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        socket.send_fds(sock, [message.encode() + b"\0"], [file])
        print("answer", sock.recv(1 << 16).rstrip(b"\0").decode(), flush=True)
        signal.pause()


if __name__ == "__main__":
    main()
