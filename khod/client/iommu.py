# SPDX-License-Identifier: LGPL-2.1-or-later
"""IOMMU mappings that come through a jump: made and recorded in one call (`Iommu`), or recorded alone (`Record`).

The kernel tells nobody what is mapped in an IOAS. A client that wants its mappings carried writes them down in a table, a memfd
that it registers together with its iommufd with the driver `iommu`. The table is true at every moment or says that it is not: a
client that is caught in between fails its update.
"""

from __future__ import annotations

import fcntl
import os
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from typing import Self

from khod.abi import ioas_table, iommufd
from khod.abi.ioas_table import Table
from khod.client.answers import Claimed
from khod.errors import InvalidRequest

_COUNT_AT = 16
_MFD_EXEC = 0x10


class Record:
    """A table of mappings. Not for two threads at once."""

    def __init__(self, fd: int) -> None:
        """`fd` is one that `create` made, or that came through a jump; it is owned. Raises FormatError."""
        self.fd = fd
        size = os.fstat(fd).st_size
        head, count = ioas_table.read_head(os.pread(fd, ioas_table.FIRST, 0), size)
        self.room = ioas_table.room(size)
        self.ioas, self.huge_pages = head.ioas, head.huge_pages
        self._files = list(head.files)
        data = os.pread(fd, count * ioas_table.RECORD.size, ioas_table.FIRST)
        self._mappings = ioas_table.read_records(data, len(self._files))

    @classmethod
    def create(cls, ioas: int, room: int, *, huge_pages: bool = True) -> Self:
        """An empty one for an IOAS, with room for so many mappings that do not continue each other: it cannot grow."""
        fd = os.memfd_create("khod-ioas", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | _MFD_EXEC)
        try:
            os.ftruncate(fd, ioas_table.file_size(room))
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK)
            os.pwrite(fd, ioas_table.head(Table(ioas, (), (), huge_pages), 0).ljust(ioas_table.FIRST, b"\0"), 0)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    @property
    def mappings(self) -> list[ioas_table.Mapping]:
        """What is recorded, merged."""
        return list(self._mappings)

    def add(self, iova: int, length: int, instance: str, descriptor: str, offset: int, *, writable: bool = True) -> None:
        """Record that IOVAs lead to bytes of a descriptor of an instance. Raises InvalidRequest where they do already, and
        when there is no room."""
        name = (instance, descriptor)
        file = self._files.index(name) if name in self._files else len(self._files)
        protection = iommufd.IOMMU_IOAS_MAP_READABLE | (iommufd.IOMMU_IOAS_MAP_WRITEABLE if writable else 0)
        new = ioas_table.Mapping(iova, length, offset, file, protection)
        at = len(self._mappings)
        if at and self._mappings[-1] > new:  # most come in ascending order
            at = bisect_left(self._mappings, new)
        before = self._mappings[at - 1] if at else None
        after = self._mappings[at] if at < len(self._mappings) else None
        if (before and before.end > iova) or (after and after.iova < new.end):
            raise InvalidRequest(f"IOVAs {new} are recorded already")
        first, last = at, at
        if before and ioas_table.continues(before, new):
            first, new = at - 1, before._replace(length=before.length + length)
        if after and ioas_table.continues(new, after):
            last, new = at + 1, new._replace(length=new.length + after.length)
        self._replace(first, last, [new], [*self._files, name] if file == len(self._files) else self._files)

    def remove(self, iova: int, length: int) -> None:
        """Record that these IOVAs lead nowhere any more. Raises InvalidRequest unless all of them are recorded."""
        end = iova + length
        first = bisect_right(self._mappings, iova, key=lambda m: m.iova) - 1
        last, at, left = max(first, 0), iova, []
        while at < end:
            found = self._mappings[last] if 0 <= last < len(self._mappings) else None
            if found is None or not found.iova <= at < found.end:
                raise InvalidRequest(f"IOVAs from {at:#x} are not recorded")
            if found.iova < iova:
                left.append(found._replace(length=iova - found.iova))
            if found.end > end:
                cut = end - found.iova
                left.append(found._replace(iova=end, length=found.length - cut, offset=found.offset + cut))
            at, last = found.end, last + 1
        self._replace(max(first, 0), last, left, self._files)

    def _replace(self, first: int, last: int, new: list[ioas_table.Mapping], files: list[tuple[str, str]]) -> None:
        """Put `new` in the place of some, and write whatever moves by it."""
        count = len(self._mappings) - (last - first) + len(new)
        if count > self.room:
            raise InvalidRequest(f"the table has room for {self.room} mappings", hint="create it with more")
        head = ioas_table.head(Table(self.ioas, files, (), self.huge_pages), ioas_table.STALE) if files != self._files else b""
        self._files, self._mappings[first:last] = files, new
        os.pwrite(self.fd, b"\xff" * 8, _COUNT_AT)
        if head:
            os.pwrite(self.fd, head, 0)
        changed = self._mappings[first : first + len(new) if last - first == len(new) else None]
        data = memoryview(ioas_table.records(changed))
        at = ioas_table.FIRST + first * ioas_table.RECORD.size
        while data:
            done = os.pwrite(self.fd, data, at)
            data, at = data[done:], at + done
        os.pwrite(self.fd, count.to_bytes(8, "little"), _COUNT_AT)

    def close(self) -> None:
        """Close the table."""
        os.close(self.fd)


