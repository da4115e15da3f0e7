# SPDX-License-Identifier: LGPL-2.1-or-later
"""The socket that khod listens on, without what serves it.

A daemon binds it before it retrieves anything: failing to, later, would end the process that holds everybody's memory.
Whoever connects meanwhile waits in the backlog.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from pathlib import Path

from khod.errors import InvalidRequest, MachineError, Refused

BACKLOG = 1024
FIRST_FD = 3
"""SD_LISTEN_FDS_START."""
SO_PASSRIGHTS = 83
"""asm-generic/socket.h."""


def listen(path: Path, *, everybody: bool = False, rival: str = "another khod") -> socket.socket:
    """A socket that listens at `path`, for its owner alone (0600) from the first moment that it can be connected to; with
    `everybody` (0666) whoever connects is told apart by the policy.

    A socket that nobody answers on is replaced; the directory is made if it is missing. `rival` is who may be there already.
    """
    if _answers(path):
        raise Refused(f"somebody answers at {path} already", hint=f"is {rival} running?")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    # Bound under a name of its own and renamed when it is ready: its mode never depends on the umask, which is not ours
    # to change in a process with threads.
    making = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        _make(path.parent)
        making.unlink(missing_ok=True)
        sock.bind(str(making))
        making.chmod(0o666 if everybody else 0o600)
        sock.listen(BACKLOG)
        making.rename(path)
    except OSError as error:
        sock.close()
        with contextlib.suppress(OSError):
            making.unlink()
        if error.errno is None:  # "AF_UNIX path too long": Python's own, 107 bytes are the limit
            raise InvalidRequest(f"cannot listen at {path}: {error}", hint="choose a shorter path for the socket")
        raise MachineError(f"cannot listen at {path}", errno=error.errno)
    return sock


def pass_descriptors(sock: socket.socket, on: bool) -> None:
    """Whether anybody can send descriptors to `sock`, or to what connects to it from now on: if not, his sendmsg(2) fails with
    EPERM, where the kernel knows that (Linux 6.16, older than all that can do live updates)."""
    try:
        sock.setsockopt(socket.SOL_SOCKET, SO_PASSRIGHTS, int(on))
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise


def _make(directory: Path) -> None:
    """With mode 0755, which a umask does not change; one that is there stays as it is."""
    try:
        directory.mkdir(parents=True)
    except FileExistsError:
        return
    directory.chmod(0o755)


def inherited(path: Path) -> socket.socket | None:
    """The socket that systemd listens with in our stead (sd_listen_fds(3)), owned; None where it does not.

    It stays while khod is started again, so it is never removed. Raises InvalidRequest for one that is not at `path`.
    """
    try:
        count = int(os.environ.pop("LISTEN_FDS", "0")) if os.environ.pop("LISTEN_PID", "") == str(os.getpid()) else 0
    except ValueError:
        count = 0
    os.environ.pop("LISTEN_FDNAMES", None)
    found = [socket.socket(fileno=FIRST_FD + number) for number in range(count)]
    for sock in found:
        sock.set_inheritable(False)
    match found:
        case []:
            return None
        case [sock] if _listens_at(sock, path):
            sock.setblocking(False)
            return sock
    where = ", ".join(repr(sock.getsockname()) for sock in found)
    for sock in found:
        sock.close()
    raise InvalidRequest(
        f"systemd passes {count} sockets ({where}) and not the one at {path}",
        hint="ListenStream= of khod.socket and `socket` of the configuration must be the same path",
    )


def _listens_at(sock: socket.socket, path: Path) -> bool:
    return (
        (sock.family, sock.type) == (socket.AF_UNIX, socket.SOCK_STREAM)
        and bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
        and sock.getsockname() == str(path)
    )


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except TimeoutError:
            return True  # a full backlog is somebody's
        except OSError:
            return False
        return True
