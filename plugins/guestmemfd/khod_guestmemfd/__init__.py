# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver for guest RAM in memfds: what Linux 7.3 preserves as it is.

An instance is one or more memfds. Nothing is stopped or copied: the kernel carries the pages. What this driver is for is
to turn down, at registration, what would come back otherwise than it went.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from khod.abi import cells
from khod.core.ports import (
    F_SEAL_EXEC,
    F_SEAL_FUTURE_WRITE,
    F_SEAL_GROW,
    F_SEAL_SHRINK,
    F_SEAL_WRITE,
    FileStat,
    Machine,
)
from khod.errors import FormatError, InvalidRequest, Refused
from khod.plugin import Declaration, Instance, Preserve, Request, hookimpl

COMPATIBLE = "khod,guestmemfd-v1"
SIZE_LIMIT = 1 << 40
"""7.3 keeps 16 bytes a folio in one allocation, which fails from 1 TiB of 4 KiB pages on with a kernel warning."""
_SEALS = {F_SEAL_SHRINK: "shrink", F_SEAL_GROW: "grow", F_SEAL_WRITE: "write", F_SEAL_FUTURE_WRITE: "future-write"}
_KINDS = {
    "hugetlb": "Linux 7.3 does not preserve hugetlb memfds; use an ordinary memfd, with huge folios by transparent huge"
    " pages (shmem_enabled=always or MADV_HUGEPAGE)",
    "guest_memfd": "Linux 7.3 does not preserve guest_memfds; use an ordinary memfd as the guest's memory",
}


@hookimpl
def khod_compatible() -> str:
    """The string of this version's nodes."""
    return COMPATIBLE


@hookimpl
def khod_declare(machine: Machine, request: Request) -> Declaration:
    """Accept memfds that come back as they went."""
    if not request.fds:
        raise InvalidRequest(f"{request.name}: a guestmemfd instance needs at least one memfd")
    if request.options:
        raise InvalidRequest(f"{request.name}: guestmemfd takes no options, {sorted(request.options)} given")
    stats = {name: machine.files.stat(fd) for name, fd in request.fds.items()}
    for name, stat in stats.items():
        if reason := _refusal(stat):
            raise Refused(f"{request.name}: descriptor {name!r} cannot be carried across: {reason[0]}", hint=reason[1])
    return Declaration(
        compatible=COMPATIBLE,
        fds=tuple(Preserve(name, fd) for name, fd in request.fds.items()),
        properties={
            "memory-sizes": cells.u64s([s.size for s in stats.values()]),
            "memory-seals": cells.u64s([s.seals for s in stats.values()]),
        },
        size=sum(s.size for s in stats.values()),
    )


def _refusal(stat: FileStat) -> tuple[str, str] | None:
    """Why this file is turned down, and what to do; None if it is not."""
    if stat.kind != "memfd":
        return f"it is a {stat.kind} file, not a memfd", _KINDS.get(stat.kind, "give the memfd that backs the memory")
    if stat.seals & F_SEAL_EXEC:
        return (
            "it is sealed with F_SEAL_EXEC, and the kernel would give it back read-only",
            "create it with MFD_EXEC; the sysctl vm.memfd_noexec=1 makes F_SEAL_EXEC the default",
        )
    if stat.size >= SIZE_LIMIT:
        return f"it has {stat.size} bytes, and Linux 7.3 preserves files below {SIZE_LIMIT}", "use several memfds"
    return None


@hookimpl
def khod_check(instance: Instance) -> Sequence[str]:
    """A memfd may have changed since it was registered: it was not preserved until now (decision 1)."""
    problems = []
    for name, fd in instance.fds.items():
        if reason := _refusal(instance.machine.files.stat(fd)):
            problems.append(f"{instance.name}: descriptor {name!r}: {reason[0]}; {reason[1]}")
    return problems


@hookimpl
def khod_freeze(instance: Instance) -> Mapping[str, bytes]:
    """Sizes and seals as they are at the end; nothing is stopped, for nothing of ours runs."""
    stats = [instance.machine.files.stat(fd) for fd in instance.fds.values()]
    return {
        "memory-sizes": cells.u64s([s.size for s in stats]),
        "memory-seals": cells.u64s([s.seals for s in stats]),
    }


@hookimpl
def khod_describe(instance: Instance) -> Mapping[str, str]:
    """Sizes, holes and seals."""
    text = {}
    for name, fd in instance.fds.items():
        stat = instance.machine.files.stat(fd)
        seals = ",".join(word for bit, word in _SEALS.items() if stat.seals & bit)
        text[name] = f"memfd, {stat.size} bytes, {stat.allocated} allocated" + (f", sealed {seals}" if seals else "")
    return text


@hookimpl
def khod_restore(instance: Instance) -> None:
    """Same sizes as they had. Seals that were set after the preserve are not carried by the kernel: set them again."""
    files = instance.machine.files
    sizes = cells.as_u64s(instance, "memory-sizes")
    seals = cells.as_u64s(instance, "memory-seals")
    if not len(sizes) == len(seals) == len(instance.fds):
        raise FormatError(f"{instance.name}: {len(sizes)} sizes and {len(seals)} seals for {len(instance.fds)} memfds")
    for (name, fd), size, wanted in zip(instance.fds.items(), sizes, seals, strict=True):
        stat = files.stat(fd)
        if stat.size != size:
            raise FormatError(f"{instance.name}: memfd {name!r} came back with {stat.size} bytes, it had {size}")
        if missing := wanted & ~stat.seals:
            files.add_seals(fd, missing)
