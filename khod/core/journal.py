# SPDX-License-Identifier: LGPL-2.1-or-later
"""The journal: what khod intended and did, durable before it matters.

One record a line (`khod.core.lines`), in a file that only grows. A direct jump may leave
the last append torn, or as NULs, or not there: such a tail is normal and is cut off. A record that does not check, with good
ones after it, is damage, and raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from khod.core import lines
from khod.core.ports import Boot, Store
from khod.core.state import State
from khod.errors import JournalError

logger = logging.getLogger(__name__)

VERSION = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One entry. `time` is CLOCK_REALTIME in nanoseconds; `boot` the boot_id it was written in."""

    time: int
    boot: str
    update: str
    event: str
    """'state' (with `state`), or the name of what is noted: 'ledger', 'problem', 'verified'…"""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def state(self) -> State | None:
        """The state that this record announces, if it does."""
        return State(self.data["state"]) if self.event == "state" else None


def encode(record: Record) -> bytes:
    """One line."""
    body = {"v": VERSION, "time": record.time, "boot": record.boot, "update": record.update, "event": record.event}
    return lines.encode(body | {"data": dict(record.data)})


def decode(data: bytes) -> tuple[list[Record], int]:
    """The records of a journal, and how many bytes of it are good; what follows them is a torn tail.

    Raises JournalError when a bad record has good ones after it, or for a version that this khod does not read.
    """
    records: list[Record] = []
    good = at = 0
    while at < len(data):
        end = data.find(b"\n", at)
        line = data[at : end if end >= 0 else len(data)]
        record = _decode_line(line, at) if end >= 0 else None
        if record is None:
            if any(lines.whole(later) for later in data[at + len(line) :].split(b"\n")):
                raise JournalError(
                    f"journal: record at byte {at} is damaged and records follow it",
                    hint="this is no torn tail but a damaged disk or an edited file: move it away and keep it",
                )
            break
        records.append(record)
        at = good = end + 1
    return records, good


def _decode_line(line: bytes, at: int) -> Record | None:
    if not lines.whole(line):
        return None
    try:
        body = lines.decode(line)
        version = body["v"]
        if version == VERSION:
            record = Record(body["time"], body["boot"], body["update"], body["event"], body["data"])
            _ = record.state
            return record
    except (ValueError, KeyError, TypeError, RecursionError):
        raise JournalError(f"journal: record at byte {at} checks and is no record", hint="it was not written by khod") from None
    raise JournalError(f"journal: record at byte {at} has version {version!r}, this khod reads {VERSION}")


class Journal:
    """The journal of a running khod. Appends are durable when they return."""

    def __init__(self, store: Store, boot: Boot, now: Callable[[], int]) -> None:
        """Read what is there, and cut a torn tail off. Raises JournalError."""
        self._store, self._boot, self._now = store, boot, now
        data = store.read()
        self.records, good = decode(data)
        self._length = good
        if good < len(data):
            logger.warning("journal: cutting a torn tail of %d bytes", len(data) - good)
            store.cut(good)
        self._torn = False

    def note(self, update: str, event: str, **data: Any) -> Record:
        """Append a record; on return it is on the disk.

        A full disk takes part of a record. What follows it would make that damage, at which no khod starts any more: so it is
        cut off first.
        """
        record = Record(self._now(), self._boot.boot_id, update, event, data)
        line = encode(record)
        if self._torn:
            self._store.cut(self._length)
        self._torn = True
        self._store.append(line)
        self._torn = False
        self._length += len(line)
        self.records.append(record)
        return record

    def last_state(self) -> Record | None:
        """The newest record that announces a state."""
        return next((r for r in reversed(self.records) if r.event == "state"), None)

    def of(self, update: str) -> list[Record]:
        """An update's records, oldest first."""
        return [r for r in self.records if r.update == update]

    def updates(self) -> list[str]:
        """Ids of all updates, oldest first."""
        return list(dict.fromkeys(r.update for r in self.records if r.update))
