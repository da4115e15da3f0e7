# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod and khoctl inside the lab's machine, run as a user runs them; and witnesses that share no code with khod."""

from __future__ import annotations

import os
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator
from mmap import MAP_SHARED, PROT_READ, mmap
from pathlib import Path
from typing import Any

from khod.rehearsal import inside
from tests.vm.content import PAGE
from tests.vm.guest import Guest


class Khod(inside.Khod):
    """The daemon, with settings of a test's own, and khoctl."""

    def __init__(self, vm: Guest, *, plugins: str = "", **settings: Any) -> None:
        environment = {"PYTHONPATH": f"{os.environ['PYTHONPATH']}:{plugins}"} if plugins else {}
        super().__init__(vm, {"reserve": "16M", **settings}, environment)

    def ctl(self, *words: str, status: int = 0) -> str:
        """Run khoctl as a process of its own, which must exit with `status`; what it printed.

        Forked, not executed: its imports take seconds under emulation and are the same every time.
        """
        from khod.cli import main

        inward, outward = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(outward, 1)
            os.dup2(outward, 2)
            sys.argv = ["khoctl", "--socket", str(inside.SOCKET), *words]
            code: object = 1
            try:
                main()
            except SystemExit as end:
                code = end.code
            finally:
                sys.stdout.flush()
                os._exit(code if isinstance(code, int) else 0)
        os.close(outward)
        with open(inward, "rb") as pipe:
            said = pipe.read().decode()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code == status, f"khoctl {words}: {code}\n{said}"
        return said

    def frames_of(self, name: str) -> list[int]:
        """Frames behind khod's own memfds 'khod-map' and 'khod-tree' (or 'khod-state-X'), seen from outside of khod."""
        directory = Path(f"/proc/{self.process.pid}/fd")
        for link in directory.iterdir():
            if name in str(link.readlink()):
                fd = os.open(link, os.O_RDONLY)
                try:
                    return pagemap(fd)
                finally:
                    os.close(fd)
        raise FileNotFoundError(f"khod has no {name}")

    def unnamed(self) -> list[list[int]]:
        """Frames of every memfd of khod's that came through a jump: the kernel gives them back without their names."""
        found = []
        seen = set()
        for link in Path(f"/proc/{self.process.pid}/fd").iterdir():
            if str(link.readlink()) == "/ (deleted)":
                fd = os.open(link, os.O_RDONLY)
                if (inode := os.fstat(fd).st_ino) not in seen:
                    seen.add(inode)
                    found.append(pagemap(fd))
                os.close(fd)
        return found


def pagemap(fd: int) -> list[int]:
    """Frame of every page of a file, by /proc/self/pagemap. An own mapping, populated by touching each page."""
    size = os.fstat(fd).st_size
    if size == 0:
        return []
    with mmap(fd, size, MAP_SHARED, PROT_READ) as memory:
        madvise_populate(memory)
        address = address_of(memory)
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            entries = array("Q")
            pages = -(-size // PAGE)
            entries.frombytes(os.pread(file.fileno(), 8 * pages, address // PAGE * 8))
    frames = [entry & (1 << 55) - 1 for entry in entries]
    assert len(frames) == pages
    assert all(frames), "a page without a frame"
    return frames


def madvise_populate(memory: mmap) -> None:
    """MADV_POPULATE_READ (linux/mman.h)."""
    memory.madvise(22)


def address_of(memory: mmap) -> int:
    """Where a read-only mapping lies: the newest line of /proc/self/maps that maps this file would do, ctypes is surer."""
    import ctypes

    class Buffer(ctypes.Structure):
        _fields_ = (
            ("buf", ctypes.c_void_p),
            ("obj", ctypes.py_object),
            ("rest", ctypes.c_byte * 80),
        )

    view = Buffer()
    api = ctypes.pythonapi
    api.PyObject_GetBuffer(ctypes.py_object(memory), ctypes.byref(view), 0)
    address = int(view.buf or 0)
    api.PyBuffer_Release(ctypes.byref(view))
    return address


def page_flags() -> array[int]:
    """/proc/kpageflags, whole: page after page is a system call each."""
    words = array("Q")
    with open("/proc/kpageflags", "rb", buffering=0) as file:
        while part := file.read(1 << 22):
            words.frombytes(part)
    return words


def orders(frames: Iterable[int], flags: array[int]) -> set[tuple[int, int]]:
    """The folios that these frames belong to, as (first frame, order): head bit 15, tail bit 16 (linux/kernel-page-flags.h)."""
    head, tail = 1 << 15, 1 << 16
    compound = head | tail
    found: set[tuple[int, int]] = set()
    for pfn in frames:
        if not flags[pfn] & compound:
            found.add((pfn, 0))
            continue
        while not flags[pfn] & head:
            pfn -= 1
        end = pfn + 1
        while flags[end] & tail:
            end += 1
        found.add((pfn, (end - pfn).bit_length() - 1))
    return found


class Kcore:
    """Physical memory through /proc/kcore: the program headers that have a physical address say where it is."""

    def __init__(self) -> None:
        self._file = open("/proc/kcore", "rb", buffering=0)  # noqa: SIM115  # as long as the object
        head = self._file.read(64)
        offset, size, count = struct.unpack_from("<Q", head, 32)[0], *struct.unpack_from("<HH", head, 54)
        self._segments = []
        for index in range(count):
            raw = os.pread(self._file.fileno(), size, offset + index * size)
            kind, _, at, _, phys, length = struct.unpack_from("<IIQQQQ", raw)
            if kind == 1 and phys != (1 << 64) - 1:
                self._segments.append((phys, length, at))

    def read(self, phys: int, length: int) -> bytes:
        for start, size, at in self._segments:
            if start <= phys and phys + length <= start + size:
                return os.pread(self._file.fileno(), length, at + phys - start)
        raise ValueError(f"{phys:#x} is not in RAM")


def walk(memory: Kcore, address: int) -> Iterator[tuple[int, int]]:
    """Every folio of a map, as (first frame, order), straight from the specification: chunk, elements, bits."""
    while address:
        page = memory.read(address, PAGE)
        order, count, following = struct.unpack_from("<IIQ", page)
        for element in range(count):
            start, bitmap = struct.unpack_from("<QQ", page, 16 + 16 * element)
            bits = int.from_bytes(memory.read(bitmap, 512), "little")
            for index, digit in enumerate(reversed(f"{bits:b}")):
                if digit == "1":
                    yield (start >> 12) + (index << order), order
        address = following
