# SPDX-License-Identifier: LGPL-2.1-or-later
"""The exception tree, with the exit status that khoctl gives for each branch.

::

    KhodError
    ├── InvalidRequest       2   what was asked makes no sense: a name, a number, an option, a configuration key
    ├── Refused              3   makes sense, and will not be done now; nothing was touched
    │   └── NotPermitted     3   … to this caller
    ├── MachineError         4   the kernel (real or simulated) said no; carries its errno
    │   └── …                    one class per documented refusal, below
    ├── FormatError          5   bytes from a file, a socket or the previous kernel that are not what they must be
    │   ├── TreeError            the handover tree (khod.abi.tree)
    │   ├── MapError             the folio map (khod.folio.errors has the branch)
    │   └── JournalError         the journal, beyond a torn tail
    ├── UpdateFailed         6   an update did not go through; everything was undone unless it says otherwise
    ├── Lost                 7   a peer or a deadline is gone: nobody knows, which is not the same as failed
    │   ├── DeadlinePassed   7
    │   └── CustodianGone    7   nobody answers for the descriptors in custody
    └── Held                 8   the answer is "not now": the instance exists but must not be started (claim)

Each has a message that names what and where, and a hint that says what to do; both are for people. Ranges of meaning are
never told apart by text: catch the class.
"""

from __future__ import annotations

import errno as _errno
import os
from typing import ClassVar


class KhodError(Exception):
    """The root. `message` says what went wrong and where, `hint` what to do about it ('' when there is nothing to say)."""

    exit_status: ClassVar[int] = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidRequest(KhodError):
    """What was asked makes no sense, whatever the state of the machine."""

    exit_status = 2


class Refused(KhodError):
    """What was asked makes sense and will not be done now. Nothing was touched."""

    exit_status = 3


class NotPermitted(Refused):
    """This caller may not do that."""


class MachineError(KhodError):
    """A machine, real or simulated, refused a call. `errno` is the kernel's own word for it."""

    exit_status = 4
    default_errno: ClassVar[int] = 0
    default_hint: ClassVar[str] = ""

    def __init__(self, message: str, *, errno: int | None = None, hint: str | None = None) -> None:
        self.errno = self.default_errno if errno is None else errno
        name = _errno.errorcode.get(self.errno)
        said = f": {os.strerror(self.errno)} [{name}]" if name else ""
        super().__init__(f"{message}{said}", hint=self.default_hint if hint is None else hint)


class CustodyFull(MachineError):
    """No more descriptors can be kept: the custodian's limit on open files, or FileDescriptorStoreMax= of its unit."""

    default_errno = _errno.EMFILE
    default_hint = "raise LimitNOFILE= and FileDescriptorStoreMax= of khod-custodian.service"


class DeviceMissing(MachineError):
    """There is no /dev/liveupdate. The hint says which of configuration, `kho=on`, `liveupdate=on` is missing."""

    default_errno = _errno.ENOENT


class DeviceForbidden(MachineError):
    """/dev/liveupdate is there and may not be opened."""

    default_errno = _errno.EACCES
    default_hint = "run khod as root, or give it the device's permissions"


class DeviceBusy(MachineError):
    """Somebody else kept /dev/liveupdate open until our deadline; the message names the holder if it can be found."""

    default_errno = _errno.EBUSY
    default_hint = "the device takes one opener at a time: end the holder, or wait for it"


class DeviceBroken(MachineError):
    """The kernel could not read what its predecessor left (a handler string it does not know): dead for this boot."""

    default_errno = _errno.EIO
    default_hint = "the memory stays reserved and out of reach until a cold boot; boot the previous kernel version next time"


class SessionNameInvalid(MachineError):
    """A session name is 1 to 63 bytes without NUL."""

    default_errno = _errno.EINVAL


class SessionExists(MachineError):
    """An outgoing session of that name is open."""

    default_errno = _errno.EEXIST
    default_hint = "names are global on a host: another live-update agent, or a khod that still runs, holds it"


class SessionUnknown(MachineError):
    """No incoming session of that name: none was handed over, or it was retrieved and closed, or this was a cold boot."""

    default_errno = _errno.ENOENT


class SessionTaken(MachineError):
    """The incoming session was retrieved before and its first descriptor is still open somewhere."""

    default_errno = _errno.EINVAL
    default_hint = "a session can be retrieved once per boot: ask the process that did"


class SessionDirection(MachineError):
    """Preserve asked of an incoming session, or retrieve or finish of an outgoing one."""

    default_errno = _errno.EINVAL


