# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which exception each errno of each call is: one table for both machines, as documented in
include/uapi/linux/liveupdate.h, kexec_file_load(2), reboot(2) and memfd_create(2), and as observed on Linux 7.3.

Calls go by the names of the port methods, ``open_device`` being the open(2) that several of them begin with. What an errno
cannot tell apart, a machine tells apart before it asks here: `session_name` checks names (EINVAL from RETRIEVE_SESSION then
means "taken"), `preserve_refusal` the size that the kernel reports as ENOMEM.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from errno import (
    EACCES,
    EADDRNOTAVAIL,
    EBADF,
    EBUSY,
    ECONNREFUSED,
    EEXIST,
    EFAULT,
    EFBIG,
    EINVAL,
    EIO,
    EMFILE,
    ENODEV,
    ENOENT,
    ENOEXEC,
    ENOMEM,
    ENOSPC,
    ENOTTY,
    ENXIO,
    EOPNOTSUPP,
    EPERM,
    ESRCH,
)
from typing import TypeAlias

from khod import errors
from khod.abi.liveupdate import LIVEUPDATE_SESSION_NAME_LENGTH
from khod.errors import KhodError, MachineError

MAX_PRESERVED = 1 << 40
"""Files of this many bytes and more are refused by Linux 7.3: the list of their folios passes INT_MAX bytes (mm/util.c)."""
MAX_SESSION_NAME = LIVEUPDATE_SESSION_NAME_LENGTH - 1
"""Bytes, without the NUL."""

DEPOSIT_NAME = "[a-z0-9]{1,10}"

_Kinds: TypeAlias = dict[int, type[KhodError]]

_DEVICE: _Kinds = {
    ENOENT: errors.DeviceMissing,
    ENODEV: errors.DeviceMissing,  # a node that outlived its device, or was made by hand
    ENXIO: errors.DeviceMissing,
    EACCES: errors.DeviceForbidden,
    EPERM: errors.DeviceForbidden,
    EBUSY: errors.DeviceBusy,
    EIO: errors.DeviceBroken,
}
_FILE: _Kinds = {
    EBADF: errors.BadDescriptor,
    EPERM: errors.FileFrozen,
    ENOMEM: errors.OutOfMemory,
    ENOSPC: errors.OutOfMemory,
}
_SESSION: _Kinds = {EBADF: errors.BadDescriptor, ENOTTY: errors.NotASession}
_LOAD: _Kinds = {
    ENOEXEC: errors.NotAKernel,
    EADDRNOTAVAIL: errors.ImageTooLarge,
    EINVAL: errors.ImageInvalid,
    EBADF: errors.ImageInvalid,
    EPERM: errors.KexecForbidden,
    EBUSY: errors.KexecBusy,
    ENOMEM: errors.OutOfMemory,
}

_CUSTODY: _Kinds = {
    EBADF: errors.BadDescriptor,
    EMFILE: errors.CustodyFull,
    ECONNREFUSED: errors.CustodianGone,
}

