# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is set in the running kernel that decides about a jump, and which formats it writes: the port `RunningKernel`."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from khod.core.ports import KernelFacts, Memory
from khod.custodian import doubt
from khod.errors import FormatError, KhodError
from khod.folio.units import Range
from khod.kernel.memory import KernelMemory

if TYPE_CHECKING:
    from khod.abi.formats import Format

_MACHINES = {"x86_64": "x86-64", "aarch64": "arm64", "riscv64": "riscv"}
CAPABILITIES = {"CAP_SYS_BOOT": 22, "CAP_SYS_ADMIN": 21, "CAP_SYS_RAWIO": 17}
"""Bits (linux/capability.h) without which khod cannot load a kernel, see frames, read memory."""
_LIMIT = 256 << 20
"""Of a kernel's data, in memory."""


class KernelFactsReader:
    """The port `RunningKernel` of the running kernel. `root` holds proc, sys and boot."""

    def __init__(self, memory: KernelMemory, root: Path = Path("/")) -> None:
        self._memory, self._root = memory, root
        self._debugfs = root / "sys/kernel/debug/kho"

    def facts(self) -> KernelFacts:
        """See the port."""
        written, source = self._formats
        headroom, cgroup = self._headroom()
        return KernelFacts(
            machine=_MACHINES.get(os.uname().machine, os.uname().machine),
            cmdline=self._text("proc/cmdline"),
            config=self._config,
            lockdown=self._lockdown(),
            load_disabled=self._text("proc/sys/kernel/kexec_load_disabled") == "1",
            loads_left=self._loads_left(),
            debugfs=(self._debugfs / "out").is_dir(),
            lacking=self._lacking(),
            headroom=headroom,
            cgroup=cgroup,
            scratch=self._memory.areas(),
            formats=written,
            formats_source=source,
        )

    @functools.cached_property
    def _config(self) -> dict[str, str] | None:
        return kernel_config(self._root)

    def _lockdown(self) -> str:
        """'none [integrity] confidentiality' has the one that holds in brackets."""
        found = re.search(r"\[(\w+)\]", self._text("sys/kernel/security/lockdown"))
        return found[1] if found else ""

    def _loads_left(self) -> int | None:
        text = self._text("proc/sys/kernel/kexec_load_limit_reboot")
        return int(text) if text.isdecimal() else None  # -1 stands for no limit

    def _lacking(self) -> tuple[str, ...]:
        found = re.search(r"^CapEff:\s*([0-9a-f]+)$", self._text("proc/self/status"), re.M)
        effective = int(found[1], 16) if found else 0
        return tuple(name for name, bit in CAPABILITIES.items() if not effective >> bit & 1)

    def _headroom(self) -> tuple[int | None, str]:
        """The narrowest limit on memory on the way up from our control group."""
        try:
            limits = doubt.group_limits(f"{self._root}/".replace("//", "/"))
        except (OSError, ValueError):  # no control groups here
            return None, ""
        path, left = min(limits, key=lambda limit: limit[1], default=("", None))
        return (None if left is None else max(0, left)), path

    @functools.cached_property
    def _formats(self) -> tuple[tuple[Format, ...], str]:
        """What it writes does not change while it runs. Its two roots are said by debugfs, file handlers by nothing but the
        kernel's own data: in memory, or in its image."""
        from khod.abi import formats

        said = dict(_said(self._debugfs))
        source = ["debugfs"] if said else []
        try:
            areas = _kernel_data(self._memory, self._text("proc/iomem"))
            held = tuple(found for area in areas for found in formats.find(area))
            source += ["its own memory"] if held else []
        except KhodError:
            held = ()  # /proc/kcore is not to be read
        if not held:
            held = self._of_image()
            source += [f"/boot/vmlinuz-{os.uname().release}"] if held else []
        found = {*said.values(), *(f for f in held if f.name not in said)}
        return tuple(sorted(found)), " and ".join(source)

    def _of_image(self) -> tuple[Format, ...]:
        from khod.abi import kernel_image

        path = self._root / "boot" / f"vmlinuz-{os.uname().release}"
        try:
            if path.stat().st_size > kernel_image.MAX_FILE:
                return ()
            image = kernel_image.read(path.read_bytes())
        except (OSError, FormatError):
            return ()
        return image.formats if image.release == os.uname().release else ()

    def _text(self, path: str) -> str:
        try:
            return (self._root / path).read_text().strip()
        except OSError:
            return ""


def kernel_config(root: Path) -> dict[str, str] | None:
    """What the running kernel is built with, as `khod.abi.ikconfig` has it; None when nobody kept it."""
    import gzip  # not on the way to restored, as all that only this port needs

    from khod.abi import ikconfig

    try:
        return ikconfig.parse(gzip.decompress((root / "proc/config.gz").read_bytes()).decode())
    except OSError:
        try:
            return ikconfig.parse((root / "boot" / f"config-{os.uname().release}").read_text())
        except OSError:
            return None


def _said(debugfs: Path) -> Iterator[tuple[str, Format]]:
    """From out/fdt, which a kernel that came by a handover lacks: it has in/fdt, which it has accepted, and so reads and writes
    the same. out/fdt may be cut off, but not before the name (kernel/liveupdate/kexec_handover_debugfs.c)."""
    from khod.abi import formats

    for name, paths in ((formats.KHO, ("out/fdt", "in/fdt")), (formats.LUO, ("out/sub_fdts/LUO",))):
        for path in paths:
            try:
                blob = (debugfs / path).read_bytes()
            except OSError:
                continue
            if found := [f for f in formats.find(blob) if f.name == name]:
                yield name, found[-1]
                break


def _kernel_data(memory: Memory, iomem: str) -> Iterator[bytes]:
    """The running kernel's constants and data; nothing where they cannot be told from the rest. Raises KhodError."""
    total = 0
    for kind in ("Kernel rodata", "Kernel data"):
        for begin, end in re.findall(rf"^\s*([0-9a-f]+)-([0-9a-f]+) : {kind}$", iomem, re.M):
            area = Range(int(begin, 16), int(end, 16) + 1)
            total += area.end - area.start
            if area.start == 0 or total > _LIMIT:  # addresses are hidden from us, or make no sense
                return
            yield memory.read(area.start, area.end - area.start)
