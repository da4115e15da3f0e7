# SPDX-License-Identifier: LGPL-2.1-or-later
"""/dev/liveupdate and its sessions.

The device takes one opener at a time, on the whole host, and a descriptor of it that we kept would keep everybody else
out; so it is open for the length of one call. Sessions outlive it.

What is retrieved is the only thing that stands between a guest's memory and its end, so it is retrieved by the custodian, which
keeps it (decision 18), and what is had here is a duplicate.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from khod.abi import liveupdate as abi
from khod.core.refusals import MAX_PRESERVED, REFUSALS, preserve_refusal, refusal, refused, session_name
from khod.errors import DeviceBusy, DeviceMissing, FileTooLarge, KhodError, OutOfMemory
from khod.kernel import diagnosis
from khod.kernel.custody import KernelCustody
from khod.kernel.memory import KernelMemory
from khod.kernel.preserver import Preserver

DEVICE = "/dev/liveupdate"
BUSY_PATIENCE = 5.0
"""Seconds for which another opener is waited out. A well-behaved one holds the device for milliseconds."""

FLOOR = 256 << 20
"""Bytes (or a 32nd of memory, if that is less) that filling holes must leave, or the machine thrashes."""


class KernelLiveUpdate:
    """The port `LiveUpdate` of the running kernel.

    `device` and `patience` (seconds) are there for hosts with an unusual /dev and for tests. Without `custody`, what is
    retrieved ends with this process.
    """

    def __init__(self, device: str = DEVICE, patience: float = BUSY_PATIENCE, custody: KernelCustody | None = None) -> None:
        self._device = device
        self._patience = patience
        self._custody = custody
        self._lock = threading.Lock()  # our own threads would meet EBUSY of each other
        self._preserver = Preserver()

    def close(self) -> None:
        """End the helpers. Nobody needs to: they end with us. For tests, which count descriptors."""
        self._preserver.close()

    def probe(self) -> None:
        """See the port."""
        with self._opened():
            pass

    def create_session(self, name: str) -> int:
        """See the port."""
        argument = abi.named(session_name(name))
        with self._opened() as device, refused("create_session", f"session {name!r}"):
            fcntl.ioctl(device, abi.LIVEUPDATE_IOCTL_CREATE_SESSION, argument)
            return _owned(abi.fd_of(argument))

    def retrieve_session(self, name: str) -> int:
        """See the port."""
        argument = abi.named(session_name(name))
        custody = self._custody
        if custody is not None:
            with self._lock:
                return self._patiently(lambda: custody.retrieve_session(name))
        with self._opened() as device, refused("retrieve_session", f"session {name!r}"):
            fcntl.ioctl(device, abi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION, argument)
            return _owned(abi.fd_of(argument))

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        """See the port."""
        what = f"descriptor {fd} as token {token:#x} of session {session}"
        with refused("preserve_fd", what):
            _check_session(session)
            status = os.fstat(fd)
            _check_memory(what, status)
            number = self._preserver.preserve(session, fd, token)
        if number:
            raise preserve_refusal(number, what, status.st_size)

    def retrieve_fd(self, session: int, token: int) -> int:
        """See the port."""
        argument = abi.file(-1, token)
        with refused("retrieve_fd", f"token {token:#x} of session {session}"):
            _check_session(session)
            fd = self._custody.retrieve_fd(session, token) if self._custody else None
            if fd is not None:
                return fd
            # Of a session that is not in custody, an outgoing one for instance, the kernel itself says what it thinks.
            fcntl.ioctl(session, abi.LIVEUPDATE_SESSION_RETRIEVE_FD, argument)
            return _owned(abi.fd_of(argument))

    def finish(self, session: int) -> None:
        """See the port."""
        with refused("finish", f"session {session}"):
            _check_session(session)
            fcntl.ioctl(session, abi.LIVEUPDATE_SESSION_FINISH, abi.finish())

    def session_name(self, session: int) -> str:
        """See the port."""
        argument = abi.named()
        with refused("session_name", f"descriptor {session}"):
            _check_session(session)
            fcntl.ioctl(session, abi.LIVEUPDATE_SESSION_GET_NAME, argument)
        return abi.name_of(argument).decode("utf-8", "surrogateescape")

    @contextmanager
    def _opened(self) -> Iterator[int]:
        with self._lock:
            device = self._open()
            try:
                yield device
            finally:
                os.close(device)

    def _open(self) -> int:
        return self._patiently(lambda: os.open(self._device, os.O_RDWR | os.O_CLOEXEC))

    def _patiently(self, attempt: Callable[[], int]) -> int:
        """`attempt`, which opens the device and whose OSError is of that, until nobody else has it open or patience ends."""
        deadline = time.monotonic() + self._patience
        pause = 0.001
        while True:
            try:
                return attempt()
            except OSError as e:
                number = e.errno or 0
            # The kernel tells nobody when the device comes free: ask again, less and less often.
            left = deadline - time.monotonic()
            if number != errno.EBUSY or left <= 0:
                raise self._refusal(number)
            time.sleep(min(pause, left))  # nothing else could be waited for
            pause = min(pause * 2, 0.1)

    def _refusal(self, number: int) -> KhodError:
        kind, what, hint = REFUSALS["open_device"].get(number), self._device, None
        if kind is DeviceMissing:
            hint = diagnosis.why_missing()
        elif kind is DeviceBusy:
            what += f", which {', '.join(diagnosis.holders(self._device)) or 'a process that we may not look at'} holds open"
        return refusal("open_device", number, what, hint=hint)


def _check_memory(what: str, status: os.stat_result) -> None:
    # The kernel fills holes until it must kill the helper, and what it has filled by then stays filled: the next to be
    # killed would be us. So holes that cannot fit are refused here; the helper's death is for what races with us.
    figures = KernelMemory().figures()
    spare = figures.available - figures.cma_free - min(figures.total // 32, FLOOR)
    holes = status.st_size - status.st_blocks * 512
    if holes > spare and stat.S_ISREG(status.st_mode):
        kind = FileTooLarge if status.st_size >= MAX_PRESERVED else OutOfMemory
        room = f"{holes} bytes of holes to fill, and {max(spare, 0)} bytes of memory are to spare"
        raise kind(f"preserve_fd: {what}: it has {room}")


def _check_session(fd: int) -> None:
    # The kernel answers EINVAL both to a session of the wrong direction and to a request that a descriptor of another
    # driver happens not to know: only a session may get as far as the request. A closed descriptor is EBADF here too.
    try:
        link = str(Path(f"/proc/self/fd/{fd}").readlink())
    except FileNotFoundError:
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    if not link.startswith(abi.SESSION_LINK_PREFIX.rstrip()):
        raise OSError(errno.ENOTTY, os.strerror(errno.ENOTTY))


def _owned(fd: int) -> int:
    # The kernel makes them close-on-exec; Python's own idea of "inheritable" is that very flag.
    os.set_inheritable(fd, False)
    return fd
