# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pages of a real handover, told to the host: from the first kernel the root, the map and the blobs; from the second,
before anybody opens /dev/liveupdate, the blocks of sessions and files that the first one wrote in reboot(2).

By the ports alone, without khod: what is captured is the kernel's."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from khod.inspect.live import Live
from khod.kernel.machine import machine
from tests.vm.guest import Guest

SESSION = "golden"
FILES = 70
"""63 in the first block, 7 in the second."""
PAGE = 4096
KHO = Path("/sys/kernel/debug/kho")


class Reads(Protocol):
    def read(self, phys: int, length: int) -> bytes: ...


def hexes(memory: Reads, addresses: Iterable[int]) -> dict[str, str]:
    """Pages without the zeros at their ends."""
    return {hex(at): memory.read(at, PAGE).rstrip(b"\0").hex() for at in addresses}


def nodes(memory: Reads, at: int, level: int = 5) -> list[int]:
    """Pages of the radix tree, by a walk of this file's own."""
    found = [at]
    if level:
        for child in struct.unpack("<512Q", memory.read(at, PAGE)):
            found += nodes(memory, child, level - 1) if child else []
    return found


def before(vm: Guest) -> None:
    ports = machine(vm.state)
    session = ports.liveupdate.create_session(SESSION)
    frames = []
    for token in range(FILES):
        fd = ports.files.memfd(f"file-{token}", PAGE * (1 + token % 2))
        ports.files.write(fd, 0, bytes([token + 1]) * PAGE)
        ports.liveupdate.preserve_fd(session, fd, token)
        frames.append([pfn for window in ports.frames.windows(fd) for pfn in window.pfns])
    live = Live()
    from khod.inspect.inspection import Look

    found = Look(live).inspection().outgoing
    assert found is not None, "no root was found"
    assert found.address
    cut = (KHO / "out/fdt").read_bytes()
    pages = hexes(live, [found.address, *(b.address for b in found.blobs), *nodes(live, found.map)])
    vm.record(
        "first", release=os.uname().release, version=Path("/proc/version").read_text().strip(),
        root=found.address, map=found.map, cut=cut.hex(), frames=frames, pages=pages,
    )  # fmt: skip
    (vm.state / "frames.json").write_text(json.dumps(frames))
    ports.kexec.load(ports.kexec.open(str(vm.kernel)))
    ports.filesystems.sync()
    ports.kexec.execute()


def find(live: Live) -> int:
    """The page of the session's block: its name at 16, in a list of one."""
    wanted = struct.pack("<QQ", 0, 1) + SESSION.encode() + bytes(8)
    for area in live.ram():
        for pfn in live.kernel_pages(area.start // PAGE, area.end // PAGE):
            if live.read(pfn * PAGE, len(wanted)) == wanted:
                return pfn * PAGE
    raise AssertionError("the block of sessions is not in memory")


def after(vm: Guest) -> None:
    live = Live()
    at = find(live)
    files, count = struct.unpack("<QQ", live.read(at + 16 + 64, 16))
    blocks, structs, kept = [at], [], []
    while files:
        blocks.append(files)
        following, entries = struct.unpack("<QQ", live.read(files, 16))
        structs += [struct.unpack("<Q", live.read(files + 16 + 64 * n + 48, 8))[0] for n in range(entries)]
        files = following
    for one in structs:
        chunk = struct.unpack("<Q", live.read(one + 32, 8))[0]
        kept += [one, chunk, struct.unpack("<Q", live.read(chunk + 8, 8))[0]]
    vm.record(
        "second", release=os.uname().release, sessions=at, count=count,
        fdt=(KHO / "in/fdt").read_bytes().hex(), metadata=(KHO / "in/sub_fdts/kexec-metadata").read_bytes().hex(),
        reserved=(KHO / "in/sub_fdts/memblock").read_bytes().hex(), pages=hexes(live, [*blocks, *kept]),
    )  # fmt: skip
