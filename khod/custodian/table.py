# SPDX-License-Identifier: LGPL-2.1-or-later
"""What each descriptor is, in memory that both twins see: a shared, anonymous mapping with one label for each number.

The twins share the table of descriptors, so that whatever one of them holds when it is killed is still open. What it *is*, only
the dead one knew, unless it wrote it down here first. Two rules make every moment of a death a good one:

* A label is written with its kind last and wiped with its kind first, and the kind is one byte: there is no half a label.
* A descriptor is labelled after it is in the table and its label is wiped before it is closed: a label never speaks of a
  number that is closed, and by then perhaps another file's.

So the survivor finds descriptors with labels, which say what to do about them, and descriptors without; `keeper` says what
the latter can be.
"""

from __future__ import annotations

import mmap
from struct import Struct

NOTHING = 0
STORING = 1  # a deposit or an offered session on its way into PID 1's store: its client has no answer yet
DEPOSIT = 2
SESSION = 3  # an incoming session
FILE = 4  # retrieved from one
OFFERED = 5  # an outgoing session in PID 1's store
DROPPING = 6  # on its way out: whoever reads this goes on with it
FOREIGN = 7  # PID 1 gave it to us, under a name that we give nothing

MOST = 1 << 20
"""Numbers that have a label at most; the limit on open files is lowered to it."""

# kind, whether PID 1 has it, its session's descriptor, its token or (of a deposit) its age, its name in PID 1's store, its name
_LABEL = Struct("=BBxxIQ16s64s")
_HEADER = 4096
_RETRIEVING, _OFFERED = 0, 1


class Label:
    """One label, as read."""

    __slots__ = ("kind", "mark", "name", "session", "stored", "token")

    def __init__(self, kind: int, stored: int, session: int, token: int, mark: bytes, name: bytes) -> None:
        self.kind, self.stored, self.session, self.token = kind, bool(stored), session, token
        self.mark, self.name = mark.rstrip(b"\0"), name.rstrip(b"\0")


class Table:
    """Labels for descriptors below `numbers`. A twin that is made after it sees the same one."""

    def __init__(self, numbers: int) -> None:
        self.numbers = min(numbers, MOST)
        # Takes memory as it is written to.
        self._memory = mmap.mmap(-1, _HEADER + self.numbers * _LABEL.size)

    def write(self, fd: int, kind: int, *, name: bytes = b"", mark: bytes = b"", session: int = 0, token: int = 0) -> None:
        """Label `fd`, which has no label."""
        at = self._at(fd)
        label = _LABEL.pack(kind, 0, session, token, mark, name)
        self._memory[at + 1 : at + _LABEL.size] = label[1:]
        self._memory[at] = kind

    def read(self, fd: int) -> Label:
        """The label of `fd`; its kind is NOTHING when it has none."""
        return Label(*_LABEL.unpack_from(self._memory, self._at(fd)))

    def kind(self, fd: int) -> int:
        """Only the kind."""
        return self._memory[self._at(fd)]

    def set_kind(self, fd: int, kind: int) -> None:
        """Change the kind; NOTHING wipes the label."""
        self._memory[self._at(fd)] = kind

    def set_stored(self, fd: int, stored: bool) -> None:
        """Whether PID 1 has it."""
        self._memory[self._at(fd) + 1] = stored

    @property
    def retrieving(self) -> bool:
        """Set from before a RETRIEVE_SESSION until its result has its label. While it is, no client's descriptor is in the
        table without one: a session without a label is that result."""
        return bool(self._memory[_RETRIEVING])

    @retrieving.setter
    def retrieving(self, value: bool) -> None:
        self._memory[_RETRIEVING] = value

    @property
    def offered(self) -> bool:
        """Set from when an offer begins to empty PID 1's store until a withdrawal has filled it again."""
        return bool(self._memory[_OFFERED])

    @offered.setter
    def offered(self, value: bool) -> None:
        self._memory[_OFFERED] = value

    def _at(self, fd: int) -> int:
        if not 0 <= fd < self.numbers:
            raise ValueError(f"descriptor {fd} is beyond the table of {self.numbers}")
        return _HEADER + fd * _LABEL.size
