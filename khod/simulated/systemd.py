# SPDX-License-Identifier: LGPL-2.1-or-later
"""PID 1, where it is a systemd: a store of descriptors that outlives services, and the jump that it makes (decision 17).

What the custodian stores goes by a label: ('deposit', name), ('session', name) or ('outgoing', name). On the way into the
next kernel outgoing sessions travel by themselves, under their own names; everything else travels in PID 1's own session
`systemd`, if the kernel preserves it, and is lost otherwise. Token 0 of that lists it all.
"""

from __future__ import annotations

import errno
import json
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event

from khod.simulated.inode import Inode, OpenFile
from khod.simulated.luo import LiveUpdate, Outgoing, OutOfMemoryKill
from khod.simulated.shmem import Shmem
from khod.simulated.task import Task

Label = tuple[str, str]
_SESSION = b"systemd"


class _Inhibitor(Inode):
    """What logind hands out: the shutdown waits while it is open."""

    def __init__(self, owner: Systemd, why: str) -> None:
        super().__init__("other")
        self.owner = owner
        self.why = why

    def free(self) -> None:
        self.owner.inhibitors.remove(self.why)


@dataclass(eq=False)
class Systemd:
    """PID 1 of one boot. `take_back` is the first thing that it does, `hand_over` the last."""

    task: Task
    luo: LiveUpdate
    store: dict[Label, int] = field(default_factory=dict)
    """Descriptors of PID 1's, by label."""
    store_max: int = 524_288
    """FileDescriptorStoreMax= of the custodian's unit."""
    doubt: str = ""
    """Why it does not carry its store into the next kernel, as one before 261; '' when it does."""
    at_once: bool = True
    """Whether ``systemctl kexec`` has everybody stopped before it returns. If not, it returns, as it does on Linux, and
    whoever plays the machine calls `Kernel.shut_down` when it is time."""
    asked: Event = field(default_factory=Event)
    """Set when it was asked to jump."""
    inhibitors: list[str] = field(default_factory=list)
    """Reasons of those who hold off a shutdown now."""

    def put(self, label: Label, file: OpenFile) -> None:
        """Store a descriptor; what was stored under that label before is let go of, after."""
        before = self.store.get(label)
        self.store[label] = self.task.install(file)
        if before is not None:
            self.task.close(before)

    def remove(self, label: Label) -> None:
        """Let go of what is stored; nothing: no effect."""
        fd = self.store.pop(label, None)
        if fd is not None:
            self.task.close(fd)

    def stored(self, label: Label) -> OpenFile:
        """What is stored under a label."""
        return self.task.lookup(self.store[label])

    def inhibit(self, task: Task, why: str) -> int:
        """logind's Inhibit("shutdown", …, "delay")."""
        self.inhibitors.append(why)
        return task.install(OpenFile(_Inhibitor(self, why)))

    # Across the jump.

    def hand_over(self) -> None:
        """What systemd-shutdown does with the store before it jumps, when it has killed everybody else. A descriptor that the
        kernel does not preserve is lost."""
        self.remove(("outgoing", _SESSION.decode()))  # that name is PID 1's own
        session = self.luo.create_session(self.task, _SESSION)
        listed: list[dict[str, object]] = []
        for number, (label, fd) in enumerate(self.store.items(), 1):
            inode = self.task.lookup(fd).inode
            if isinstance(inode, Outgoing):
                listed.append({"label": label, "session": inode.name.hex()})
                continue
            with suppress(OSError, OutOfMemoryKill):  # "will be lost across kexec"
                self.luo.preserve_fd(self.task, session, fd, number)
                listed.append({"label": label, "token": number})
        index = Shmem(self.luo.pages)
        index.write(0, json.dumps(listed).encode())
        self.luo.preserve_fd(self.task, session, self.task.install(OpenFile(index)), 0)

    def take_back(self) -> None:
        """Open the device before anybody else does, and fill the store with what the PID 1 before left."""
        try:
            session = self.luo.retrieve_session(self.task, _SESSION)
        except OSError:
            return  # no device, a broken one, or nothing handed over
        index = self.task.file(self.luo.retrieve_fd(self.task, session, 0)).inode
        assert isinstance(index, Shmem)
        for entry in json.loads(index.read(0, index.stat().size)):
            kind, name = entry["label"]
            with suppress(OSError):
                if "session" in entry:
                    fd = self.luo.retrieve_session(self.task, bytes.fromhex(entry["session"]))
                    kind = "session"
                else:
                    fd = self.luo.retrieve_fd(self.task, session, entry["token"])
                self.store[kind, name] = fd
        self.luo.finish(self.task, session)
        for fd in set(self.task.table.files) - set(self.store.values()):
            self.task.close(fd)


def absent(what: str) -> OSError:
    """What a call fails with that needs a systemd."""
    return OSError(errno.ENXIO, what)
