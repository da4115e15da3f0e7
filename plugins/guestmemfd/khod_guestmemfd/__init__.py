# SPDX-License-Identifier: LGPL-2.1-or-later
"""The driver for the memory of guests, whatever kind of file it is in.

An instance is one or more files. What the kernel preserves goes into its session as it is (`Strategy.NATIVE`): memfds, and of
other kinds those of which it says so when tried. Any other is carried, if it can be: its bytes go into an ordinary memfd that
was preserved beforehand, in freeze, when everything that could write to it stands still; from that it is made anew.

- A guest_memfd belongs to its VM, and nobody but the next VMM can make another: it is handed the carrier, and runs on that, or
  rebuilds (`khod.client.guest_memory`).
- A hugetlb memfd is carried when asked for (`carry=yes`), for it takes as much ordinary memory; it is made again in huge pages.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from khod.core.blocking import uninterrupted
from khod.core.carrying import Crew, figure
from khod.core.ports import Machine
from khod.errors import FormatError, OutOfMemory, UpdateFailed
from khod.plugin import Continuity, Declaration, Instance, Preserve, Request, StateBound, Strategy, hookimpl
from khod.plugin.probing import learned
from khod_guestmemfd import properties
from khod_guestmemfd.accepting import Options, accept, refusal
from khod_guestmemfd.properties import Memory, carrier

COMPATIBLE = ("khod,guestmemfd-v2", "khod,guestmemfd-v1")
"""v1 knew no carriers and no hashes."""
Made = TypeVar("Made")


@hookimpl
def khod_compatible() -> Sequence[str]:
    """The string of this version's nodes, and those of the version before."""
    return COMPATIBLE


@hookimpl
def khod_declare(machine: Machine, request: Request) -> Declaration:
    """Accept what comes back as it went, or can be carried."""
    options = Options.parse(request)
    memories = accept(machine, request, options)
    kept, copied = [m for m in memories if not m.carried], [m for m in memories if m.carried]
    return Declaration(
        compatible=COMPATIBLE[0],
        fds=tuple(Preserve(m.name, request.fds[m.name], folios=m.kind == "memfd") for m in kept),
        states=tuple(StateBound(carrier(m.name), m.size, bulk=True) for m in copied),
        properties=properties.encode(memories, hashed={m.name for m in memories if options.wants_hash(m.carried)}),
        size=sum(m.size for m in memories),
        handled=sum(m.size for m in memories if m.carried or options.wants_hash(m.carried)),
        made=tuple(m.name for m in copied),
        strategy=Strategy.CARRIED if copied else Strategy.NATIVE,
        continuity=Continuity.REBUILT if copied else Continuity.PRESERVED,
    )


@hookimpl
def khod_check(instance: Instance) -> Sequence[str]:
    """A file may have changed since it was registered: it was not preserved until now (decision 1)."""
    problems = []
    for memory in properties.decode(instance):
        stat = instance.machine.files.stat(instance.fds[memory.name])
        if reason := refusal(stat, native=not memory.carried):
            problems.append(f"{instance.name}: descriptor {memory.name!r}: {reason[0]}; {reason[1]}")
        elif memory.carried and stat.size != memory.size:
            problems.append(
                f"{instance.name}: descriptor {memory.name!r} has {stat.size} bytes, and had {memory.size} when it was"
                " registered: what it would be copied into is of that size; register it again"
            )
    return problems


@hookimpl
async def khod_freeze(instance: Instance) -> Mapping[str, bytes]:
    """Copy what is carried, hash what is to be compared, and note sizes and seals as they are at the end."""
    return await _working(_freeze, instance, lambda _: None)


async def _working(work: Callable[[Instance, Crew], Made], instance: Instance, discard: Callable[[Made], None]) -> Made:
    """Work in a thread. When the caller is cancelled, it is interrupted and ends before this does: descriptors are closed next,
    and nobody may write to their numbers any more. What it made all the same is handed to `discard`."""
    crew = Crew()
    return await uninterrupted(asyncio.ensure_future(asyncio.to_thread(work, instance, crew)), discard, crew.interrupt)


