# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.kernel.liveupdate and its diagnosis, as far as a host without the device can tell."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from khod.errors import (
    BadDescriptor,
    DeviceForbidden,
    DeviceMissing,
    MachineError,
    NotASession,
    OutOfMemory,
    SessionNameInvalid,
)
from khod.kernel import diagnosis
from khod.kernel.liveupdate import KernelLiveUpdate, _check_memory
from khod.kernel.memory import KernelMemory

BOTH = "CONFIG_KEXEC_HANDOVER=y\nCONFIG_LIVEUPDATE=y\n"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "proc").mkdir()
    (tmp_path / "boot").mkdir()
    (tmp_path / "proc/cmdline").write_text("quiet\n")
    return tmp_path


def configure(root: Path, config: str) -> None:
    (root / "proc/config.gz").write_bytes(gzip.compress(config.encode()))


def test_a_missing_device_has_its_reason_in_the_hint(tmp_path: Path) -> None:
    with pytest.raises(DeviceMissing) as refused:
        KernelLiveUpdate(str(tmp_path / "liveupdate")).probe()
    assert refused.value.hint == diagnosis.why_missing()


def test_other_refusals_of_the_device(tmp_path: Path) -> None:
    if os.geteuid():
        secret = tmp_path / "liveupdate"
        secret.touch(0o000)
        with pytest.raises(DeviceForbidden):
            KernelLiveUpdate(str(secret)).probe()
    with pytest.raises(MachineError, match="EISDIR"):
        KernelLiveUpdate(str(tmp_path)).probe()


def test_missing_configuration(root: Path) -> None:
    configure(root, "CONFIG_KEXEC=y\n# CONFIG_LIVEUPDATE is not set\n")
    assert "CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE" in diagnosis.why_missing(root)
    configure(root, "CONFIG_KEXEC_HANDOVER=y\n")
    assert "without CONFIG_LIVEUPDATE and" in diagnosis.why_missing(root)


def test_the_configuration_is_looked_for_in_boot_too(root: Path) -> None:
    (root / "boot" / f"config-{os.uname().release}").write_text("CONFIG_KEXEC=y\n")
    assert "CONFIG_KEXEC_HANDOVER" in diagnosis.why_missing(root)


@pytest.mark.parametrize(
    ("cmdline", "config", "words"),
    [
        ("quiet", BOTH, "add kho=on and liveupdate=on"),
        ("kho=on", BOTH, "add liveupdate=on"),
        ("liveupdate=1", BOTH, "add kho=on to"),
        ("kho=off liveupdate=on", BOTH + "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y\n", "add kho=on to"),
        ("liveupdate=off", BOTH + "CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT=y\n", "add liveupdate=on to"),
        ("kho=y liveupdate=1", BOTH, "kernel log"),
        ("kho=on liveupdate=on", "", "kernel log"),
        ("kho liveupdate", "", "add kho=on and liveupdate=on"),  # kstrtobool() of nothing is an error, and changes nothing
    ],
)
def test_missing_parameters(root: Path, cmdline: str, config: str, words: str) -> None:
    (root / "proc/cmdline").write_text(cmdline + "\n")
    if config:
        configure(root, config)
    assert words in diagnosis.why_missing(root)


def test_a_device_without_its_node(root: Path) -> None:
    (root / "proc/cmdline").write_text("kho=on liveupdate=on\n")
    (root / "proc/misc").write_text("258 liveupdate\n259 msr\n")
    assert "node" in diagnosis.why_missing(root)


def test_holders_are_named(tmp_path: Path) -> None:
    path = tmp_path / "device"
    path.touch()
    assert diagnosis.holders(str(path)) == []
    name = Path("/proc/self/comm").read_text().strip()
    with open(path):
        assert diagnosis.holders(str(path)) == [f"{name} (pid {os.getpid()})"]


@pytest.mark.parametrize("name", ["", "x" * 64, "ä" * 32, "a\0b"])
def test_names_are_checked_before_the_device_is_opened(name: str, tmp_path: Path) -> None:
    liveupdate = KernelLiveUpdate(str(tmp_path / "absent"))
    for call in (liveupdate.create_session, liveupdate.retrieve_session):
        with pytest.raises(SessionNameInvalid):
            call(name)


def test_what_is_no_session_is_told_before_the_kernel_is_asked() -> None:
    liveupdate = KernelLiveUpdate()
    fd = os.memfd_create("anon_inode:[luo_session] x")
    try:
        for call in (
            lambda: liveupdate.preserve_fd(fd, fd, 1),
            lambda: liveupdate.retrieve_fd(fd, 1),
            lambda: liveupdate.finish(fd),
            lambda: liveupdate.session_name(fd),
        ):
            with pytest.raises(NotASession):
                call()
    finally:
        os.close(fd)
    for call in (lambda: liveupdate.finish(fd), lambda: liveupdate.finish(-1)):
        with pytest.raises(BadDescriptor):
            call()


def test_holes_that_cannot_fit_are_refused_before_the_kernel_fills_memory_with_them() -> None:
    available = KernelMemory().figures().available
    fd = os.memfd_create("unit")
    try:
        for size, fits in [(0, True), (1 << 20, True), (available, False), (4 * available, False)]:
            os.ftruncate(fd, size)
            if fits:
                _check_memory("preserve", os.fstat(fd))
                continue
            with pytest.raises(OutOfMemory, match=f"{size} bytes of holes"):
                _check_memory("preserve", os.fstat(fd))
    finally:
        os.close(fd)
