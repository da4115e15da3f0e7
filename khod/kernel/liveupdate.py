# SPDX-License-Identifier: LGPL-2.1-or-later
"""/dev/liveupdate and its sessions.

The device takes one opener at a time, on the whole host, and a descriptor of it that we kept would keep everybody else
out; so it is open for the length of one call. Sessions outlive it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from khod.abi import liveupdate as abi
from khod.errors import (
    AlreadyPreserved,
    BadDescriptor,
    DeviceBroken,
    DeviceBusy,
    DeviceForbidden,
    DeviceMissing,
    FdNotPreservable,
    FileTooLarge,
    MachineError,
    NotASession,
    OutOfMemory,
    RetrieveFailed,
    SealsUnknown,
    SessionDirection,
    SessionExists,
    SessionNameInvalid,
    SessionTaken,
    SessionUnknown,
    TokenExists,
    TokenUnknown,
    TooManyPreserved,
)
from khod.kernel import diagnosis
from khod.kernel.memory import KernelMemory
from khod.kernel.preserver import Preserver

DEVICE = "/dev/liveupdate"
BUSY_PATIENCE = 5.0
"""Seconds for which another opener is waited out. A well-behaved one holds the device for milliseconds."""

FLOOR = 256 << 20
"""Bytes (or a 32nd of memory, if that is less) that filling holes must leave, or the machine thrashes."""

LARGEST = 1 << 40
"""From here on Linux 7.3 says ENOMEM, with a warning in its log, however much memory there is: the array of the file's
folios (mm/memfd_luo.c) is larger than it allocates."""

_Table: TypeAlias = Mapping[int, type[MachineError]]

# Documentation: include/uapi/linux/liveupdate.h; each row was seen on Linux 7.3.
_OPEN: _Table = {
    errno.ENOENT: DeviceMissing,
    errno.ENODEV: DeviceMissing,
    errno.ENXIO: DeviceMissing,
    errno.EACCES: DeviceForbidden,
    errno.EPERM: DeviceForbidden,
    errno.EBUSY: DeviceBusy,
    errno.EIO: DeviceBroken,
}
_CREATE: _Table = {
    errno.EINVAL: SessionNameInvalid,
    errno.EEXIST: SessionExists,
    errno.ENOSPC: TooManyPreserved,
    errno.ENOMEM: OutOfMemory,
}
_RETRIEVE: _Table = {errno.ENOENT: SessionUnknown, errno.EINVAL: SessionTaken, errno.ENOMEM: OutOfMemory}
_SESSION: _Table = {errno.EBADF: BadDescriptor, errno.ENOTTY: NotASession, errno.EINVAL: SessionDirection}
_PRESERVE: _Table = {
    **_SESSION,
    errno.ENOENT: FdNotPreservable,
    errno.EEXIST: TokenExists,
    errno.EBUSY: AlreadyPreserved,
    errno.EFBIG: FileTooLarge,
    errno.EOPNOTSUPP: SealsUnknown,
    errno.ENOSPC: TooManyPreserved,
    errno.ENOMEM: OutOfMemory,
}
_RETRIEVE_FD: _Table = {**_SESSION, errno.ENOENT: TokenUnknown}


def _error(number: int, message: str, table: _Table, other: type[MachineError] = MachineError) -> MachineError:
    return table.get(number, other)(message, errno=number)


class KernelLiveUpdate:
    """The port `LiveUpdate` of the running kernel.

    `device` and `patience` (seconds) are there for hosts with an unusual /dev and for tests.
    """

    def __init__(self, device: str = DEVICE, patience: float = BUSY_PATIENCE) -> None:
        self._device = device
        self._patience = patience
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
        argument = self._named(name)
        with self._opened() as device, _said(f"create session {name!r}", _CREATE):
            fcntl.ioctl(device, abi.LIVEUPDATE_IOCTL_CREATE_SESSION, argument)
            return _owned(abi.fd_of(argument))

    def retrieve_session(self, name: str) -> int:
        """See the port."""
        argument = self._named(name)
        with self._opened() as device, _said(f"retrieve session {name!r}", _RETRIEVE):
            fcntl.ioctl(device, abi.LIVEUPDATE_IOCTL_RETRIEVE_SESSION, argument)
            return _owned(abi.fd_of(argument))

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        """See the port."""
        what = f"preserve descriptor {fd} in session {session} under token {token:#x}"
        with _said(what, _PRESERVE):
            _check_session(session)
            status = os.fstat(fd)
            _check_memory(what, status)
            number = self._preserver.preserve(session, fd, token)
        if number == errno.ENOMEM and status.st_size >= LARGEST:
            raise FileTooLarge(what)
        if number:
            raise _error(number, what, _PRESERVE)

    def retrieve_fd(self, session: int, token: int) -> int:
        """See the port."""
        argument = abi.file(-1, token)
        with _said(f"retrieve token {token:#x} from session {session}", _RETRIEVE_FD, RetrieveFailed):
            _check_session(session)
            fcntl.ioctl(session, abi.LIVEUPDATE_SESSION_RETRIEVE_FD, argument)
            return _owned(abi.fd_of(argument))

    def finish(self, session: int) -> None:
        """See the port."""
        with _said(f"finish session {session}", _SESSION):
            _check_session(session)
            fcntl.ioctl(session, abi.LIVEUPDATE_SESSION_FINISH, abi.finish())

    def session_name(self, session: int) -> str:
        """See the port."""
        argument = abi.named()
        with _said(f"ask session {session} for its name", _SESSION):
            _check_session(session)
            fcntl.ioctl(session, abi.LIVEUPDATE_SESSION_GET_NAME, argument)
        return os.fsdecode(abi.name_of(argument))

    def _named(self, name: str) -> bytearray:
        encoded = os.fsencode(name)
        try:
            if not encoded:
                raise ValueError("a session needs a name")
            return abi.named(encoded)
        except ValueError as e:
            raise SessionNameInvalid(f"session name {name!r}", hint=str(e))

    @contextmanager
    def _opened(self) -> Iterator[int]:
        with self._lock:
            device = self._open()
            try:
                yield device
            finally:
                os.close(device)

    def _open(self) -> int:
        deadline = time.monotonic() + self._patience
        pause = 0.001
        while True:
            try:
                return os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
            except OSError as e:
                number = e.errno or 0
            # The kernel tells nobody when the device comes free: ask again, less and less often.
            left = deadline - time.monotonic()
            if number != errno.EBUSY or left <= 0:
                raise self._refusal(number)
            time.sleep(min(pause, left))
            pause = min(pause * 2, 0.1)

    def _refusal(self, number: int) -> MachineError:
        kind = _OPEN.get(number, MachineError)
        if kind is DeviceMissing:
            return DeviceMissing(f"open {self._device}", errno=number, hint=diagnosis.why_missing())
        if kind is DeviceBusy:
            holders = ", ".join(diagnosis.holders(self._device)) or "a process that we may not look at"
            return DeviceBusy(f"open {self._device}, which {holders} holds open", errno=number)
        return kind(f"open {self._device}", errno=number)


@contextmanager
def _said(what: str, table: _Table, other: type[MachineError] = MachineError) -> Iterator[None]:
    """Translate the OSErrors of the block, once."""
    try:
        yield
    except OSError as e:
        raise _error(e.errno or 0, what, table, other)


def _check_memory(what: str, status: os.stat_result) -> None:
    # The kernel fills holes until it must kill the helper, and what it has filled by then stays filled: the next to be
    # killed would be us. So holes that cannot fit are refused here; the helper's death is for what races with us.
    figures = KernelMemory().figures()
    spare = figures.available - figures.cma_free - min(figures.total // 32, FLOOR)
    holes = status.st_size - status.st_blocks * 512
    if holes > spare and stat.S_ISREG(status.st_mode):
        kind = FileTooLarge if status.st_size >= LARGEST else OutOfMemory
        raise kind(f"{what}: it has {holes} bytes of holes to fill, and {max(spare, 0)} bytes of memory are to spare")


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
