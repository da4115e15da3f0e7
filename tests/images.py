# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel images made for tests: ELF files with the strings that a kernel has, packed by the programs that pack kernels."""

from __future__ import annotations

import gzip
import shutil
import struct
import subprocess
from collections.abc import Iterable

PROGRAMS = {
    "gzip": ["gzip", "-n", "-9", "-c"],
    "bzip2": ["bzip2", "-9", "-c"],
    "xz": ["xz", "--check=crc32", "--x86", "--lzma2=dict=1MiB", "-c"],
    "lzma": ["xz", "--format=lzma", "-6", "-c"],
    "lz4": ["lz4", "-l", "-9", "-c"],
    "lzo": ["lzop", "-9", "-c"],
    "zstd": ["zstd", "-19", "-q", "-c"],
}
"""As scripts/Makefile.lib calls them."""
KHO = ("kho-v4", "luo-v5", "memblock-v1", "reserve-mem-v1")
SETUP = 0x4000
PAYLOAD = 0x2C4


def handler(name: str) -> bytes:
    """A struct liveupdate_file_handler as it lies in .data."""
    return struct.pack("<Q48s16x", 0xFFFFFFFF81A43D40, name.encode())


def vmlinux(
    strings: Iterable[str] = KHO,
    handlers: Iterable[str] = ("memfd-v2",),
    *,
    release: str = "7.3.4",
    config: str | None = "CONFIG_KEXEC_HANDOVER=y\nCONFIG_LIVEUPDATE=y\nCONFIG_LIVEUPDATE_MEMFD=y\n",
    versions: Iterable[str] | None = None,
    machine: int = 62,
    fill: int = 1 << 16,
) -> bytes:
    """An uncompressed kernel: two segments, and sections of which one may be .liveupdate_versions."""
    rodata = b"\0".join([f"Linux version {release} (who@where) ".encode(), *(s.encode() for s in strings), b""])
    data = b"".join(map(handler, handlers)) + bytes(range(256)) * (fill // 256)
    if config is not None:
        data += b"IKCFG_ST" + gzip.compress(config.encode(), mtime=0) + b"IKCFG_ED"
    listed = b""
    if versions is not None:
        listed = struct.pack("<II", 0x4C565550, 1) + b"".join(struct.pack("48s", v.encode()) for v in versions)
    names = b"\0.rodata\0.data\0.liveupdate_versions\0.shstrtab\0"
    bodies = [(b".rodata", rodata), (b".data", data), (b".liveupdate_versions", listed), (b".shstrtab", names)]
    out, at, sections = bytearray(0x1000), 0x1000, [bytes(64)]
    for name, body in bodies:
        if name == b".liveupdate_versions" and versions is None:
            continue
        sections.append(struct.pack("<IIQQQQIIQQ", names.index(name), 1, 2, 0, at, len(body), 0, 0, 1, 0))
        out += body
        at += len(body)
    segments = [(0x1000, len(rodata)), (0x1000 + len(rodata), len(data))]
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    head = struct.pack(
        "<16sHHIQQQIHHHHHH", ident, 2, machine, 1, 0, 64, at, 0, 64, 56, len(segments), 64, len(sections), len(sections) - 1
    )
    head += b"".join(struct.pack("<IIQQQQQQ", 1, 5, where, 0, 0, size, size, 0x1000) for where, size in segments)
    out[: len(head)] = head
    return bytes(out) + b"".join(sections)


def pack(kernel: bytes, method: str) -> bytes:
    """Compressed by the program itself. Raises FileNotFoundError where it is not installed."""
    program = PROGRAMS[method]
    if shutil.which(program[0]) is None:
        raise FileNotFoundError(program[0])
    return subprocess.run(program, input=kernel, capture_output=True, check=True, timeout=60).stdout


def bzimage(
    kernel: bytes, method: str = "gzip", *, packed: bytes | None = None, init_size: int | None = None, release: str = "7.3.4"
) -> bytes:
    """A bzImage around it, laid out as the build lays it out: the size behind all but gzip's stream."""
    stream = pack(kernel, method) if packed is None else packed
    payload = stream if method == "gzip" else stream + struct.pack("<I", len(kernel))
    head = bytearray(SETUP)
    head[0x1F1] = SETUP // 512 - 1
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    head[0x211] = 1
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<H", head, 0x20E, 0x300)
    struct.pack_into("<I", head, 0x230, 2 << 20)
    struct.pack_into("<H", head, 0x236, 0x7F)
    struct.pack_into("<I", head, 0x238, 2047)
    struct.pack_into("<II", head, 0x248, PAYLOAD, len(payload))
    struct.pack_into("<Q", head, 0x258, 16 << 20)
    struct.pack_into("<I", head, 0x260, len(kernel) + (1 << 20) if init_size is None else init_size)
    text = f"{release} (who@where) #1\0".encode()
    head[0x500 : 0x500 + len(text)] = text
    return bytes(head) + bytes(PAYLOAD) + payload + b"the rest of the 64-bit part"
