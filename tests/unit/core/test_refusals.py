# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.core.refusals against tables of its own: the errnos that include/uapi/linux/liveupdate.h and the man pages name."""

from __future__ import annotations

import errno
import os

import pytest

from khod import errors
from khod.core import refusals
from khod.core.refusals import command_line, deposit_name, preserve_refusal, refusal, refused, session_name

CUSTODY = "EBADF BadDescriptor, EMFILE CustodyFull, ECONNREFUSED CustodianGone"
DOCUMENTED = {
    "open_device": "ENOENT DeviceMissing, ENODEV DeviceMissing, ENXIO DeviceMissing, EACCES DeviceForbidden,"
    " EPERM DeviceForbidden, EBUSY DeviceBusy, EIO DeviceBroken",
    "create_session": "EINVAL SessionNameInvalid, EEXIST SessionExists, ENOSPC TooManyPreserved, ENOMEM OutOfMemory",
    "retrieve_session": f"{CUSTODY}, EINVAL SessionTaken, ENOENT SessionUnknown, ENOMEM OutOfMemory",
    "preserve_fd": "EBADF BadDescriptor, ENOTTY NotASession, EINVAL SessionDirection, ENOENT FdNotPreservable,"
    " EEXIST TokenExists, EBUSY AlreadyPreserved, EFBIG FileTooLarge, EOPNOTSUPP SealsUnknown, ENOSPC TooManyPreserved,"
    " ENOMEM OutOfMemory",
    "retrieve_fd": f"{CUSTODY}, ENOTTY NotASession, EINVAL SessionDirection, ENOENT TokenUnknown,"
    " ENOMEM RetrieveFailed, EIO RetrieveFailed",
    "finish": "EBADF BadDescriptor, ENOTTY NotASession, EINVAL SessionDirection",
    "session_name": "EBADF BadDescriptor, ENOTTY NotASession",
    "memfd": "ENOMEM OutOfMemory",
    "hugetlb": "EINVAL Refused, ENOENT Refused, ENODEV Refused, ENOMEM OutOfMemory",
    "guest_memfd": "ENOTTY Refused, EINVAL Refused, EBADF BadDescriptor, ENOMEM OutOfMemory",
    "specimen": "ENOENT Refused, ENODEV Refused, ENXIO Refused, ENOTTY Refused, EOPNOTSUPP Refused, EINVAL Refused,"
    " EACCES Refused, EPERM Refused, EBUSY Refused",
    "copy": "EBADF BadDescriptor, ENOMEM OutOfMemory, ENODEV Refused, EACCES Refused, EPERM Refused, EFAULT Refused",
    "load": "ENOEXEC NotAKernel, EADDRNOTAVAIL ImageTooLarge, EINVAL ImageInvalid, EBADF ImageInvalid,"
    " EPERM KexecForbidden, EBUSY KexecBusy, ENOMEM OutOfMemory",
    "unload": "EPERM KexecForbidden, EBUSY KexecBusy",
    "execute": "EINVAL NothingLoaded, EPERM KexecForbidden, EBUSY KexecBusy, EIO KexecFailed, ENOMEM KexecFailed",
    "sync": "EIO SyncFailed, ENOSPC SyncFailed, EDQUOT SyncFailed",
    "window": "EBADF BadDescriptor",
    "frames": "EBADF BadDescriptor",
    "descriptor": "ESRCH InvalidRequest, EINVAL InvalidRequest, EBADF InvalidRequest, EPERM NotPermitted, EACCES NotPermitted",
    **dict.fromkeys(("keep", "kept", "drop", "sessions", "release", "withdraw", "room", "doubt"), CUSTODY),
    "take": f"{CUSTODY}, ENOENT InvalidRequest",
    "offer": f"{CUSTODY}, ENOTTY NotASession, EINVAL SessionDirection, ENXIO Refused",
    "inhibit": "ENXIO Refused",
    "address": "ENXIO InvalidRequest",
    "kexec": "ENXIO Refused, EINVAL NothingLoaded, EIO KexecFailed",
    **dict.fromkeys(
        ("stat", "read", "write", "add_seals", "truncate", "duplicate", "close", "adopt", "export"),
        "EBADF BadDescriptor, EPERM FileFrozen, ENOMEM OutOfMemory, ENOSPC OutOfMemory",
    ),
}
ROWS = [(call, *row.split()) for call, rows in DOCUMENTED.items() for row in rows.split(",")]
UNDOCUMENTED = sorted(DOCUMENTED.keys() - {"retrieve_fd", "execute", "kexec", "sync", "address"})