def _freeze(instance: Instance, crew: Crew) -> Mapping[str, bytes]:
    files = instance.machine.files
    memories = []
    for memory in properties.decode(instance):
        fd = instance.fds[memory.name]
        stat = files.stat(fd)
        digest, took = b"", 0
        if memory.carried:
            if stat.size != memory.size:
                raise UpdateFailed(
                    f"{instance.name}: {memory.name!r} has {stat.size} bytes, its carrier {memory.size}",
                    hint="register it again, and seal it against changes of size",
                )
            area = instance.states[carrier(memory.name)].fd
            took = crew.copy(f"{instance.name}: copying {memory.name!r}", files, fd, area, stat.size, stat.page_size)
            fd = area
        if memory.digest:
            digest = crew.digest(files, fd, stat.size)
        memories.append(memory.seen(stat.size, stat.seals, digest, took))
    return properties.encode(memories, hashed=frozenset(m.name for m in memories if m.digest))


@hookimpl
def khod_describe(instance: Instance) -> Mapping[str, str]:
    """Sizes, holes and seals; what is carried, and how fast that was when it was last done."""
    text = {}
    for memory in properties.decode(instance):
        stat = instance.machine.files.stat(instance.fds[memory.name])
        words = [f"{stat.kind}, {stat.size} bytes"]
        words.append(f"{stat.allocated} allocated" if stat.kind == "memfd" else f"in pages of {stat.page_size}")
        if seals := properties.sealed(stat.seals):
            words.append(f"sealed {seals}")
        if memory.carried:
            words.append("copied in freeze" + (f" ({figure(memory.size, memory.took)})" if memory.took else ""))
        if memory.digest:
            words.append("every byte compared")
        text[memory.name] = ", ".join(words)
    return text


@hookimpl
async def khod_restore(instance: Instance) -> Mapping[str, int]:
    """Same sizes and, where they were hashed, the same bytes as they had. What was carried is made anew. Seals that were set
    after the preserve are not carried by the kernel: set them again."""

    def close(made: Mapping[str, int]) -> None:
        for fd in made.values():
            instance.machine.files.close(fd)

    return await _working(_restore, instance, close)


def _restore(instance: Instance, crew: Crew) -> Mapping[str, int]:
    files = instance.machine.files
    made: dict[str, int] = {}
    try:
        for memory in properties.decode(instance):
            fd = _retrieved(instance, memory)
            if not memory.carried:
                learned(instance.machine, memory.kind)
            size = files.stat(fd).size
            if (memory.carried and size < memory.size) or (not memory.carried and size != memory.size):
                raise FormatError(f"{instance.name}: memfd {memory.name!r} came back with {size} bytes, it had {memory.size}")
            if memory.digest and crew.digest(files, fd, memory.size) != memory.digest:
                raise FormatError(f"{instance.name}: the bytes of {memory.name!r} are not those that were frozen")
            if memory.carried:
                made[memory.name] = fd = _made(instance, memory, fd, crew)
            if missing := memory.seals & ~files.stat(fd).seals:
                files.add_seals(fd, missing)
    except BaseException:
        for fd in made.values():
            files.close(fd)
        raise
    return made


def _retrieved(instance: Instance, memory: Memory) -> int:
    """What came through of it. Raises FormatError."""
    found = instance.states.get(carrier(memory.name)) if memory.carried else instance.fds.get(memory.name)
    if found is None:
        raise FormatError(f"{instance.name}: {memory.name!r} is noted, and did not come through with it")
    return found if isinstance(found, int) else found.fd


def _made(instance: Instance, memory: Memory, area: int, crew: Crew) -> int:
    """What its owner gets for what was carried: owned by the caller."""
    files = instance.machine.files
    if memory.kind != "hugetlb":
        return files.duplicate(area)
    pages, free = memory.size // memory.page_size, instance.machine.memory.free_huge_pages(memory.page_size)
    if pages > free:
        raise OutOfMemory(
            f"{instance.name}: {memory.name!r} needs {pages} huge pages of {memory.page_size} bytes and {free} are free:"
            f" {pages - free} are missing; its bytes are kept in ordinary memory",
            hint="give the new kernel as many (hugepages= on its command line)",
        )
    fd = files.hugetlb(memory.name, memory.size, memory.page_size)
    try:
        crew.copy(f"{instance.name}: copying {memory.name!r} back", files, area, fd, memory.size, memory.page_size)
    except BaseException:
        files.close(fd)
        raise
    return fd
