# SPDX-License-Identifier: LGPL-2.1-or-later
"""Retrieving, comparing, starting: in the process of the stage's custodian, before it serves.

Whatever fails here is said, and left to the khod that starts later: what was retrieved is in custody until then, what was not
is in the kernel. Nothing is finished here, nothing released.
"""

from __future__ import annotations

import os
import time

from khod.custodian.keeper import Keeper, Refusal
from khod.early import folios, paths, record, sampling, starting, system, tree
from khod.early.plan import Plan

try:
    from _sha2 import sha256  # type: ignore[import-not-found]  # Python 3.12
except ImportError:
    from _sha256 import sha256  # type: ignore[import-not-found]

SESSION = b"khod"
TREE = 0
ENOENT = 2
TYPE_CHECKING = False  # typing takes longer to import than all that is done here
if TYPE_CHECKING:
    from collections.abc import Callable


class Stopped(Exception):
    """The stage goes no further; the message says why."""


class Restore:
    """One restore. `say` takes a line for people; `go_on` lets the boot go on, and is called once for all."""

    def __init__(self, keeper: Keeper, plan: Plan, marks: dict[str, int], say: Callable[[str], None]) -> None:
        self._keeper, self._plan, self._marks, self._say = keeper, plan, marks, say
        self._record = -1
        self.began = False
        """Whether anybody's VMM was begun to be started."""
        self.more = False
        """Whether there are some to be started by `khod.driven`, which drivers have to do with."""

    def run(self) -> None:
        """All of it. Raises nothing but what nobody thought of."""
        try:
            found = self._read()
            self._record = record.begin()
            record.note(self._record, "update", found.update)
            self._keeper.keep(record.DEPOSIT.encode(), os.dup(self._record))
            self._start_all(found)
            for name, when in self._marks.items():
                record.note(self._record, "mark", name, when)
            for one in found.instances:
                self._retrieve_session(one)
        except Stopped as error:
            self._say(str(error))
        except Refusal as refusal:
            self._say(f"{refusal.text}: {os.strerror(refusal.status) if refusal.status > 0 else refusal.status}")
        except (OSError, ValueError) as error:
            self._say(f"restoring is left to khod: {error}")

    def _read(self) -> tree.Tree:
        """The tree of what came through. Raises Stopped, Refusal, ValueError."""
        try:
            session = self._keeper.retrieve_session(SESSION)
        except Refusal as refusal:
            if refusal.status == ENOENT:
                raise Stopped("nothing came through from an earlier kernel")
            raise
        fd = self._keeper.retrieve_fd(session, TREE)
        return tree.read(os.pread(fd, os.fstat(fd).st_size, 0), sha256)

    def _start_all(self, found: tree.Tree) -> None:
        """Start what the plan names."""
        root = ""
        for start in self._plan.starts:
            if start.also:
                self.more = True
                continue
            named = [one for one in found.instances if (one.owner, one.name) == (start.owner, start.name)]
            if not named:
                self._say(f"{start.name} of {start.owner} did not come through, and is not started here")
                continue
            try:
                if not root:
                    root = starting.prepare(os.access(paths.HOST_INIT, os.X_OK), self._say)
                self._start(found, named[0], start.command, root)
            except Stopped as error:
                self._say(f"{named[0].label} is not started here: {error}")
            except Refusal as refusal:
                self._say(f"{named[0].label} is not started here: {refusal.text}")
            except (OSError, ValueError, folios.NoFolio) as error:
                self._say(f"{named[0].label} is not started here: {error}")

    def _start(self, found: tree.Tree, one: tree.Instance, command: list[str], root: str) -> None:
        if one.why:
            raise Stopped(one.why)
        doubt = self._keeper_doubt(sum(one.sizes), len(one.names) + 1)
        if doubt:
            raise Stopped(f"it is not sure that it could be retrieved: {doubt}")
        fds = self._retrieve(one)
        self._mark("retrieved")
        self._compare(found.update, one, fds)
        self._mark("verified")
        given = [n for n, name in enumerate(one.names) if n < one.files or name in one.clients]
        words = [one.owner, one.name, one.session.decode()]
        self.began = True
        record.note(self._record, "start", *words, len(one.seen), one.checked)
        names = [one.names[n] for n in given]
        why = starting.start(root, command, names, [fds[n] for n in given], one.clients, (self._record, [words]))
        if why:
            raise Stopped(why)
        self._mark("resumed")
        self._say(f"{one.label} runs")

    def _mark(self, name: str) -> None:
        self._marks.setdefault(name, time.clock_gettime_ns(time.CLOCK_MONOTONIC))

    def _keeper_doubt(self, size: int, files: int) -> str:
        from khod.custodian.doubt import doubt

        return doubt(size, files, self._keeper.table_room())

    def _retrieve_session(self, one: tree.Instance) -> int:
        return self._keeper.retrieve_session(one.session)

    def _retrieve(self, one: tree.Instance) -> list[int]:
        session = self._retrieve_session(one)
        return [self._keeper.retrieve_fd(session, token) for token in range(len(one.names))]

    def _compare(self, update: str, one: tree.Instance, fds: list[int]) -> None:
        """Sizes, and the sample's frames, orders and bytes. Raises Stopped for what differs."""
        memory = [fds[index] for index in one.memory]
        looked_at = [*memory, *fds[one.files :]]
        found = [os.fstat(fd).st_size for fd in looked_at]
        if found != one.sizes:
            raise Stopped(f"files of {found} bytes came back, they had {one.sizes}")
        chosen = sampling.choose(update, one.label, one.sizes[: len(memory)], len(one.seen), sha256)
        if len(chosen) != len(one.seen):
            raise Stopped(f"a sample of {len(one.seen)} pages was noted of {len(chosen)} that there are")
        flags = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
        pagemap = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            for (index, page), before in zip(chosen, one.seen, strict=True):
                with system.Page(memory[index], page) as mapped:
                    pfn = folios.frame(folios.entries(pagemap, mapped.address // sampling.PAGE, 1)[0], page)
                    now = pfn | folios.folio(flags, pfn)[1] << sampling.ORDER_SHIFT
                if now != before:
                    raise Stopped(f"page {page} is in another frame than it was, or in another folio")
        finally:
            os.close(flags)
            os.close(pagemap)
        digest = sha256()
        for index, page in chosen[: one.checked]:
            digest.update(os.pread(memory[index], sampling.PAGE, page * sampling.PAGE))
        if digest.digest() != one.digest:
            raise Stopped("bytes differ in its sample")
