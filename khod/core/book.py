# SPDX-License-Identifier: LGPL-2.1-or-later
"""The book: what a khod that starts anew in the same boot must know of its instances to find everything again.

It is a memfd in custody, beside the descriptors that it speaks of: both are there, or neither. It grows a record a change
(`khod.core.lines`), the last one about an instance counts, and it is written anew when a khod starts. A descriptor goes into
custody before the record that names it, and out of it after the record that does not: what no record names is of a
registration that nobody was told of, or of one that is over, and is let go of.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from khod.core import lines
from khod.core.callers import Lifetime, Owner
from khod.core.driver import StateBound
from khod.core.ports import Machine
from khod.core.registry import Entry, Grade, InstanceState, Key
from khod.early.record import DEPOSIT as EARLY
from khod.errors import FormatError, KhodError

BOOK = "book"
_DEPOSIT = "d"
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_OUTGOING = (InstanceState.PRESERVED, InstanceState.FROZEN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """What the book says of one instance."""

    name: str
    owner: Owner
    driver: str
    grade: Grade
    state: InstanceState
    required: bool
    requires: tuple[str, ...]
    options: Mapping[str, str]
    handle: str
    lifetime: Lifetime
    keeper_pid: int
    keeper_since: int
    client_states: tuple[StateBound, ...]
    shareable: bool
    shares: Mapping[str, tuple[Key, str]]
    attended: bool
    since: int
    deposits: Mapping[str, str]
    """Names in custody of its descriptors, by the descriptor's name."""
    session: str
    """The incoming session that it is still to be restored from; '' for none."""
    problem: str = ""
    holder_pid: int = 0
    holder_since: int = 0
    holder_early: bool = False
    keepsake: Mapping[str, str] = field(default_factory=dict)
    """Hexadecimal."""

    @property
    def key(self) -> Key:
        """What names it."""
        return (self.owner, self.name)


@dataclass(slots=True)
class Contents:
    """What a book says."""

    pages: dict[Key, Page] = field(default_factory=dict)
    over: set[str] = field(default_factory=set)
    """Incoming sessions that are finished or discarded: nobody shall look for them again."""
    accepted: str = ""
    """The update whose tree and map were judged sound in this boot: later, frames have moved, and the map tells nothing."""
    proven: set[str] = field(default_factory=set)
    """Incoming sessions of which it was proven that retrieving what is in them succeeds (decision 19)."""


class Book:
    """The book of a running khod. Methods block, and may be called from several threads."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.contents = Contents()
        """What it says now; only this class changes it."""
        self._fd = -1
        self._end = 0
        self._next = 0
        self._lock = threading.RLock()

    def open(self) -> Contents:
        """Read the book that a predecessor left in custody, and begin a new one with the same contents. Deposits that it
        does not name are let go of. Raises CustodianGone."""
        custody, files = self._machine.custody, self._machine.files
        kept = list(custody.kept())
        if BOOK in kept:
            fd = custody.take(BOOK)
            try:
                self.contents = read(files.read(fd, 0, files.stat(fd).size))
            finally:
                files.close(fd)
        named = {name for page in self.contents.pages.values() for name in page.deposits.values()}
        custody.drop([name for name in kept if name not in (BOOK, EARLY) and name not in named])
        self._next = 1 + max((_number(name) for name in kept), default=0)
        self._rewrite()
        return self.contents

    def _rewrite(self) -> None:
        custody, files = self._machine.custody, self._machine.files
        data = b"".join(
            [
                lines.encode(
                    {
                        "over": sorted(self.contents.over),
                        "proven": sorted(self.contents.proven),
                        "accepted": self.contents.accepted,
                    }
                ),
                *(_line(p) for p in self.contents.pages.values()),
            ]
        )
        fd = files.memfd("khod-book", 0)
        try:
            files.write(fd, 0, data)
            custody.keep(BOOK, fd)
        except KhodError:
            files.close(fd)
            raise
        if self._fd >= 0:
            files.close(self._fd)
        self._fd, self._end = fd, len(data)

    def deposit(self, entry: Entry) -> None:
        """Put an entry's descriptors into custody, those that are not there yet. Raises CustodyFull, CustodianGone: then none
        of them is kept that was not before."""
        with self._lock:
            made: dict[str, str] = {}
            try:
                for name, fd in entry.fds.items():
                    if name not in entry.deposits:
                        made[name] = _DEPOSIT + _base36(self._next)
                        self._next += 1
                        self._machine.custody.keep(made[name], fd)
            except KhodError:
                self._machine.custody.drop(list(made.values()))
                raise
            entry.deposits.update(made)

    def put(self, entry: Entry) -> None:
        """Note how an entry stands now."""
        with self._lock:
            page = self._page(entry)
            self._append(_line(page))
            self.contents.pages[page.key] = page

    def remove(self, entry: Entry, *, over: str = "", heirs: Sequence[Entry] = ()) -> None:
        """Forget an entry, and let go of its deposits; `over`: so is this incoming session. `heirs` shared its files: how they
        stand now is noted by the same write, for a share of what is gone is none."""
        with self._lock:
            pages = [self._page(heir) for heir in heirs]
            gone = lines.encode({"gone": _key(entry.key), "over": [over] if over else []})
            self._append(b"".join([*map(_line, pages), gone]))
            self.contents.pages.update((page.key, page) for page in pages)
            self.contents.pages.pop(entry.key, None)
            if over:
                self.contents.over.add(over)
            self._machine.custody.drop(list(entry.deposits.values()))
            entry.deposits.clear()

    def end_session(self, entry: Entry, session: str) -> None:
        """Note how an entry stands now that its incoming session is over: its deposits are all that keeps it."""
        with self._lock:
            page = self._page(entry)
            self._append(_line(page, over=[session]))
            self.contents.pages[page.key] = page
            self.contents.over.add(session)

    def note_proven(self, sessions: Sequence[str]) -> None:
        """Note what was proven, before anything of it is retrieved: asked again later, with the memory in use, it would seem
        not to fit."""
        with self._lock:
            self._append(lines.encode({"proven": list(sessions)}))
            self.contents.proven.update(sessions)

    def note_accepted(self, update: str) -> None:
        """Note that an update's bookkeeping is sound."""
        with self._lock:
            self._append(lines.encode({"accepted": update}))
            self.contents.accepted = update

    def _page(self, entry: Entry) -> Page:
        """In an update, how it stood before that: to this a khod that starts anew goes back."""
        page, before = page_of(entry), self.contents.pages.get(entry.key)
        return replace(page, state=before.state) if before and entry.state in _OUTGOING else page

    def _append(self, data: bytes) -> None:
        self._machine.files.write(self._fd, self._end, data)
        self._end += len(data)

    def close(self) -> None:
        """Close khod's descriptor of it; it stays in custody."""
        if self._fd >= 0:
            self._machine.files.close(self._fd)
            self._fd = -1


