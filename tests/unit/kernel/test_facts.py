# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.kernel.facts on a made-up /proc and /sys, and on this host."""

from __future__ import annotations

import gzip
import os
import re
from pathlib import Path

import pytest

from khod.errors import MachineError
from khod.folio.units import Range
from khod.kernel.facts import CAPABILITIES, KernelFactsReader
from khod.kernel.memory import KernelMemory
from tests import images

RELEASE = os.uname().release
OUT_FDT = b"\xd0\x0d\xfe\xed".ljust(0x4C, b"\0") + b"kho-v4\0\0" + bytes(100)  # cut off, as on 7.3
LUO = b"luo-v5\0\0" + bytes(24)


class Memory(KernelMemory):
    """Physical memory that holds a kernel's constants at 16 MiB and its data at 32 MiB."""

    def __init__(self, constants: bytes = b"", data: bytes = b"", *, closed: bool = False) -> None:
        super().__init__()
        self._there = {16 << 20: constants, 32 << 20: data}
        self._closed = closed

    def read(self, phys: int, length: int) -> bytes:
        if self._closed:
            raise MachineError("open /proc/kcore", errno=1)
        return self._there[phys].ljust(length, b"\0")

    def areas(self) -> tuple[Range, ...]:
        return (Range(0x2000000, 0x3000000), Range(0, 0))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "proc/cmdline", "kho=on liveupdate=on\n")
    put(tmp_path, "proc/self/status", "Name:\tkhod\nCapEff:\t000001ffffffffff\n")
    put(tmp_path, "proc/iomem", "01000000-01001fff : Kernel rodata\n  02000000-02000fff : Kernel data\n")
    put(tmp_path, "proc/sys/kernel/kexec_load_disabled", "0\n")
    put(tmp_path, "proc/sys/kernel/kexec_load_limit_reboot", "-1\n")
    put(tmp_path, "sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    put(tmp_path, "proc/config.gz", gzip.compress(b"CONFIG_KEXEC_HANDOVER=y\n# CONFIG_KEXEC_SIG is not set\n"))
    return tmp_path


def put(root: Path, path: str, content: str | bytes) -> None:
    at = root / path
    at.parent.mkdir(parents=True, exist_ok=True)
    at.write_bytes(content if isinstance(content, bytes) else content.encode())


def names(reader: KernelFactsReader) -> list[str]:
    return [str(f) for f in reader.facts().formats]


def test_what_is_set(root: Path) -> None:
    facts = KernelFactsReader(Memory(), root).facts()
    assert (facts.cmdline, facts.config) == ("kho=on liveupdate=on", {"CONFIG_KEXEC_HANDOVER": "y"})
    assert (facts.lockdown, facts.load_disabled, facts.loads_left) == ("integrity", False, None)
    assert (facts.lacking, facts.headroom, facts.debugfs) == ((), None, False)
    assert facts.scratch == (Range(0x2000000, 0x3000000), Range(0, 0))
    put(root, "proc/sys/kernel/kexec_load_disabled", "1\n")
    put(root, "proc/sys/kernel/kexec_load_limit_reboot", "0\n")
    put(root, "proc/self/status", "CapEff:\t0000000000200000\n")
    facts = KernelFactsReader(Memory(), root).facts()
    assert (facts.load_disabled, facts.loads_left) == (True, 0)
    assert facts.lacking == ("CAP_SYS_BOOT", "CAP_SYS_RAWIO")


def test_the_configuration_may_lie_in_boot(root: Path) -> None:
    (root / "proc/config.gz").unlink()
    assert KernelFactsReader(Memory(), root).facts().config is None
    put(root, f"boot/config-{RELEASE}", "CONFIG_LIVEUPDATE=y\n")
    assert KernelFactsReader(Memory(), root).facts().config == {"CONFIG_LIVEUPDATE": "y"}


def test_the_narrowest_limit_on_the_way_up(root: Path) -> None:
    put(root, "proc/self/cgroup", "0::/system.slice/khod.service\n")
    put(root, "proc/self/mountinfo", "30 23 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n")
    for group, most, high, now in (
        ("system.slice", "8192", "max", "5000"),
        ("system.slice/khod.service", "max", "4000", "1000"),
    ):
        for name, value in (("max", most), ("high", high), ("current", now)):
            put(root, f"sys/fs/cgroup/{group}/memory.{name}", value + "\n")
    facts = KernelFactsReader(Memory(), root).facts()
    assert facts.headroom == 3000
    assert facts.cgroup.endswith("khod.service/memory.high")


def test_formats_of_debugfs_and_of_the_kernel_s_own_memory(root: Path) -> None:
    put(root, "sys/kernel/debug/kho/out/fdt", OUT_FDT)
    put(root, "sys/kernel/debug/kho/out/sub_fdts/LUO", LUO)
    memory = Memory(b"\0kho-v4\0luo-v5\0memblock-v1\0", images.handler("memfd-v2"))
    reader = KernelFactsReader(memory, root)
    assert names(reader) == ["kho-v4", "luo-v5", "memblock-v1", "memfd-v2"]
    assert (reader.facts().formats_source, reader.facts().debugfs) == ("debugfs and its own memory", True)


def test_a_kernel_that_was_jumped_to_has_in_fdt(root: Path) -> None:
    """Which it accepted: it reads that format, and writes the same."""
    put(root, "sys/kernel/debug/kho/in/fdt", OUT_FDT)
    assert names(KernelFactsReader(Memory(closed=True), root)) == ["kho-v4"]


def test_without_kcore_the_image_is_asked_if_it_is_this_kernel_s(root: Path) -> None:
    put(root, f"boot/vmlinuz-{RELEASE}", images.bzimage(images.vmlinux(), release=RELEASE))
    reader = KernelFactsReader(Memory(closed=True), root)
    assert "memfd-v2" in names(reader)
    assert reader.facts().formats_source == f"/boot/vmlinuz-{RELEASE}"
    put(root, f"boot/vmlinuz-{RELEASE}", images.bzimage(images.vmlinux(), release="7.0.0"))
    assert names(KernelFactsReader(Memory(closed=True), root)) == []
    put(root, f"boot/vmlinuz-{RELEASE}", b"no kernel")
    assert names(KernelFactsReader(Memory(closed=True), root)) == []


def test_addresses_that_are_hidden_are_not_read(root: Path) -> None:
    put(root, "proc/iomem", "00000000-00000000 : Kernel rodata\n00000000-00000000 : Kernel data\n")
    assert names(KernelFactsReader(Memory(b"\0kho-v4\0"), root)) == []


def test_this_host_has_facts() -> None:
    facts = KernelFactsReader(KernelMemory()).facts()
    assert facts.cmdline == Path("/proc/cmdline").read_text().strip()
    assert facts.machine


def test_a_khod_under_systemd_lacks_nothing() -> None:
    """Its unit grants the capabilities that are checked."""
    unit = (Path(__file__).parents[3] / "systemd/khod.service").read_text()
    (granted,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.M)
    assert set(CAPABILITIES) <= set(granted.split())
