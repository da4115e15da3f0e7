# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of an IOAS's mappings: a file that its client writes, the kernel preserves, and khod reads in the next kernel.

Little-endian::

    0     char magic[8]     "khodioas"
    8     u32  version      1
    12    u32  ioas         number of the IOAS in the iommufd beside it: written anew by whoever makes the IOAS anew
    16    u64  count        records; ALL ONES while the table does not say what is mapped
    24    u32  names        bytes of names
    28    u32  huge pages   IOMMU_OPTION_HUGE_PAGES
    32    names             NUL-terminated "INSTANCE:DESCRIPTOR", up to byte 4096
    4096  records           32 bytes each, by ascending IOVA, none touching another that continues it:
                            u64 iova, u64 length, u64 offset in the file, u32 index of its name, u32 protection

Reading and writing take time linear in the number of records.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import NamedTuple

from khod.abi.iommufd import IOMMU_IOAS_MAP_READABLE, IOMMU_IOAS_MAP_WRITEABLE
from khod.errors import FormatError, InvalidRequest
from khod.folio.units import PAGE_SIZE

MAGIC, VERSION = b"khodioas", 1
HEAD = Struct("<8sIIQII")
RECORD = Struct("<QQQII")
FIRST = PAGE_SIZE
"""Where records begin."""
STALE = (1 << 64) - 1
_PROTECTIONS = (IOMMU_IOAS_MAP_READABLE, IOMMU_IOAS_MAP_READABLE | IOMMU_IOAS_MAP_WRITEABLE, IOMMU_IOAS_MAP_WRITEABLE)
_SPACE = 1 << 64


class Mapping(NamedTuple):
    """One range of IOVAs and what it leads to."""

    iova: int
    length: int
    offset: int
    """In the file."""
    file: int
    """Index into `Table.files`."""
    protection: int
    """IOMMU_IOAS_MAP_READABLE, _WRITEABLE, or both."""

    @property
    def end(self) -> int:
        """The first IOVA behind it."""
        return self.iova + self.length

    def __str__(self) -> str:
        return f"{self.iova:#x}-{self.end - 1:#x}"


@dataclass(frozen=True, slots=True)
class Table:
    """What is mapped in one IOAS."""

    ioas: int
    files: Sequence[tuple[str, str]]
    """Instance and descriptor of each file that mappings lead to."""
    mappings: Sequence[Mapping]
    huge_pages: bool = True


def file_size(records: int) -> int:
    """Bytes of a table with room for so many."""
    return FIRST + -(-records * RECORD.size // PAGE_SIZE) * PAGE_SIZE


def room(size: int) -> int:
    """How many records a table of so many bytes takes; negative if it is too short to be one."""
    return (size - FIRST) // RECORD.size


def merged(mappings: Iterable[Mapping]) -> list[Mapping]:
    """By ascending IOVA, with those made one that continue each other. Raises InvalidRequest where two overlap."""
    result: list[Mapping] = []
    for new in sorted(mappings):
        last = result[-1] if result else None
        if last is not None and new.iova < last.end:
            raise InvalidRequest(f"the mappings {last} and {new} overlap")
        if last is not None and continues(last, new):
            result[-1] = last._replace(length=last.length + new.length)
        else:
            result.append(new)
    return result


def continues(first: Mapping, second: Mapping) -> bool:
    """Whether both can be one."""
    return first.iova + first.length == second.iova and first.offset + first.length == second.offset and first[3:] == second[3:]


def hit(mappings: Sequence[Mapping], start: int, last: int) -> Mapping | None:
    """One of these, ascending, that has an IOVA of `start` to `last`."""
    at = bisect_right(mappings, last, key=lambda mapping: mapping.iova) - 1
    return mappings[at] if at >= 0 and mappings[at].end > start else None


def head(table: Table, count: int) -> bytes:
    """The first page; `count` is STALE while the records are not those of the table. Raises InvalidRequest for names that
    do not fit into it."""
    names = b"".join(f"{instance}:{descriptor}".encode() + b"\0" for instance, descriptor in table.files)
    if len(names) > FIRST - HEAD.size:
        raise InvalidRequest(f"mappings lead to {len(table.files)} files, whose names do not fit into a page")
    return HEAD.pack(MAGIC, VERSION, table.ioas, count, len(names), table.huge_pages) + names


def records(mappings: Sequence[Mapping]) -> bytes:
    """The records of merged mappings."""
    data = bytearray(RECORD.size * len(mappings))
    pack, at = RECORD.pack_into, 0
    for mapping in mappings:
        pack(data, at, *mapping)
        at += RECORD.size
    return bytes(data)


def read_head(data: bytes, size: int) -> tuple[Table, int]:
    """What the first page of a table of `size` bytes says, and how many records follow. Raises FormatError."""
    if len(data) < FIRST or data[:8] != MAGIC:
        raise FormatError("the file is no table of IOMMU mappings", hint="khod.client.iommu makes them")
    _, version, ioas, count, names, huge = HEAD.unpack_from(data)
    if version != VERSION:
        raise FormatError(f"the table of mappings has version {version}, and this khod reads {VERSION}")
    if count == STALE:
        raise FormatError("the table of mappings was being changed", hint="let changes end before the client says READY")
    if count > room(size):
        raise FormatError(f"the table of mappings says that it has {count} records, and has room for {room(size)}")
    if names > FIRST - HEAD.size or huge > 1:
        raise FormatError(f"the table of mappings has {names} bytes of names, {huge} for huge pages")
    raw = data[HEAD.size : HEAD.size + names]
    try:
        files = [tuple(name.split(":")) for name in raw.decode().split("\0")[:-1]]
    except UnicodeDecodeError:
        raise FormatError("the table of mappings has names that are not UTF-8") from None
    if (raw and raw[-1]) or any(len(parts) != 2 for parts in files):
        raise FormatError("the table of mappings has a name that is not INSTANCE:DESCRIPTOR")
    return Table(ioas, [(parts[0], parts[1]) for parts in files], (), bool(huge)), count


def read_records(data: bytes, files: int) -> list[Mapping]:
    """The mappings; `files` is how many names there are. Raises FormatError naming the record that is not what it must be."""
    result: list[Mapping] = []
    end = 0
    append, make = result.append, Mapping._make
    for number, raw in enumerate(RECORD.iter_unpack(data)):
        iova, length, offset, file, protection = raw
        if (
            (iova | length | offset) & (PAGE_SIZE - 1)
            or not length
            or iova < end
            or iova + length > _SPACE
            or offset + length > _SPACE
            or file >= files
            or protection not in _PROTECTIONS
        ):
            raise FormatError(
                f"record {number} of the table of mappings: {length:#x} bytes at {iova:#x}, from {offset:#x} of file {file},"
                f" protection {protection}, behind {end:#x}"
            )
        end = iova + length
        append(make(raw))
    return result