REFUSALS: dict[str, _Kinds] = {
    "open_device": _DEVICE,
    "create_session": {
        EINVAL: errors.SessionNameInvalid,
        EEXIST: errors.SessionExists,
        ENOSPC: errors.TooManyPreserved,
        ENOMEM: errors.OutOfMemory,
    },
    "retrieve_session": {
        **_CUSTODY,
        EINVAL: errors.SessionTaken,
        ENOENT: errors.SessionUnknown,
        ENOMEM: errors.OutOfMemory,
    },
    "preserve_fd": {
        **_SESSION,
        EINVAL: errors.SessionDirection,
        ENOENT: errors.FdNotPreservable,
        EEXIST: errors.TokenExists,
        EBUSY: errors.AlreadyPreserved,
        EFBIG: errors.FileTooLarge,
        EOPNOTSUPP: errors.SealsUnknown,
        ENOSPC: errors.TooManyPreserved,
        ENOMEM: errors.OutOfMemory,
    },
    "retrieve_fd": {**_CUSTODY, **_SESSION, EINVAL: errors.SessionDirection, ENOENT: errors.TokenUnknown},
    "finish": {**_SESSION, EINVAL: errors.SessionDirection},
    "session_name": _SESSION,
    "memfd": {ENOMEM: errors.OutOfMemory},
    "window": {EBADF: errors.BadDescriptor},
    "frames": {EBADF: errors.BadDescriptor},
    "stat": _FILE,
    "hugetlb": {EINVAL: errors.Refused, ENOENT: errors.Refused, ENODEV: errors.Refused, ENOMEM: errors.OutOfMemory},
    "guest_memfd": {ENOTTY: errors.Refused, EINVAL: errors.Refused, EBADF: errors.BadDescriptor, ENOMEM: errors.OutOfMemory},
    "specimen": dict.fromkeys((ENOENT, ENODEV, ENXIO, ENOTTY, EOPNOTSUPP, EINVAL, EACCES, EPERM, EBUSY), errors.Refused),
    "copy": {
        EBADF: errors.BadDescriptor,
        ENOMEM: errors.OutOfMemory,
        ENODEV: errors.Refused,  # mmap(2) of a file that has none
        EACCES: errors.Refused,  # opened for reading or writing only
        EPERM: errors.Refused,  # sealed
        EFAULT: errors.Refused,  # madvise(2), where a touch would be SIGBUS
    },
    "read": _FILE,
    "write": _FILE,
    "add_seals": _FILE,
    "truncate": _FILE,
    "duplicate": _FILE,
    "close": _FILE,
    "adopt": _FILE,
    "export": _FILE,
    "load": _LOAD,
    "unload": _LOAD,
    "execute": {EINVAL: errors.NothingLoaded, EPERM: errors.KexecForbidden, EBUSY: errors.KexecBusy},
    "keep": _CUSTODY,
    "kept": _CUSTODY,
    "take": {**_CUSTODY, ENOENT: errors.InvalidRequest},
    "drop": _CUSTODY,
    "sessions": _CUSTODY,
    "release": _CUSTODY,
    "offer": {**_CUSTODY, **_SESSION, EINVAL: errors.SessionDirection, ENXIO: errors.Refused},
    "withdraw": _CUSTODY,
    "room": _CUSTODY,
    "doubt": _CUSTODY,
    "inhibit": {ENXIO: errors.Refused},
    "kexec": {ENXIO: errors.Refused, EINVAL: errors.NothingLoaded},
    "address": {ENXIO: errors.InvalidRequest},
    "descriptor": {
        ESRCH: errors.InvalidRequest,
        EINVAL: errors.InvalidRequest,  # a thread's number is no process
        EBADF: errors.InvalidRequest,
        EPERM: errors.NotPermitted,
        EACCES: errors.NotPermitted,
    },
}
DEVICE_CALLS = (
    "open_iommu", "ioas_alloc", "iova_ranges", "huge_pages_option", "map_file", "unmap", "look", "override", "open_vfio",
    "address", "bind", "attach", "shape", "read_config", "write_config", "migration", "set_state", "read_state", "write_state",
)  # fmt: skip
"""Methods of `khod.core.devices.Devices`; `open_device` goes by another name here."""
_OTHERWISE: dict[str, type[MachineError]] = {
    # A handler that failed once fails with the same errno for ever, whichever it was: the class says what is lost.
    "retrieve_fd": errors.RetrieveFailed,
    "execute": errors.KexecFailed,
    "kexec": errors.KexecFailed,
    "sync": errors.SyncFailed,
    **dict.fromkeys(DEVICE_CALLS, errors.DeviceUnusable),
}


def refusal(call: str, errno: int, what: str, *, hint: str | None = None) -> KhodError:
    """The exception for `errno` from `call`; `what` names the operands, for people. Plain MachineError when undocumented.

    `hint` takes the place of the class's own. A MachineError adds the words for the errno to `what`; others do not.
    """
    kind = REFUSALS.get(call, {}).get(errno) or _OTHERWISE.get(call, MachineError)
    message = f"{call}: {what}"
    if issubclass(kind, MachineError):
        return kind(message, errno=errno, hint=hint)
    return kind(message, hint=hint or "")


def preserve_refusal(errno: int, what: str, size: int) -> KhodError:
    """`refusal` of preserve_fd for a file of `size` bytes: Linux says ENOMEM of a file whose list of folios is too long, as
    of one that memory does not hold."""
    if errno == ENOMEM and size >= MAX_PRESERVED:
        return errors.FileTooLarge(f"preserve_fd: {what}", errno=errno)
    return refusal("preserve_fd", errno, what)


@contextmanager
def refused(call: str, what: str) -> Iterator[None]:
    """Raise `refusal` of `call` for an OSError that leaves the block."""
    try:
        yield
    except OSError as error:
        raise refusal(call, error.errno or 0, what)


def session_name(name: str) -> bytes:
    """The bytes of a session's name. Raises SessionNameInvalid for one that the kernel would not take."""
    raw = name.encode("utf-8", "surrogateescape")
    if not 1 <= len(raw) <= MAX_SESSION_NAME or b"\0" in raw:
        raise errors.SessionNameInvalid(f"session name {name!r}: must be 1 to {MAX_SESSION_NAME} bytes without NUL")
    return raw


def deposit_name(name: str) -> str:
    """`name`, if something can be kept under it (decision 20: PID 1's store takes names in one environment string). Raises
    InvalidRequest."""
    if re.fullmatch(DEPOSIT_NAME, name) is None:
        raise errors.InvalidRequest(f"custody name {name!r}: must be 1 to 10 of a-z and 0-9")
    return name


def command_line(text: str, longest: int) -> str:
    """`text`, if it can be the command line of an image that takes `longest` bytes. Raises ImageInvalid."""
    raw = text.encode("utf-8", "surrogateescape")
    if len(raw) > longest:
        raise errors.ImageInvalid(f"command line of {len(raw)} bytes: the kernel takes {longest}")
    if b"\0" in raw:
        raise errors.ImageInvalid("command line with a NUL in it")
    return text
