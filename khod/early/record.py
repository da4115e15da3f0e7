# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the stage has done: a memfd in custody, which the khod that starts later reads.

It grows by a line for each thing, which is written before it is done wherever a death in between could lead to a second life
of a guest. Words have a tab between them::

    khod-early 1
    update  ID
    mark    NAME  CLOCK_MONOTONIC in nanoseconds
    start   OWNER  NAME  SESSION  FRAMES  PAGES   it will be started: the frames and the bytes of so many pages were compared
    runs    OWNER  NAME  SESSION  PID  SINCE   written by the process itself, right before it becomes the VMM
    failed  OWNER  NAME  SESSION  WHY       it was not, and nobody has written to its memory
"""

from __future__ import annotations

import os

TYPE_CHECKING = False  # typing takes longer to import than all that is done here
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DEPOSIT = "early"
"""Its name in custody."""
MARKS = ("launched", "interpreter", "retrieved", "drivers", "verified", "resumed")
"""In the order of time: the launcher runs; the stage's first line; descriptors are there, or, where drivers have to do with
them, `khod.driven` begins; compared; the VMM is started."""
_HEAD = "khod-early 1"
_MOST = 1 << 20


class Started:
    """An instance that the stage began to start, having compared the frames and the bytes of so many pages. `pid` is 0 if its
    process died before it became a VMM; `since`: when that process began, in ticks of this boot; `why`: it did not become
    one, for this reason."""

    __slots__ = ("frames", "name", "owner", "pages", "pid", "session", "since", "why")

    def __init__(self, owner: str, name: str, session: str, frames: int, pages: int) -> None:
        self.owner, self.name, self.session, self.frames, self.pages = owner, name, session, frames, pages
        self.pid = self.since = 0
        self.why = ""


class Record:
    """A record as it was read."""

    __slots__ = ("marks", "started", "update")

    def __init__(self) -> None:
        self.update = ""
        self.marks: dict[str, int] = {}
        self.started: list[Started] = []


def begin() -> int:
    """A new one: a memfd, the caller's."""
    fd = os.memfd_create("khod-early", os.MFD_CLOEXEC)
    note(fd, _HEAD)
    return fd


def note(fd: int, *words: object) -> None:
    """Add a line. One process at a time does."""
    note_all(fd, [words])


def note_all(fd: int, lines: Iterable[Sequence[object]]) -> None:
    """Add several, by one write."""
    text = "".join("\t".join(str(w).replace("\t", " ").replace("\n", " ") for w in words) + "\n" for words in lines)
    os.pwrite(fd, text.encode("utf-8", "surrogateescape"), os.fstat(fd).st_size)


def read(data: bytes) -> Record:
    """Raises ValueError. A last line that is torn was not finished."""
    if len(data) > _MOST:
        raise ValueError(f"the stage's record has {len(data)} bytes")
    head, *lines, _ = data.decode("utf-8", "surrogateescape").split("\n")
    if head != _HEAD:
        raise ValueError(f"the stage's record begins with {head[:40]!r}")
    record = Record()
    for line in lines:
        kind, *words = line.split("\t")
        if kind == "update" and len(words) == 1:
            record.update = words[0]
        elif kind == "mark" and len(words) == 2:
            record.marks[words[0]] = int(words[1])
        elif kind == "start" and len(words) == 5:
            record.started.append(Started(words[0], words[1], words[2], int(words[3]), int(words[4])))
        elif kind == "runs" and len(words) == 5:
            one = _begun(record, words)
            one.pid, one.since = int(words[3]), int(words[4])
        elif kind == "failed" and len(words) == 4:
            _begun(record, words).why = words[3]
        else:
            raise ValueError(f"the stage's record has a line {line[:80]!r}")
    return record


def _begun(record: Record, words: list[str]) -> Started:
    for one in record.started:
        if [one.owner, one.name, one.session] == words[:3]:
            return one
    raise ValueError(f"the stage's record speaks of {words[1]!r} before it is started")