def read(data: bytes) -> Contents:
    """The contents of a book. A last line that is torn was never acknowledged. Raises FormatError for one that khod has not
    written."""
    found = Contents()
    for line in data.split(b"\n"):
        if not lines.whole(line):
            break
        try:
            body = lines.decode(line)
            found.over.update(str(name) for name in body.get("over", ()))
            found.proven.update(str(name) for name in body.get("proven", ()))
            found.accepted = str(body.get("accepted", found.accepted))
            if "gone" in body:
                found.pages.pop(_parsed_key(body["gone"]), None)
            if "page" in body:
                page = _parsed(body["page"])
                found.pages[page.key] = page
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"book: {line[:80]!r} is no record of it: {error!r}", hint="khod did not write it")
    return found


def page_of(entry: Entry) -> Page:
    """An entry, as the book has it."""
    return Page(
        name=entry.name,
        owner=entry.owner,
        driver=entry.driver_name,
        grade=entry.grade,
        state=entry.state,
        required=entry.required,
        requires=entry.requires,
        options=dict(entry.options),
        handle=entry.handle,
        lifetime=entry.lifetime,
        keeper_pid=entry.keeper_pid,
        keeper_since=entry.keeper_since,
        client_states=entry.client_states,
        shareable=entry.shareable,
        shares=dict(entry.shares),
        attended=entry.attended,
        since=entry.since,
        deposits=dict(entry.deposits),
        session=entry.incoming,
        problem=entry.problem,
        holder_pid=entry.holder_pid,
        holder_since=entry.holder_since,
        holder_early=entry.holder_early,
        keepsake={name: value.hex() for name, value in entry.keepsake.items()},
    )


def _line(page: Page, **more: Any) -> bytes:
    fields = {name: getattr(page, name) for name in Page.__slots__}
    fields["owner"] = str(page.owner)
    fields["client_states"] = [[bound.name, bound.size] for bound in page.client_states]
    fields["shares"] = {name: [_key(key), theirs] for name, (key, theirs) in page.shares.items()}
    return lines.encode({"page": fields, **more})


def _parsed(body: Mapping[str, Any]) -> Page:
    fields = {name: value for name, value in body.items() if name in Page.__slots__}  # a newer khod may have written more
    fields["owner"] = Owner.parse(fields["owner"])
    fields["grade"] = Grade(fields["grade"])
    fields["state"] = InstanceState(fields["state"])
    fields["lifetime"] = Lifetime(fields["lifetime"])
    fields["requires"] = tuple(fields["requires"])
    fields["client_states"] = tuple(StateBound(str(name), int(size)) for name, size in fields["client_states"])
    fields["shares"] = {name: (_parsed_key(key), str(theirs)) for name, (key, theirs) in fields["shares"].items()}
    return Page(**fields)


def _key(key: Key) -> list[str]:
    return [str(key[0]), key[1]]


def _parsed_key(pair: Any) -> Key:
    owner, name = pair
    return (Owner.parse(owner), str(name))


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
    return digits or "0"


def _number(name: str) -> int:
    return int(name[1:], 36) if name.startswith(_DEPOSIT) and name[1:].isalnum() and name.isascii() else 0
