# SPDX-License-Identifier: LGPL-2.1-or-later
"""Instances that run already when khod starts: the restore stage in the initrd started them (khod.early, docs/initrd.md).

What it did is written in a memfd in custody. Who runs has been compared, and has written to its memory since: it is claimed, by
a process that khod did not hear yet, and nobody else gets its descriptors while that process is there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable

from khod.core.callers import Lifetime
from khod.core.keepers import Keepers
from khod.core.ledger import Ledger, across
from khod.core.ports import Machine, Stamp
from khod.core.registry import Entry, InstanceState
from khod.early import record
from khod.early.record import MARKS, Record, Started

logger = logging.getLogger(__name__)


def read(machine: Machine) -> Record:
    """What the stage has done; nothing where there was none, or where its record cannot be read. Blocks."""
    custody, files = machine.custody, machine.files
    if record.DEPOSIT not in custody.kept():
        return Record()
    fd = custody.take(record.DEPOSIT)
    try:
        return record.read(files.read(fd, 0, files.stat(fd).size))
    except ValueError as error:
        logger.error("the restore stage's record is not read: %s", error)
        return Record()
    finally:
        files.close(fd)


def running(found: Record) -> dict[str, Started]:
    """Those that were started, by their sessions. Who is not said to have failed, and has no number, died before it became a
    VMM: its memory is as it was."""
    return {one.session: one for one in found.started if one.pid and not one.why}


def take_up(entry: Entry, one: Started) -> None:
    """An entry that was restored is claimed by the process that runs it."""
    if entry.state is InstanceState.RESTORED:
        entry.state = InstanceState.CLAIMED
        entry.runner_pid, entry.runner_since = one.pid, one.since


def hang(keepers: Keepers, entries: Iterable[Entry]) -> None:
    """Have what runs hang on its process, until that claims it and says what it shall hang on; but for what only an operator
    ends."""
    for entry in entries:
        if not entry.runner_pid:
            continue
        presence = keepers.watch(entry.runner_pid)
        if presence is not None and presence.since == entry.runner_since:
            entry.runner = presence
            keepers.hold(entry, presence, entry.runner_pid, early=True)
            if entry.lifetime is not Lifetime.PERSISTENT:
                keepers.hang(entry, presence, entry.runner_pid)


def reckon(ledger: Ledger, found: Record, before: Stamp | None, now: Stamp) -> None:
    """The ledger's rows of the stage. `before` are the last words of the old kernel, `now` is a moment of this one: the marks
    are of this kernel's monotonic clock."""
    marks = found.marks
    if "launched" not in marks or before is None:
        return
    between, uncertainty = across(before, now)
    launched = between - (now.monotonic - marks["launched"]) / 1e9
    ledger.add("initrd: kernel", launched, uncertainty=uncertainty)
    earlier = marks["launched"]
    for name in MARKS[1:]:
        if name in marks:
            ledger.add(f"initrd: {name}", (marks[name] - earlier) / 1e9)
            earlier = marks[name]
