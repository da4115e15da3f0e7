# SPDX-License-Identifier: LGPL-2.1-or-later
"""The custodian: two processes that share one table of descriptors and hold in it what must outlive khod (decision 18).

The twins are processes of the machine, listed and killed as others are. While one of them lives it makes a new twin, and
nothing closes. When both are gone, everything that only they held is gone with them; unless PID 1 has it in its store and
gives it to the custodian that it starts in their place. Without systemd the next process that asks for custody for the first
time starts one, as a khod that starts does; whoever talked to the dead one is told that it is gone.

Each call takes the calling process first and raises OSError: EMFILE when no more can be kept, ECONNREFUSED when nobody
answers, ENXIO for what needs a systemd.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from khod.simulated.inode import OpenFile
from khod.simulated.luo import LiveUpdate, Outgoing
from khod.simulated.systemd import Label, Systemd, absent
from khod.simulated.task import Cgroup, Table, Task

NAME = "custodian"
DESCRIPTORS = 524_288
"""LimitNOFILE= of the custodian's unit."""


@dataclass(slots=True)
class Session:
    """An incoming session that is held, and what was retrieved from it, by token."""

    fd: int
    files: dict[int, int] = field(default_factory=dict)


@dataclass(eq=False)
class Custodian:
    """The custodians of one boot, one after the other. `fork` makes a process: a twin of another one, or a new one."""

    luo: LiveUpdate
    systemd: Systemd | None
    fork: Callable[[str, Task | None], Task]
    cgroup: Cgroup = field(default_factory=Cgroup)
    """Of its unit: what it retrieves is charged there, whichever process of it does."""
    limit: int = DESCRIPTORS
    twins: list[Task] = field(default_factory=list)
    """The two, or none."""
    number: int = 0
    """Of the running one; the first has 1."""
    _deposits: dict[str, int] = field(default_factory=dict)
    _sessions: dict[str, Session] = field(default_factory=dict)
    _offered: dict[str, int] = field(default_factory=dict)
    _offering: bool = False

    def start(self) -> None:
        """Start a custodian; it takes what is in PID 1's store."""
        self.number += 1
        first = self.fork(NAME, None)
        first.cgroup, first.table.limit = self.cgroup, self.limit
        self.twins = [first, self.fork(NAME, first)]
        self._deposits, self._sessions, self._offered, self._offering = {}, {}, {}, False
        for label in list(self.systemd.store) if self.systemd is not None else ():
            self._take_over(label)

    def _take_over(self, label: Label) -> None:
        assert self.systemd is not None
        match label:
            case ("deposit", name):
                self._deposits[name] = self._table.install(self.systemd.stored(label))
            case ("session", name):
                self._sessions[name] = Session(self._table.install(self.systemd.stored(label)))
            case ("outgoing", name):
                self._offered[name] = self._table.install(self.systemd.stored(label))
                self._offering = True

    def mourn(self) -> None:
        """Processes have died: a twin makes another twin, and PID 1 another custodian."""
        living = [twin for twin in self.twins if not twin.dead]
        if len(living) == len(self.twins):
            return
        if living:
            self.twins = [living[0], self.fork(NAME, living[0])]
            return
        self.twins = []
        if self.systemd is not None:
            self.start()

    # What every call begins with.

    @property
    def _table(self) -> Table:
        return self.twins[0].table

    def _reach(self, task: Task) -> None:
        """Connect the caller. Raises OSError(ECONNREFUSED) if the custodian that it talked to is gone."""
        if not self.twins and task.custodian == 0:
            self.start()
        gone = not self.twins or (self.systemd is None and task.custodian not in (0, self.number))
        if gone:
            raise OSError(errno.ECONNREFUSED, "both processes of the custodian are gone, and what they held")
        task.custodian = self.number

    def _labels(self) -> Iterator[tuple[Label, int]]:
        """All that belongs in the store while nothing is offered. Not the files of a session: until it is finished it gives
        them again."""
        for name, fd in self._deposits.items():
            yield ("deposit", name), fd
        for name, session in self._sessions.items():
            yield ("session", name), session.fd

    def _room(self, *, stored: bool = True) -> int:
        left = self._table.limit - len(self._table.files)
        if self.systemd is not None and stored:
            left = min(left, self.systemd.store_max - len(self._deposits) - len(self._sessions) - len(self._offered))
        return max(0, left)

    def _need(self, count: int, *, stored: bool = True) -> None:
        if self._room(stored=stored) < count:
            raise OSError(errno.EMFILE, f"room for {self._room(stored=stored)} more descriptors, {count} are needed")

    def _store(self, label: Label, fd: int) -> None:
        if self.systemd is not None and not self._offering:
            self.systemd.put(label, self._table.files[fd])

    def _unstore(self, label: Label) -> None:
        if self.systemd is not None:
            self.systemd.remove(label)

    # Deposits.

    def keep(self, task: Task, name: str, fd: int) -> None:
        """Take a duplicate; only then let go of the one before."""
        self._reach(task)
        file = task.lookup(fd)
        self._need(1)
        before = self._deposits.get(name)
        self._deposits[name] = self._table.install(file)
        self._store(("deposit", name), self._deposits[name])
        if before is not None:
            self._table.close(before)

    def kept(self, task: Task) -> list[str]:
        """Names of the deposits."""
        self._reach(task)
        return list(self._deposits)

    def take(self, task: Task, name: str) -> int:
        """A duplicate for the caller."""
        self._reach(task)
        if name not in self._deposits:
            raise OSError(errno.ENOENT, "nothing of that name is kept")
        return task.install(self._table.files[self._deposits[name]])

    def drop(self, task: Task, names: Sequence[str]) -> None:
        """Let go."""
        self._reach(task)
        for name in names:
            if name in self._deposits:
                self._unstore(("deposit", name))
                self._table.close(self._deposits.pop(name))

    # Incoming sessions.

    def retrieve_session(self, task: Task, name: bytes) -> int:
        """Made by a twin, stored, and only then given to the caller; asked again, what is held."""
        self._reach(task)
        text = name.decode("utf-8", "surrogateescape")
        if text not in self._sessions:
            self._need(1)
            self._sessions[text] = Session(self.luo.retrieve_session(self.twins[0], name))
            self._store(("session", text), self._sessions[text].fd)
        return task.install(self._table.files[self._sessions[text].fd])

    def retrieve_fd(self, task: Task, session: int, token: int) -> int:
        """Likewise. Of a session that is not held here, the kernel gives it to the caller alone, or says why not."""
        self._reach(task)
        inode = self.luo.session(task, session)
        held = self._sessions.get(inode.name.decode("utf-8", "surrogateescape"))
        if held is None or self._table.files[held.fd].inode is not inode:
            return self.luo.retrieve_fd(task, session, token)
        if token not in held.files:
            self._need(1, stored=False)
            held.files[token] = self.luo.retrieve_fd(self.twins[0], held.fd, token)
        return task.install(self._table.files[held.files[token]])

    def sessions(self, task: Task) -> list[str]:
        """Names of those that are held."""
        self._reach(task)
        return list(self._sessions)

    def release(self, task: Task, session: str) -> None:
        """Let go of a session, then of its files."""
        self._reach(task)
        held = self._sessions.pop(session, None)
        if held is None:
            return
        self._unstore(("session", session))
        self._table.close(held.fd)
        for fd in held.files.values():
            self._table.close(fd)

    # For a jump by PID 1.

    def offer(self, task: Task, sessions: Sequence[int]) -> None:
        """Outgoing sessions into PID 1's store, everything else out of it."""
        self._reach(task)
        if self.systemd is None:
            raise absent("offer: systemd is not PID 1 here")
        files: dict[str, OpenFile] = {}
        for fd in sessions:
            inode = self.luo.session(task, fd)
            if not isinstance(inode, Outgoing):
                raise OSError(errno.EINVAL, f"descriptor {fd} is an incoming session")
            files[inode.name.decode("utf-8", "surrogateescape")] = task.lookup(fd)
        self._need(len(files))
        before = self._offered
        self._offered = {name: self._table.install(file) for name, file in files.items()}
        for name, file in files.items():
            self.systemd.put(("outgoing", name), file)
        for label in set(self.systemd.store) - {("outgoing", name) for name in files}:
            self.systemd.remove(label)
        for fd in before.values():
            self._table.close(fd)
        self._offering = True

    def withdraw(self, task: Task) -> None:
        """Undo `offer`."""
        self._reach(task)
        if not self._offering:
            return
        self._offering = False
        for label, fd in self._labels():
            self._store(label, fd)
        for name, fd in self._offered.items():
            self._unstore(("outgoing", name))
            self._table.close(fd)
        self._offered = {}

    # What can be known beforehand.

    def room(self, task: Task) -> int:
        """Descriptors that can still be kept."""
        self._reach(task)
        return self._room()

    def doubt(self, task: Task, size: int, files: int) -> str:
        """Why retrieving might fail; '' when it will not."""
        self._reach(task)
        if not self.cgroup.admits(size):
            left = (self.cgroup.memory_max or 0) - self.cgroup.charged
            return f"{size} bytes do not fit under memory.max of khod-custodian.service ({left} left): raise MemoryMax="
        if (room := self._room(stored=False)) < files:
            return f"khod-custodian.service has room for {room} more descriptors, not for {files}: raise LimitNOFILE="
        return ""

    def limit_custody(self, task: Task, memory: int | None, descriptors: int) -> None:
        """Set the limits of the custodian's unit, as the host's administrator does."""
        self.cgroup.memory_max, self.limit = memory, descriptors
        if self.twins:
            self._table.limit = descriptors
