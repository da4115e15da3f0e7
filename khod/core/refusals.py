# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which exception each errno of each call is: one table for both machines, as documented in
include/uapi/linux/liveupdate.h, kexec_file_load(2), reboot(2) and memfd_create(2), and as observed on Linux 7.3.

Calls go by the names of the port methods, ``open_device`` being the open(2) that several of them begin with. What an errno
cannot tell apart, a machine tells apart before it asks here: `session_name` checks names (EINVAL from RETRIEVE_SESSION then
means "taken"), and `MAX_PRESERVED` the size that the kernel reports as ENOMEM.
"""

from __future__ import annotations

from errno import (
    EACCES,
    EADDRNOTAVAIL,
    EBADF,
    EBUSY,
    EEXIST,
    EFBIG,
    EINVAL,
    EIO,
    ENOENT,
    ENOEXEC,
    ENOMEM,
    ENOSPC,
    ENOTTY,
    EOPNOTSUPP,
    EPERM,
)

from khod import errors
from khod.errors import MachineError

MAX_PRESERVED = 1 << 40
"""Files of this many bytes and more are refused by Linux 7.3: the list of their folios passes INT_MAX bytes (mm/util.c)."""
MAX_SESSION_NAME = 63
"""LIVEUPDATE_SESSION_NAME_LENGTH less the NUL."""
MAX_CMDLINE = 2047
"""COMMAND_LINE_SIZE of x86 less the NUL."""

_DEVICE = {
    ENOENT: errors.DeviceMissing,
    EACCES: errors.DeviceForbidden,
    EPERM: errors.DeviceForbidden,
    EBUSY: errors.DeviceBusy,
    EIO: errors.DeviceBroken,
}
_FILE = {EBADF: errors.BadDescriptor, EPERM: errors.FileFrozen, ENOMEM: errors.OutOfMemory, ENOSPC: errors.OutOfMemory}
_SESSION = {EBADF: errors.BadDescriptor, ENOTTY: errors.NotASession}

REFUSALS: dict[str, dict[int, type[MachineError]]] = {
    "open_device": _DEVICE,
    "create_session": {
        EINVAL: errors.SessionNameInvalid,
        EEXIST: errors.SessionExists,
        ENOSPC: errors.TooManyPreserved,
        ENOMEM: errors.OutOfMemory,
    },
    "retrieve_session": {EINVAL: errors.SessionTaken, ENOENT: errors.SessionUnknown, ENOMEM: errors.OutOfMemory},
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
    "retrieve_fd": {**_SESSION, EINVAL: errors.SessionDirection, ENOENT: errors.TokenUnknown},
    "finish": {**_SESSION, EINVAL: errors.SessionDirection},
    "session_name": _SESSION,
    "memfd": {ENOMEM: errors.OutOfMemory},
    "stat": _FILE,
    "read": _FILE,
    "write": _FILE,
    "add_seals": _FILE,
    "truncate": _FILE,
    "duplicate": _FILE,
    "close": _FILE,
    "load": {
        ENOEXEC: errors.NotAKernel,
        EADDRNOTAVAIL: errors.ImageTooLarge,
        EINVAL: errors.ImageInvalid,
        EBADF: errors.ImageInvalid,
        EPERM: errors.KexecForbidden,
        EBUSY: errors.KexecBusy,
        ENOMEM: errors.OutOfMemory,
    },
    "execute": {EINVAL: errors.NothingLoaded, EPERM: errors.KexecForbidden, EBUSY: errors.KexecBusy},
}
_OTHERWISE: dict[str, type[MachineError]] = {
    # A handler that failed once fails with the same errno for ever, whichever it was: the class says what is lost.
    "retrieve_fd": errors.RetrieveFailed,
    "execute": errors.KexecFailed,
    "sync": errors.SyncFailed,
}


def refusal(call: str, errno: int, what: str, *, hint: str | None = None) -> MachineError:
    """The exception for `errno` from `call`; `what` names the operands, for people. Plain MachineError when undocumented."""
    kind = REFUSALS.get(call, {}).get(errno) or _OTHERWISE.get(call, MachineError)
    return kind(f"{call}: {what}", errno=errno, hint=hint)


def session_name(name: str) -> bytes:
    """The bytes of a session's name. Raises SessionNameInvalid for one that the kernel would not take."""
    raw = name.encode("utf-8", "surrogateescape")
    if not 1 <= len(raw) <= MAX_SESSION_NAME or b"\0" in raw:
        raise errors.SessionNameInvalid(f"session name {name!r}: must be 1 to {MAX_SESSION_NAME} bytes without NUL")
    return raw


def command_line(text: str) -> str:
    """`text`, if the kernel takes it as its command line. Raises ImageInvalid."""
    raw = text.encode("utf-8", "surrogateescape")
    if len(raw) > MAX_CMDLINE:
        raise errors.ImageInvalid(f"command line of {len(raw)} bytes: the kernel takes {MAX_CMDLINE}")
    if b"\0" in raw:
        raise errors.ImageInvalid("command line with a NUL in it")
    return text
