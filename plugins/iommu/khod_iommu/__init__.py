# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver for IOMMU mappings: an IOAS of an iommufd, carried as a table of what is mapped in it.

An instance is an iommufd and a table (`khod.abi.ioas_table`), a memfd in which its client records every mapping: the kernel
tells nobody what is mapped. The kernel preserves the table. Where it preserves iommufds as well, that is all. Where it does
not, the iommufd is made anew, with the same IOVAs leading to the same bytes of the memfds of those instances that the table
names, which this one therefore requires.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from khod.abi import cells, ioas_table
from khod.abi.ioas_table import Table
from khod.core.devices import IovaRange
from khod.core.driver import Continuity, Strategy
from khod.core.ports import Files, Machine
from khod.errors import DeviceUnusable, FormatError, InvalidRequest, KhodError, Refused
from khod.plugin import Declaration, Instance, Preserve, Request, hookimpl, probing

COMPATIBLE = "khod,iommu-v1"
IOMMUFD, TABLE = "iommufd", "table"
_IOAS_AT = 12
_DIFFERENT = "the reserved ranges of this kernel or its IOMMU differ from those of the one before; nothing was mapped"
RANGES = 32
"""The most that are noted of what may be mapped, for the message when it may be no longer."""


@hookimpl
def khod_compatible() -> str:
    """The string of this version's nodes."""
    return COMPATIBLE


@hookimpl
def khod_declare(machine: Machine, request: Request) -> Declaration:
    """Accept an iommufd with its table."""
    if set(request.fds) != {IOMMUFD, TABLE}:
        raise InvalidRequest(f"{request.name}: descriptors '{IOMMUFD}' and '{TABLE}' are wanted, not {sorted(request.fds)}")
    if request.options:
        raise InvalidRequest(f"{request.name}: iommu takes no options, {sorted(request.options)} given")
    if (kind := machine.files.stat(request.fds[IOMMUFD]).kind) != "iommufd":
        raise Refused(f"{request.name}: descriptor '{IOMMUFD}' is a {kind} file", hint="give a descriptor of /dev/iommu")
    fd = request.fds[TABLE]
    if (kind := machine.files.stat(fd).kind) != "memfd":
        raise Refused(f"{request.name}: descriptor '{TABLE}' is a {kind} file", hint="give the memfd of khod.client.iommu")
    try:
        table, _ = read_head(machine.files, fd)
    except FormatError as error:
        raise Refused(f"{request.name}: {error.message}", hint=error.hint)
    return Declaration(
        compatible=COMPATIBLE,
        fds=(Preserve(TABLE, fd),),
        properties={
            "mappings": cells.u64(0),
            "mapped-bytes": cells.u64(0),
            "iova-ranges": cells.u64s([0] * 2 * RANGES),
        },
        requires=tuple(dict.fromkeys(instance for instance, _ in table.files)),
        size=machine.files.stat(fd).size,
        made=(IOMMUFD,),
        strategy=Strategy.CARRIED,
        continuity=Continuity.REBUILT,
        unsettled=True,
    )


@hookimpl
def khod_settle(instance: Instance, declared: Declaration) -> Declaration | None:
    """As it is where the kernel preserves iommufds, and everything that is mapped comes through as it is: what is mapped
    otherwise is not there any more."""
    machine = instance.machine
    if instance.anew or not probing.native(machine, lambda: machine.files.specimen("iommufd")):
        return None
    return replace(
        declared,
        fds=(*declared.fds, Preserve(IOMMUFD, instance.fds[IOMMUFD], folios=False)),
        made=(),
        strategy=Strategy.NATIVE,
        continuity=Continuity.PRESERVED,
    )


def read_head(files: Files, fd: int) -> tuple[Table, int]:
    """The head of a table, and how many records follow. Raises FormatError."""
    return ioas_table.read_head(files.read(fd, 0, ioas_table.FIRST), files.stat(fd).size)


def read_table(files: Files, fd: int) -> Table:
    """All of a table. Raises FormatError."""
    head, count = read_head(files, fd)
    data = files.read(fd, ioas_table.FIRST, count * ioas_table.RECORD.size)
    return Table(head.ioas, head.files, ioas_table.read_records(data, len(head.files)), head.huge_pages)


def memory(instance: Instance, table: Table) -> list[int]:
    """The descriptor behind each of the table's files; every mapping lies inside its file. Raises FormatError."""
    fds = []
    for owner, name in table.files:
        if name not in instance.required.get(owner, {}):
            raise FormatError(
                f"{instance.name}: mappings lead to {name!r} of {owner}, which is not among what it requires",
                hint="register it again: what its table names at that moment is what it requires",
            )
        fds.append(instance.required[owner][name])
    sizes = [instance.machine.files.stat(fd).size for fd in fds]
    for mapping in table.mappings:
        if mapping.offset + mapping.length > sizes[mapping.file]:
            owner, name = table.files[mapping.file]
            raise FormatError(
                f"{instance.name}: IOVAs {mapping} lead to bytes from {mapping.offset:#x} of {name!r} of {owner}, which has"
                f" {sizes[mapping.file]:#x}"
            )
    return fds


