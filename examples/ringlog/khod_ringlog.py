# SPDX-License-Identifier: LGPL-2.1-or-later
"""A khod driver for ringlog, a log in shared memory. docs/plugins.md builds it step by step.

The ring is one memfd: a header page, then records of 64 bytes. Its writer looks at `paused` before each record, and counts
`head` up after it; a writer that finds `paused` set waits.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Mapping, Sequence

from khod.abi import cells
from khod.core.ports import Files, Machine
from khod.errors import FormatError, InvalidRequest, Refused
from khod.plugin import Declaration, Instance, Preserve, Probe, Request, StateBound, hookimpl

HEADER = struct.Struct("<8sQQ")  # magic, paused, head
MAGIC = b"ringlog1"
RECORD = 64
FIRST = 4096
PAUSED_AT = 8
COMPATIBLE = "example,ringlog-v1"


def header(files: Files, fd: int) -> tuple[int, int]:
    """`paused` and `head` of a ring. Raises InvalidRequest if it is none."""
    magic, paused, head = HEADER.unpack(files.read(fd, 0, HEADER.size).ljust(HEADER.size, b"\0"))
    if magic != MAGIC:
        raise InvalidRequest("the file is not a ring of ringlog's", hint="give the memfd that ringlog prints at its start")
    return int(paused), int(head)


def pause(files: Files, fd: int, paused: bool) -> None:
    """Stop the writer, or let it go on."""
    files.write(fd, PAUSED_AT, struct.pack("<Q", paused))


@hookimpl
def khod_compatible() -> str:
    """What our nodes in the handover tree are called; a change of their layout makes it ringlog-v2."""
    return COMPATIBLE


@hookimpl
def khod_probe(machine: Machine) -> Probe:
    """ringlog stores numbers as the processor does, and reads them back as little-endian ones."""
    return Probe(sys.byteorder == "little", "ringlog's header is little-endian, and this machine is not")


@hookimpl
def khod_declare(machine: Machine, request: Request) -> Declaration:
    """Take a ring whose writer can be stopped."""
    if list(request.fds) != ["ring"]:
        raise InvalidRequest(f"{request.name}: one descriptor named 'ring' is wanted, not {list(request.fds)}")
    if unknown := set(request.options) - {"keep"}:
        raise InvalidRequest(f"{request.name}: no options {sorted(unknown)}", hint="there is keep=N, records to compare")
    fd = request.fds["ring"]
    header(machine.files, fd)
    stat = machine.files.stat(fd)
    if not stat.writable:
        raise Refused(f"{request.name}: the ring is read-only, and its writer could not be stopped")
    keep = request.options.get("keep", "4")
    if not (keep.isdecimal() and int(keep) <= 64):
        raise InvalidRequest(f"{request.name}: keep={keep} is not a number up to 64")
    return Declaration(
        compatible=COMPATIBLE,
        fds=(Preserve("ring", fd),),
        states=(StateBound("tail", int(keep) * RECORD),),
        properties={"head": cells.u64(0), "keep": cells.u32(int(keep))},
        size=stat.size,
    )


@hookimpl
def khod_check(instance: Instance) -> Sequence[str]:
    """A ring that stands still already was stopped by somebody who will want to be asked."""
    paused, _ = header(instance.machine.files, instance.fds["ring"])
    return [f"{instance.name}: somebody else has paused the ring"] if paused else []


@hookimpl
def khod_freeze(instance: Instance) -> Mapping[str, bytes]:
    """Stop the writer, then note where it stopped."""
    files, fd = instance.machine.files, instance.fds["ring"]
    pause(files, fd, True)
    _, head = header(files, fd)
    instance.states["tail"].write(tail(instance, head))
    return {"head": cells.u64(head)}


def tail(instance: Instance, head: int) -> bytes:
    """The last records before `head`, as the ring has them."""
    files, fd = instance.machine.files, instance.fds["ring"]
    slots = (files.stat(fd).size - FIRST) // RECORD
    last = range(max(0, head - cells.as_u32(instance, "keep")), head)
    return b"".join(files.read(fd, FIRST + number % slots * RECORD, RECORD) for number in last)


@hookimpl
def khod_thaw(instance: Instance) -> None:
    """The update is off: the writer goes on."""
    pause(instance.machine.files, instance.fds["ring"], False)


@hookimpl
def khod_describe(instance: Instance) -> Mapping[str, str]:
    """What `khoctl instances NAME` shows of it."""
    paused, head = header(instance.machine.files, instance.fds["ring"])
    return {"records": str(head), "writer": "paused" if paused else "runs"}


@hookimpl
def khod_restore(instance: Instance) -> None:
    """The ring is as it was frozen, or it is damaged; a writer that claims it may write."""
    _, head = header(instance.machine.files, instance.fds["ring"])
    noted = cells.as_u64(instance, "head")
    if head != noted:
        raise FormatError(f"{instance.name}: the ring has {head} records, it was frozen with {noted}")
    if tail(instance, head) != instance.states["tail"].read():
        raise FormatError(f"{instance.name}: the last records are not those that it was frozen with")
    pause(instance.machine.files, instance.fds["ring"], False)
