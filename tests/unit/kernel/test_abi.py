# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.abi's codecs of kernel headers, against the headers where the host has them and against bytes seen on Linux 7.3."""

from __future__ import annotations

import struct

import pytest

from khod.abi import bootparam, kexec_metadata, liveupdate


def test_requests_are_io_numbers_of_type_ba() -> None:
    assert liveupdate.LIVEUPDATE_IOCTL_CREATE_SESSION == 0xBA00
    assert liveupdate.LIVEUPDATE_IOCTL_RETRIEVE_SESSION == 0xBA01
    assert liveupdate.LIVEUPDATE_SESSION_PRESERVE_FD == 0xBA40
    assert liveupdate.LIVEUPDATE_SESSION_RETRIEVE_FD == 0xBA41
    assert liveupdate.LIVEUPDATE_SESSION_FINISH == 0xBA42
    assert liveupdate.LIVEUPDATE_SESSION_GET_NAME == 0xBA43


def test_structs_have_the_kernel_s_layout() -> None:
    assert liveupdate.named(b"a") == struct.pack("=Ii", 72, 0) + b"a" + bytes(63)
    assert liveupdate.file(7, (1 << 64) - 1) == struct.pack("=Ii", 16, 7) + b"\xff" * 8
    assert liveupdate.finish() == struct.pack("=II", 8, 0)
    assert liveupdate.fd_of(struct.pack("=IiQ", 16, 42, 0)) == 42
    assert liveupdate.name_of(struct.pack("=II64s", 72, 0, b"khod.1")) == b"khod.1"


@pytest.mark.parametrize("name", [b"x" * 64, b"a\0b"])
def test_a_name_that_would_be_cut_is_refused(name: bytes) -> None:
    with pytest.raises(ValueError, match="63 bytes"):
        liveupdate.named(name)
    assert liveupdate.name_of(liveupdate.named(b"x" * 63)) == b"x" * 63


@pytest.mark.parametrize("token", [-1, 1 << 64])
def test_a_token_is_a_u64(token: int) -> None:
    with pytest.raises(ValueError, match="64-bit"):
        liveupdate.file(0, token)


def test_the_helper_s_numbers_are_those_of_the_abi() -> None:
    # It runs isolated and cannot import them.
    from khod.kernel import preserve_helper

    assert preserve_helper.PRESERVE_FD == liveupdate.LIVEUPDATE_SESSION_PRESERVE_FD


def test_kexec_metadata_is_packed() -> None:
    blob = struct.pack("=I", 1) + b"7.3.4".ljust(65, b"\0") + struct.pack("=I", 2)
    assert len(blob) == 73
    assert kexec_metadata.decode(blob) == kexec_metadata.KexecMetadata("7.3.4", 2)


@pytest.mark.parametrize("blob", [b"", bytes(72), struct.pack("=I", 2) + bytes(69)])
def test_kexec_metadata_of_another_version_is_not_guessed(blob: bytes) -> None:
    assert kexec_metadata.decode(blob) is None


def test_scratch_array() -> None:
    assert bootparam.scratch_array(struct.pack("=4Q", 1, 0x1000, 0xABC000, 48)) == (0xABC000, 48)
    with pytest.raises(ValueError, match="32 bytes"):
        bootparam.scratch_array(bytes(31))
