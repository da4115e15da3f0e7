# SPDX-License-Identifier: LGPL-2.1-or-later
"""The disposable process that takes descriptors from a peer's connection, so that khod has none whose server is that peer.

A descriptor of a file system that a user serves himself (FUSE) makes whoever closes it wait for that user, in a sleep that
SIGKILL does not end: close(2), and the end of the process, call FUSE_FLUSH. A socket with SO_LINGER, or dirty pages of a FUSE
file, make the last one wait who lets go of a message in a queue. Whoever receives such a thing has to close it. So it is
received here, looked at, and given on only if it is of a kind that has no server.

Run as a program, by path and without site packages, with a SOCK_SEQPACKET socket as standard input. A request is `REQUEST`,
with a connection's descriptor beside it, which is closed here in the end. TAKE receives so many bytes, and answers with
`REPLY`, what was wrong, and the bytes; the descriptors that came with them are beside it if each of them is harmless, and else
none is. DROP does nothing else, and waits for GO: who sends a descriptor has it as long as he has not closed his, and the last
one to close is to be this process. Each request is answered by an empty `REPLY` once all is closed: who hears none knows that
this process waits for somebody.

With the numbers of a process and of a descriptor there as arguments, that one is taken instead (pidfd_getfd(2)), and the answer
is one `REPLY`: with the descriptor, the errno, or what the descriptor is that is not given on.
"""

from __future__ import annotations

import array
import ctypes
import errno
import fcntl
import os
import socket
import struct
import sys

TAKE, DROP, GO = 0, 1, 2
REQUEST = struct.Struct("=IBI")
"""u32 number, u8 what to do, u32 how many bytes to receive."""
REPLY = struct.Struct("=IiI")
"""u32 number, s32 errno (-1: this is the end of the request), u32 length of the text that follows, before the bytes.

The highest bit of the length: descriptors were lost on the way, for want of room.
"""
LOST = 1 << 31
MAX_FDS = 253
"""SCM_MAX_FD, include/net/scm.h."""
MAX_BYTES = 1 << 16
KHOD_TAKES = "memfds, files of tmpfs, guest_memfds, and devices of VFIO and iommufd"

F_GET_SEALS = 1034
_GUEST_MEMFD_LINK = "/[kvm-gmem] (deleted)"
_ANONYMOUS = ("anon_inode:[kvm-gmem]", "anon_inode:[vfio-device]", "anon_inode:[luo_session] ")
"""What no path is called that a file system gives: that begins with a slash (fs/d_path.c)."""
_GUEST_MEMFD_MAGIC = 0x474D454D
"""linux/magic.h. FUSE has its own in fs/fuse/inode.c, whatever the server says."""
_NR_PIDFD_GETFD = 438
"""arch/x86/entry/syscalls/syscall_64.tbl."""
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC, _STATX_TYPE = 0x1000, 0x4000, 1
_STATX = struct.Struct("=28xH98xII120x")
"""struct statx of linux/stat.h, 256 bytes: u16 stx_mode at 28, u32 stx_rdev_major at 128 and stx_rdev_minor."""


def harmless(fd: int) -> bool:
    """Whether it is of a kind that khod can keep, which the kernel itself answers for. Asks no file's server, but that of a
    file which is called as a guest_memfd is."""
    try:
        fcntl.fcntl(fd, F_GET_SEALS)
        return True  # only shmem and hugetlbfs know seals (mm/memfd.c)
    except OSError as error:
        if error.errno != errno.EINVAL:  # EBADF: O_PATH, which says nothing of what it would be to open
            return False
    link = _link(f"/proc/self/fd/{fd}")
    if link.startswith(_ANONYMOUS):
        return True
    if link == _GUEST_MEMFD_LINK:
        return _file_system(fd) == _GUEST_MEMFD_MAGIC
    return _is_device(fd)


def _is_device(fd: int) -> bool:
    status = ctypes.create_string_buffer(256)
    # As the kernel has it in memory: fstat(2) would ask a FUSE server for what it was told to forget.
    if ctypes.CDLL(None).statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _STATX_TYPE, status) != 0:
        return False
    mode, major, minor = _STATX.unpack(status.raw)
    if mode & 0o170000 != 0o020000:
        return False
    name = _link(f"/sys/dev/char/{major}:{minor}")
    return name.endswith("/misc/iommu") or name.split("/")[-2:-1] == ["vfio-dev"]