@pytest.mark.parametrize(("call", "number", "kind"), ROWS)
def test_each_documented_errno_has_its_class(call: str, number: str, kind: str) -> None:
    error = refusal(call, getattr(errno, number), "seven of nine")
    assert type(error) is getattr(errors, kind)
    assert str(error).startswith(f"{call}: seven of nine")
    if isinstance(error, errors.MachineError):
        assert error.errno == getattr(errno, number)
        assert f"{os.strerror(error.errno)} [{errno.errorcode[error.errno]}]" in str(error)


def test_no_call_is_undocumented() -> None:
    assert refusals.REFUSALS.keys() == DOCUMENTED.keys() - {"sync"}


@pytest.mark.parametrize("call", [*UNDOCUMENTED, "a call of no port"])
def test_an_undocumented_errno_is_a_plain_machine_error(call: str) -> None:
    error = refusal(call, errno.EXDEV, "it")
    assert type(error) is errors.MachineError
    assert error.errno == errno.EXDEV


def test_the_hint_is_the_class_s_own_unless_given() -> None:
    assert refusal("create_session", errno.EEXIST, "it").hint == errors.SessionExists.default_hint != ""
    assert refusal("create_session", errno.EEXIST, "it", hint="do this").hint == "do this"
    assert refusal("descriptor", errno.EPERM, "it", hint="do that").hint == "do that"
    assert refusal("descriptor", errno.EPERM, "it").hint == ""


@pytest.mark.parametrize(
    ("number", "size", "kind"),
    [
        (errno.ENOMEM, (1 << 40) - 1, errors.OutOfMemory),
        (errno.ENOMEM, 1 << 40, errors.FileTooLarge),
        (errno.EBUSY, 1 << 40, errors.AlreadyPreserved),
    ],
)
def test_enomem_of_a_file_that_no_memory_would_do_for(number: int, size: int, kind: type[errors.MachineError]) -> None:
    error = preserve_refusal(number, "it", size)
    assert type(error) is kind
    assert error.errno == number


def test_an_oserror_becomes_the_call_s_refusal_and_others_pass() -> None:
    with pytest.raises(errors.BadDescriptor) as caught, refused("stat", "descriptor -1"):
        os.fstat(-1)
    assert isinstance(caught.value.__context__, OSError)
    with pytest.raises(errors.MachineError) as unnumbered, refused("stat", "it"):
        raise OSError("without a number")
    assert unnumbered.value.errno == 0
    with pytest.raises(errors.OutOfMemory, match="said before"), refused("stat", "it"):
        raise errors.OutOfMemory("said before")


@pytest.mark.parametrize("name", ["", "n" * 11, "Book", "a-b", "ü", "a\n"])
def test_names_that_custody_does_not_take(name: str) -> None:
    assert deposit_name("0123456789") == "0123456789"
    with pytest.raises(errors.InvalidRequest, match="1 to 10"):
        deposit_name(name)


@pytest.mark.parametrize("name", ["a", "n" * 63, "ü" * 31, "a/b c", "\udcff"])
def test_names_of_sessions(name: str) -> None:
    assert session_name(name) == os.fsencode(name)


@pytest.mark.parametrize("name", ["", "n" * 64, "ü" * 32, "a\0b"])
def test_names_that_no_session_has(name: str) -> None:
    with pytest.raises(errors.SessionNameInvalid) as caught:
        session_name(name)
    assert caught.value.errno == errno.EINVAL


def test_command_lines() -> None:
    assert command_line("x" * 2016, 2016) == "x" * 2016
    assert command_line("ü" * 5, 10) == "ü" * 5
    for text, longest in (("x" * 2017, 2016), ("ü" * 6, 10), ("a\0b", 2016)):
        with pytest.raises(errors.ImageInvalid):
            command_line(text, longest)