class Iommu:
    """An iommufd with one IOAS, and its record. Owns both descriptors. Not for two threads at once."""

    def __init__(self, fd: int, record: Record) -> None:
        self.fd, self.record = fd, record

    @classmethod
    def create(cls, room: int = 4096) -> Self:
        """A new one, with room for so many mappings. Raises OSError where there is no /dev/iommu."""
        fd = os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
        try:
            answer = iommufd.ioas_alloc()
            fcntl.ioctl(fd, iommufd.IOMMU_IOAS_ALLOC, answer)
            return cls(fd, Record.create(iommufd.ioas_of(answer), room))
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def claimed(cls, claimed: Claimed) -> Self:
        """The one that came through, mapped as it was. What it pins is this process's from now on."""
        fd = claimed.take("iommufd")
        try:
            fcntl.ioctl(fd, iommufd.IOMMU_IOAS_CHANGE_PROCESS, iommufd.change_process())
            return cls(fd, Record(claimed.take("table")))
        except BaseException:
            os.close(fd)
            raise

    @property
    def fds(self) -> Mapping[str, int]:
        """What to register with the driver `iommu`."""
        return {"iommufd": self.fd, "table": self.record.fd}

    @property
    def ioas(self) -> int:
        """The number to attach devices to: it may be another one after a jump."""
        return self.record.ioas

    def map(
        self, iova: int, length: int, instance: str, descriptor: str, fd: int, offset: int = 0, *, writable: bool = True
    ) -> None:
        """Map bytes of a file, which is registered as a descriptor of an instance, at this IOVA, and record it. Raises OSError
        and InvalidRequest; then it is neither mapped nor recorded."""
        self.record.add(iova, length, instance, descriptor, offset, writable=writable)
        protection = iommufd.IOMMU_IOAS_MAP_READABLE | (iommufd.IOMMU_IOAS_MAP_WRITEABLE if writable else 0)
        try:
            asked = iommufd.map_file(self.ioas, fd, offset, length, iova, protection)
            fcntl.ioctl(self.fd, iommufd.IOMMU_IOAS_MAP_FILE, asked)
        except BaseException:
            self.record.remove(iova, length)
            raise

    def unmap(self, iova: int, length: int) -> None:
        """Unmap whole mappings, as they were made (after a jump: as they were merged), and forget them. Raises OSError."""
        fcntl.ioctl(self.fd, iommufd.IOMMU_IOAS_UNMAP, iommufd.unmap(self.ioas, iova, length))
        self.record.remove(iova, length)

    def close(self) -> None:
        """Close both: what is mapped is unmapped when nobody else has the iommufd."""
        os.close(self.fd)
        self.record.close()