class NotASession(MachineError):
    """The descriptor is not a live-update session."""

    default_errno = _errno.ENOTTY


class BadDescriptor(MachineError):
    """The descriptor is closed, or was opened with O_PATH."""

    default_errno = _errno.EBADF


class FdNotPreservable(MachineError):
    """The kernel has no handler for this type of file (PRESERVE_FD says ENOENT, which never means "no such fd")."""

    default_errno = _errno.ENOENT
    default_hint = "Linux 7.3 preserves memfds and unlinked tmpfs files of ordinary pages, and nothing else"


class TokenExists(MachineError):
    """The token is in use in this session."""

    default_errno = _errno.EEXIST


class TokenUnknown(MachineError):
    """No such token in this session, or what it named was freed by finish."""

    default_errno = _errno.ENOENT


class AlreadyPreserved(MachineError):
    """The same file (by inode) is in a session already, this one or another."""

    default_errno = _errno.EBUSY
    default_hint = "a file is preserved once, until its session is closed or, after a jump, finished"


class FileTooLarge(MachineError):
    """More than the kernel preserves: 2^32-1 pages by the interface, and below 1 TiB by 7.3's allocation limit."""

    default_errno = _errno.EFBIG


class SealsUnknown(MachineError):
    """The file carries seals that the kernel does not know how to carry across."""

    default_errno = _errno.EOPNOTSUPP


class TooManyPreserved(MachineError):
    """The kernel's tables of sessions or files are full (10000 blocks)."""

    default_errno = _errno.ENOSPC


class OutOfMemory(MachineError):
    """The kernel could not find the memory that a call needs, or killed the process that made it."""

    default_errno = _errno.ENOMEM
    default_hint = "preserving fills holes and copies pages out of CMA: free memory, or register less"


class RetrieveFailed(MachineError):
    """RETRIEVE_FD failed: the file's folios are freed and it will never succeed."""

    default_errno = _errno.ENOMEM


class FileFrozen(MachineError):
    """A preserved memfd refuses every change of its size and every hole."""

    default_errno = _errno.EPERM


class DeviceUnusable(MachineError):
    """An IOMMU or a device did not do what it was asked to, or there is none."""

    default_hint = "the kernel's log (dmesg) may say more"


class KexecForbidden(MachineError):
    """No CAP_SYS_BOOT, or kexec is switched off by sysctl or lockdown."""

    default_errno = _errno.EPERM
    default_hint = "see the sysctls kernel.kexec_load_disabled and kernel.kexec_load_limit_reboot, and lockdown"


class NotAKernel(MachineError):
    """The file is not a kernel image that kexec_file_load understands."""

    default_errno = _errno.ENOEXEC
    default_hint = "give a bzImage built with CONFIG_RELOCATABLE=y"


class ImageTooLarge(MachineError):
    """Kernel or initrd fits into no single scratch area."""

    default_errno = _errno.EADDRNOTAVAIL
    default_hint = "boot with a larger kho_scratch=LOW,GLOBAL,PERNODE, or use a smaller initrd"


class ImageInvalid(MachineError):
    """The kernel refused the image's arguments: command line, or a descriptor that is no file."""

    default_errno = _errno.EINVAL


class NothingLoaded(MachineError):
    """reboot(KEXEC) without a loaded image."""

    default_errno = _errno.EINVAL


class KexecBusy(MachineError):
    """Another load is in progress."""

    default_errno = _errno.EBUSY


class KexecFailed(MachineError):
    """reboot(KEXEC) came back: a freeze failed in the kernel, and it has undone its half."""

    default_errno = _errno.EIO


class SyncFailed(MachineError):
    """A file system could not be written out."""

    default_errno = _errno.EIO


class FormatError(KhodError):
    """Bytes that are not what they must be. Raised before anything of them is used."""

    exit_status = 5


class TreeError(FormatError):
    """The handover tree: names the node and the property."""


class MapError(FormatError):
    """The folio map: names the chunk, the element and the value."""


class JournalError(FormatError):
    """A journal that is damaged before its tail, or of a version that this khod does not read."""


class UpdateFailed(KhodError):
    """An update did not go through. The message says at which step and why, and what could not be undone, if anything."""

    exit_status = 6


class Lost(KhodError):
    """A peer vanished: neither yes nor no."""

    exit_status = 7


class DeadlinePassed(Lost):
    """The deadline of a phase, or of one call, passed without an answer."""


class CustodianGone(Lost):
    """Nobody answers for the descriptors that are in custody (decision 18)."""


class Held(KhodError):
    """The instance exists and must not be started from disk: damaged, unverified, or another's."""

    exit_status = 8
