# SPDX-License-Identifier: LGPL-2.1-or-later
"""Every decoder of foreign bytes under mutations that a seed determines: it raises its own errors, and comes to an end.

A few thousand of each take less than a minute in all; a million of each are for the night:
``pytest -m full tests/unit/test_abi_mutations.py``.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import struct
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path
from random import Random
from typing import NamedTuple

import lz4.block
import lzallright
import msgspec
import pytest
from backports import zstd

from khod.abi import (
    bzimage,
    cmdline,
    compression,
    fleet,
    kernel_image,
    kexec_handover,
    kexec_metadata,
    luo,
    luo_older,
    memblock,
)
from khod.abi.fdt_door import RawNode, flatten
from khod.errors import FormatError, InvalidRequest
from khod.inspect.difference import difference, load
from khod.inspect.dump import Dump
from khod.inspect.inspection import Look, Wishes
from khod.inspect.owners import address
from khod.inspect.picture import draw, svg
from tests import images
from tests.handover import Made, Memory, everything, luo_blob, region, root
from tests.unit.test_abi_luo_older import VERSIONS
from tests.unit.test_inspect import Shown, elf

KERNEL = images.vmlinux(fill=256, versions=["luo-v5", "memfd-v2"])
LIMIT = 1 << 20


def lz4_legacy(data: bytes) -> bytes:
    block: bytes = lz4.block.compress(data, store_size=False)
    return b"\x02\x21\x4c\x18" + struct.pack("<I", len(block)) + block


def lzop(data: bytes) -> bytes:
    block = lzallright.LZOCompressor().compress(data)
    head = struct.pack(">HHHBBIIIIB", 0x1040, 0x20A0, 0x0940, 3, 9, 1, 0o100644, 0, 0, 0) + bytes(4)
    return b"\x89LZO\0\r\n\x1a\n" + head + struct.pack(">III", len(data), len(block), 0) + block + bytes(4)


STREAMS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, mtime=0),
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "lz4": lz4_legacy,
    "lzo": lzop,
    "zstd": zstd.compress,
}


class Target(NamedTuple):
    """Bytes, and what reads them. `many` in a quick run take some seconds."""

    data: bytes
    read: Callable[[bytes], object]
    many: int


def image(data: bytes) -> object:
    bzimage.signature(data)
    return kernel_image.read(data)


def pe() -> bytes:
    """An image with a PE header, as one with an EFI stub has."""
    made = bytearray(images.bzimage(KERNEL, "gzip", packed=gzip.compress(KERNEL, mtime=0)))
    made[:2], made[0x3C:0x40] = b"MZ", struct.pack("<I", 0x40)
    made[0x40:0x44], made[0x58:0x5A] = b"PE\0\0", b"\x0b\x02"
    return bytes(made)


def _older(name: str) -> Target:
    memory = Memory()
    return Target(VERSIONS[name](memory), lambda data: luo_older.decode(memory, data), 20_000)


def _look_again(data: bytes) -> None:
    view = load(data, "x")
    svg(draw(view))
    address(view, None, 0x4000000)
    difference(view, view)


def _dump() -> Target:
    """The headers of a dump, and an inspection of what it maps."""
    fd = os.memfd_create("dump")
    path = Path(f"/proc/self/fd/{fd}")

    def read(data: bytes) -> None:
        os.ftruncate(fd, 0)
        os.pwrite(fd, data, 0)
        with closing(Dump(path)) as dump:
            Look(dump, Wishes(seconds=1)).inspection()

    return Target(elf([(0x1000, flatten(root()).ljust(4096, b"\0")), (0x9000, bytes(4096))]), read, 5_000)


TARGETS: dict[str, Target] = {
    "image": Target(pe(), image, 10_000),
    "vmlinux": Target(KERNEL, kernel_image.read, 20_000),
    "root": Target(flatten(root()), kexec_handover.decode, 40_000),
    "memblock": Target(flatten(RawNode("", {"compatible": b"memblock-v1\0"}, (region(),))), memblock.decode, 60_000),
    "metadata": Target(struct.pack("=I65sI", 1, b"7.3.4", 2), kexec_metadata.decode, 50_000),
    "luo": Target(luo_blob(0x1000, 0x2000, b"luo-v5;block-v1"), luo.decode, 50_000),
    **{f"luo {name}": _older(name) for name in VERSIONS},
    "dump": _dump(),
    "inspection": Target(msgspec.json.encode(Look(Shown(Made(serialised=True))).inspection()), _look_again, 5_000),
    "cmdline": Target(b'root=/dev/vda kho=on hugepagesz=1G hugepages=2 a="b c" --', lambda d: _options(d), 40_000),
    "fleet": Target(b"fleet: front\nformats: [kho-v4, luo-v5]\n", lambda d: fleet.parse(d, "fleet.yaml"), 10_000),
    **{name: Target(pack(KERNEL), lambda data: compression.decompress(data, LIMIT), 30_000) for name, pack in STREAMS.items()},
}


def _options(data: bytes) -> None:
    line = cmdline.parse(data.decode("latin-1"))
    line.huge_pages()
    line.flag("kho", default=False)


def mutated(data: bytes, random: Random) -> bytes:
    """A few bytes changed, a number put somewhere, a piece left out or doubled, or the end cut off."""
    out = bytearray(data)
    for _ in range(random.randint(1, 6)):
        at = random.randrange(len(out))
        match random.randrange(6):
            case 0 | 1:
                out[at] = random.randrange(256)
            case 2:
                out[at] ^= 1 << random.randrange(8)
            case 3:
                size = random.choice((2, 4, 8))
                value = random.choice((0, 1, -1, len(data), len(data) - at)) & (1 << 8 * size) - 1
                out[at : at + size] = value.to_bytes(size, "little")
            case 4:
                piece = bytes(out[at : at + random.randint(1, 64)])
                out[at:at] = piece
            case _:
                del out[at : at + random.randint(1, 64)]
                out = out or bytearray(1)
    return bytes(out[: random.randrange(len(out)) + 1] if random.randrange(8) == 0 else out)


def play(name: str, count: int) -> None:
    target, random = TARGETS[name], Random(name)
    for _ in range(count):
        data = mutated(target.data, random)
        with suppress(FormatError, InvalidRequest):
            target.read(data)


def play_memory(count: int) -> None:
    """The structures that lead through memory: bytes of any page, addresses above all."""
    random, memory = Random("memory"), Memory()
    readers = everything(memory)
    pages = list(memory.pages)
    for _ in range(count):
        changed: dict[int, bytes] = {}
        for _ in range(random.randint(1, 6)):
            page = random.choice(pages)
            changed.setdefault(page, bytes(memory.pages[page]))
            value = random.choice((0, 1, random.choice(pages), random.getrandbits(64), random.getrandbits(12), 0x900000))
            memory.set(page + 8 * random.randrange(random.choice((4, 16, 512))), value)
        for reader in readers:
            with suppress(FormatError):
                reader()
        for page, before in changed.items():
            memory.pages[page][:] = before
    for reader in readers:
        reader()


def test_what_is_mutated_is_readable_before() -> None:
    for name, target in TARGETS.items():
        target.read(target.data)
        assert name not in STREAMS or compression.decompress(target.data, LIMIT) == KERNEL


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_few(name: str) -> None:
    play(name, TARGETS[name].many)


@pytest.mark.slow
def test_a_few_memories() -> None:
    play_memory(5_000)


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TARGETS)
def test_a_million(name: str) -> None:
    play(name, 1_000_000)


@pytest.mark.full
@pytest.mark.timeout(3600)
def test_a_million_memories() -> None:
    play_memory(1_000_000)
