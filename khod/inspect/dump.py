# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory in a file: an ELF core with physical addresses (vmcore, a copy of /proc/kcore), or bytes from an address on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from struct import Struct

from khod.errors import FormatError, InvalidRequest
from khod.folio.units import PAGE_SIZE, PHYS_BITS, Range, merged
from khod.inspect.source import Deadline, trees_in
from khod.kernel.memory import Segment, read_segments

_EHDR = Struct("<16sHHIQQQIHHHHHH")
_PHDR = Struct("<IIQQQQQQ")
_IDENT = b"\x7fELF\x02\x01\x01"
_PT_LOAD, _ET_CORE = 1, 4
MAX_SEGMENTS = 0xFFFF
NO_ADDRESS = (1 << 64) - 1
"""p_paddr of what is not memory, in /proc/kcore."""
_COMPRESSED = (b"KDUMP   ", b"makedumpfile")


class Dump:
    """The source that a file is. `base` is the address of its first byte when it has no headers; the file stays open."""

    live, hands_over, incoming_address = False, True, 0

    def __init__(self, path: Path, base: int | None = None) -> None:
        self.name = str(path)
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise InvalidRequest(f"open {path}: {error.strerror}")
        try:
            self._segments = self._read_segments(base)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def _read_segments(self, base: int | None) -> Sequence[Segment]:
        size = os.fstat(self._fd).st_size
        head = os.pread(self._fd, _EHDR.size, 0)
        if base is not None:
            if base < 0 or base % PAGE_SIZE or base + size > 1 << PHYS_BITS:
                raise InvalidRequest(f"{base:#x} is no address that memory begins at", hint="--base is a multiple of 4096")
            return (Segment(base, base + size, 0),)
        if head.startswith(_COMPRESSED):
            raise FormatError(
                f"{self.name}: a compressed dump",
                hint="makedumpfile -E makes an ELF file of it, makedumpfile -R first where it was flattened",
            )
        if len(head) < _EHDR.size or not head.startswith(_IDENT):
            raise FormatError(
                f"{self.name}: no ELF file of 64 bits", hint="for bytes without headers say with --base where they begin"
            )
        fields = _EHDR.unpack(head)
        kind, table, entry, count = fields[1], fields[5], fields[9], fields[10]
        if kind != _ET_CORE or entry != _PHDR.size or not 0 < count < MAX_SEGMENTS:
            raise FormatError(
                f"{self.name}: an ELF file of type {kind} with {count} program headers of {entry} bytes: no dump of memory"
            )
        headers = os.pread(self._fd, entry * count, table) if table < size else b""
        if len(headers) != entry * count:
            raise FormatError(f"{self.name}: its program headers end beyond the file's {size} bytes")
        found = []
        for segment, _, offset, _, phys, in_file, _, _ in _PHDR.iter_unpack(headers):
            if segment == _PT_LOAD and phys != NO_ADDRESS and in_file:
                # What a full disk cut off is not there; the rest of the file is.
                end = phys + min(in_file, max(0, size - offset))
                if end > 1 << PHYS_BITS:
                    raise FormatError(f"{self.name}: a segment ends at {end:#x}, beyond physical memory")
                found.append(Segment(phys, end, offset))
        if not found:
            raise FormatError(f"{self.name}: no memory with physical addresses is in it")
        return sorted(found, key=lambda s: s.start - s.end)

    def read(self, phys: int, length: int) -> bytes:
        """See PhysicalMemory."""
        return read_segments(self._fd, self._segments, phys, length, self.name)

    def ram(self) -> tuple[Range, ...]:
        """What is in the file."""
        spans = ((-(-s.start // PAGE_SIZE) * PAGE_SIZE, s.end // PAGE_SIZE * PAGE_SIZE) for s in self._segments)
        return merged(Range(start, end) for start, end in spans if start < end)

    def scratch(self) -> tuple[Range, ...]:
        """Nothing in a dump says where it was."""
        return ()

    def trees(self, deadline: Deadline) -> Iterator[int]:
        """See Source."""
        return trees_in(self, self.ram(), deadline)

    def kernel_pages(self, start: int, end: int) -> Iterator[int]:
        """All of them: nothing in a dump says whose a page is."""
        return iter(range(start, end))

    def said(self, path: str) -> bytes | None:
        """Nothing: there is no debugfs."""
        return None