@hookimpl
def khod_check(instance: Instance) -> Sequence[str]:
    """The table can be read, is of an IOAS that there is, and leads to nothing that does not come along."""
    try:
        table = read_table(instance.machine.files, instance.fds[TABLE])
        memory(instance, table)
        instance.machine.devices.iova_ranges(instance.fds[IOMMUFD], table.ioas)
    except KhodError as error:
        return [f"{instance.name}: {error}"]
    return []


@hookimpl
def khod_freeze(instance: Instance) -> Mapping[str, bytes]:
    """The last state of the table: devices stand still, and so does who maps."""
    table = read_table(instance.machine.files, instance.fds[TABLE])
    memory(instance, table)
    ranges = instance.machine.devices.iova_ranges(instance.fds[IOMMUFD], table.ioas)[:RANGES]
    return {
        "mappings": cells.u64(len(table.mappings)),
        "mapped-bytes": cells.u64(sum(m.length for m in table.mappings)),
        "iova-ranges": cells.u64s([iova for r in ranges for iova in (r.start, r.last)]),
    }


@hookimpl
def khod_describe(instance: Instance) -> Mapping[str, str]:
    """How much is mapped."""
    head, count = read_head(instance.machine.files, instance.fds[TABLE])
    files = ", ".join(f"{name} of {owner}" for owner, name in head.files) or "nothing"
    return {"mappings": f"{count} in IOAS {head.ioas}, of {files}"}


@hookimpl
def khod_restore(instance: Instance) -> Mapping[str, int]:
    """An iommufd with the same mappings: all of them, or none and the reason."""
    devices, files = instance.machine.devices, instance.machine.files
    table = read_table(files, instance.fds[TABLE])
    if len(table.mappings) != cells.as_u64(instance, "mappings"):
        raise FormatError(f"{instance.name}: the table has {len(table.mappings)} mappings, it was frozen with others")
    fds = memory(instance, table)
    if IOMMUFD in instance.fds:
        return {}
    check_reserved(instance, table)
    iommufd = devices.open_iommu()
    try:
        ioas = devices.ioas_alloc(iommufd)
        if not table.huge_pages:
            devices.huge_pages(iommufd, ioas, False)
        check_allowed(instance, table, devices.iova_ranges(iommufd, ioas))
        for mapping in table.mappings:
            devices.map_file(iommufd, ioas, fds[mapping.file], mapping)
        files.write(instance.fds[TABLE], _IOAS_AT, ioas.to_bytes(4, "little"))
    except BaseException:
        files.close(iommufd)
        raise
    return {IOMMUFD: iommufd}


def check_reserved(instance: Instance, table: Table) -> None:
    """Whether nothing is mapped that is reserved for a device whose DMA goes through it, which an IOAS does not say before that
    device is attached. Raises DeviceUnusable naming both, and the device."""
    for user in instance.users:
        for taken in _reserved(user):
            if mapping := ioas_table.hit(table.mappings, taken.start, taken.last):
                raise DeviceUnusable(
                    f"{instance.name}: IOVAs {mapping} were mapped, and this kernel reserves {taken} for the device of"
                    f" {user.name}; {_before(instance)}",
                    hint=_DIFFERENT,
                )


def _reserved(user: Instance) -> Sequence[IovaRange]:
    """For the device of an instance; that it is not there is for that instance to say."""
    if "address" not in user.properties:
        return ()
    try:
        device = user.machine.devices.look(cells.as_string(user, "address"))
    except DeviceUnusable:
        return ()
    return device.reserved if device is not None else ()


def _before(instance: Instance) -> str:
    noted = cells.as_u64s(instance, "iova-ranges")
    ranges = [str(IovaRange(start, last)) for start, last in zip(noted[::2], noted[1::2], strict=True)]
    return f"the one before allowed {', '.join(ranges) or 'none'}"


def check_allowed(instance: Instance, table: Table, ranges: Sequence[IovaRange]) -> None:
    """Whether all mappings lie in these ranges, which ascend as they do. Raises DeviceUnusable naming one that does not."""
    left = iter(ranges)
    current = next(left, None)
    for mapping in table.mappings:
        while current is not None and current.last < mapping.iova:
            current = next(left, None)
        if current is None or mapping.iova < current.start or mapping.end - 1 > current.last:
            raise DeviceUnusable(
                f"{instance.name}: IOVAs {mapping} were mapped, and this kernel allows"
                f" {', '.join(map(str, ranges)) or 'none'}; {_before(instance)}",
                hint=_DIFFERENT,
            )