def _file_system(fd: int) -> int:
    found = ctypes.create_string_buffer(256)
    if ctypes.CDLL(None).fstatfs(fd, found) != 0:
        return 0
    return int(struct.unpack_from("=q", found.raw)[0])  # struct statfs of x86_64: f_type is a long, and first


def _link(path: str) -> str:
    """Where it leads to, '' for nowhere."""
    try:
        return os.readlink(path)  # noqa: PTH115 - pathlib takes as long to import as all the rest
    except OSError:
        return ""


def take(connection: socket.socket, length: int) -> tuple[bytes, list[int], int, int, str]:
    """Bytes, descriptors, errno, whether some were lost, and what is wrong with the descriptors, '' for nothing."""
    fds = array.array("i")
    try:
        # Not socket.recv_fds: it drops the flags that it is given (CPython 3.11), and with them close-on-exec.
        wanted = socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
        data, beside, flags, _ = connection.recvmsg(length, socket.CMSG_SPACE(4 * MAX_FDS), wanted)
    except OSError as error:
        return b"", [], error.errno or errno.EIO, 0, ""
    for level, kind, content in beside:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(content[: len(content) // 4 * 4])
    bad = next((place for place, fd in enumerate(fds) if not harmless(fd)), -1)
    problem = ""
    if bad >= 0:
        problem = f"descriptor {bad} of the message is {_link(f'/proc/self/fd/{fds[bad]}')[:200]!r}, which khod cannot keep"
    return data, fds.tolist(), 0, LOST if flags & socket.MSG_CTRUNC else 0, problem


def answer(channel: socket.socket, request: bytes, connection: socket.socket) -> None:
    """One request, up to the closing of what it brought, which may be never."""
    number, operation, length = REQUEST.unpack(request)
    fds: list[int] = []
    if operation == TAKE:
        data, fds, failed, lost, problem = take(connection, length)
        text = problem.encode("utf-8", "replace")
        beside = [] if problem else fds
        socket.send_fds(channel, [REPLY.pack(number, failed, len(text) | lost), text, data], beside)
    for fd in fds:
        try:
            os.close(fd)
        except OSError:  # of what close(2) has to write out; the descriptor is gone all the same
            continue
    connection.close()
    channel.send(REPLY.pack(number, -1, 0))


def serve(channel: socket.socket) -> None:
    """Answer until the other end is closed."""
    dropped: list[int] = []
    while True:
        request, fds, _flags, _ = socket.recv_fds(channel, REQUEST.size, 1)
        if not request:
            return
        operation = REQUEST.unpack(request)[1]
        if operation == DROP:
            dropped += fds
            continue
        connection = fds.pop() if operation == TAKE else dropped.pop()
        try:
            answer(channel, request, socket.socket(fileno=connection))
        except BrokenPipeError:  # khod has ended meanwhile
            return


def fetch(channel: socket.socket, pid: int, number: int) -> None:
    """Another process's descriptor; then it is closed here, which may take for ever."""
    try:
        fd = _pidfd_getfd(os.pidfd_open(pid), number)
    except OSError as error:
        channel.send(REPLY.pack(0, error.errno or errno.EIO, 0))
        return
    if harmless(fd):
        socket.send_fds(channel, [REPLY.pack(0, 0, 0)], [fd])
    else:
        text = _link(f"/proc/self/fd/{fd}")[:200].encode("utf-8", "replace")
        channel.send(REPLY.pack(0, 0, len(text)) + text)
    os.close(fd)


def _pidfd_getfd(pidfd: int, number: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.syscall(ctypes.c_long(_NR_PIDFD_GETFD), pidfd, number, 0)
    if fd < 0:
        raise OSError(ctypes.get_errno(), "pidfd_getfd")
    return int(fd)


def main() -> None:
    """What may wait for ever is not what memory is kept free for."""
    with open("/proc/self/oom_score_adj", "w") as score:
        score.write("0")
    with socket.socket(fileno=0) as channel:
        if sys.argv[1:]:
            fetch(channel, *map(int, sys.argv[1:]))
        else:
            serve(channel)


if __name__ == "__main__":
    main()
