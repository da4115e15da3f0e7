# SPDX-License-Identifier: LGPL-2.1-or-later
"""The live update orchestrator: /dev/liveupdate, sessions, and the files in them (kernel/liveupdate, mm/memfd_luo.c).

An outgoing session unpreserves everything when its last descriptor goes; an incoming one finishes. What the previous kernel
left is read at the first open of the device, once, and if it cannot be read the device is dead for this boot.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import numpy as np

from khod.core.ports import F_SEAL_EXEC
from khod.core.refusals import MAX_PRESERVED, MAX_SESSION_NAME
from khod.folio.units import PAGE_SIZE, Folio
from khod.simulated.faults import OpenFailed
from khod.simulated.inode import IMPLIED_BY_EXEC, Inode, OpenFile
from khod.simulated.pages import Pages
from khod.simulated.record import FileRecord, SessionRecord, frames_of, free_blob, read_blob, write_blob
from khod.simulated.shmem import Shmem
from khod.simulated.special import Special
from khod.simulated.task import Cgroup, Task

MAX_PAGES = (1 << 32) - 1
KNOWN_SEALS = 0x3F


class OutOfMemoryKill(Exception):
    """The kernel ran out of memory in a call and killed whoever made it."""


@dataclass(slots=True)
class Limits:
    """Tables of the orchestrator: 10000 blocks for each list (luo.h)."""

    sessions: int = 510_000
    files: int = 630_000
    """In one session."""


@dataclass(slots=True)
class Preserved:
    """A file in an outgoing session."""

    file: OpenFile
    inode: Inode
    seals: int
    blob: int
    blob_folios: list[Folio]


class Session(Inode):
    """What a session's descriptor leads to."""

    def __init__(self, owner: LiveUpdate, name: bytes) -> None:
        super().__init__("session")
        self.owner = owner
        self.name = name


class Outgoing(Session):
    """A session of this kernel."""

    def __init__(self, owner: LiveUpdate, name: bytes) -> None:
        super().__init__(owner, name)
        self.files: dict[int, Preserved] = {}

    def free(self) -> None:
        """Unpreserve everything, last first; the name is free again."""
        while self.files:
            self.owner.unpreserve(self.files.popitem()[1])
        del self.owner.outgoing[self.name]


@dataclass(slots=True)
class Waiting:
    """A file in an incoming session: not retrieved, retrieved (`file`), or ruined (`errno`)."""

    record: FileRecord
    file: OpenFile | None = None
    errno: int = 0


class Incoming(Session):
    """A session of the previous kernel."""

    def __init__(self, owner: LiveUpdate, record: SessionRecord) -> None:
        super().__init__(owner, bytes.fromhex(record.name))
        self.files = {file.token: Waiting(file) for file in record.files}
        self.retrieved = False

    def finish(self) -> None:
        """Free what was not retrieved, and let go of the rest."""
        while self.files:
            waiting = self.files.popitem()[1]
            if waiting.file is not None:
                self.owner.held.discard(waiting.file.inode)
                waiting.file.put()
            elif not waiting.errno:
                self.owner.discard(waiting.record)

    def free(self) -> None:
        """Closing finishes; the name is unknown from now on."""
        self.finish()
        del self.owner.incoming[self.name]


@dataclass(eq=False)
class LiveUpdate:
    """The orchestrator of one boot. Methods that processes call take the process first and raise OSError."""

    pages: Pages
    handler: str
    """Compatible string of this kernel's memfd handler."""
    special: Special
    preserves: Collection[str] = ()
    """Kinds of files that it has handlers for besides."""
    missing: str = ""
    """Why there is no device; '' when there is one."""
    handed: list[SessionRecord] = field(default_factory=list)
    """What the previous kernel left, until the first open."""
    limits: Limits = field(default_factory=Limits)
    known_seals: int = KNOWN_SEALS
    outgoing: dict[bytes, Outgoing] = field(default_factory=dict)
    incoming: dict[bytes, Incoming] = field(default_factory=dict)
    held: set[Inode] = field(default_factory=set)
    """Files that were retrieved and whose session is not finished."""
    make: Callable[[FileRecord], Inode] = lambda record: Inode(record.kind, record.size)
    """Makes files that have no frames."""
    device: OpenFile | None = None
    opener: str = ""
    """Who opened the device last."""
    broken: str = ""

    # The device.

    def open_device(self, task: Task) -> int:
        """open("/dev/liveupdate"): one open file at a time, whatever descriptors lead to it."""
        self._enter()
        file = self.device = OpenFile(_Device(self))
        self.opener = f"{task.name}[{task.pid}]"
        return task.install(file)

    def probe(self, task: Task) -> None:
        """Open and close."""
        self._enter()

    def _enter(self) -> None:
        if self.missing:
            raise OpenFailed(errno.ENOENT, self.missing)
        if self.device is not None:
            raise OpenFailed(errno.EBUSY, f"open in {self.opener}")
        self._deserialise()
        if self.broken:
            raise OpenFailed(errno.EIO, self.broken)

    def _deserialise(self) -> None:
        for record in self.handed:
            for file in record.files:
                if file.handler not in self._handlers().values() and not self.broken:
                    self.broken = f"no handler for {file.handler!r}: this kernel has {self.handler!r}"
        if not self.broken:
            for session in (Incoming(self, record) for record in self.handed):
                self.incoming[session.name] = session
        self.handed = []

    def _handlers(self) -> dict[str, str]:
        """Compatible strings, by kinds of files."""
        return {"memfd": self.handler, **{kind: f"{kind}-v1" for kind in self.preserves}}

    # Sessions.

    def create_session(self, task: Task, name: bytes) -> int:
        """LIVEUPDATE_IOCTL_CREATE_SESSION."""
        self._enter()
        if not 1 <= len(name) <= MAX_SESSION_NAME or b"\0" in name:
            raise OSError(errno.EINVAL, "a name has 1 to 63 bytes")
        if name in self.outgoing:
            raise OSError(errno.EEXIST, "an outgoing session of that name is open")
        if len(self.outgoing) >= self.limits.sessions:
            raise OSError(errno.ENOSPC, "no more sessions")
        session = self.outgoing[name] = Outgoing(self, name)
        return task.install(OpenFile(session))

    def retrieve_session(self, task: Task, name: bytes) -> int:
        """LIVEUPDATE_IOCTL_RETRIEVE_SESSION: once."""
        self._enter()
        if len(task.table.files) >= task.table.limit:
            raise OSError(errno.EMFILE, f"{task.table.limit} descriptors are open")
        session = self.incoming.get(name)
        if session is None:
            raise OSError(errno.ENOENT, "no incoming session of that name")
        if session.retrieved:
            raise OSError(errno.EINVAL, "retrieved before")
        session.retrieved = True
        return task.install(OpenFile(session))

    def session_name(self, task: Task, fd: int) -> bytes:
        """LIVEUPDATE_SESSION_GET_NAME."""
        return self.session(task, fd).name

    def session(self, task: Task, fd: int) -> Session:
        """What a descriptor of a session leads to. Raises OSError(ENOTTY) for another."""
        inode = task.file(fd).inode
        if not isinstance(inode, Session):
            raise OSError(errno.ENOTTY, f"descriptor {fd} is a {inode.kind}")
        return inode

    # Files of an outgoing session.

    def preserve_fd(self, task: Task, session: int, fd: int, token: int) -> None:
        """LIVEUPDATE_SESSION_PRESERVE_FD. Raises OutOfMemoryKill where Linux kills the caller."""
        outgoing = self.session(task, session)
        if not isinstance(outgoing, Outgoing):
            raise OSError(errno.EINVAL, "an incoming session takes nothing")
        file = task.file(fd)
        if token in outgoing.files:
            raise OSError(errno.EEXIST, f"token {token} is in use")
        if len(outgoing.files) >= self.limits.files:
            raise OSError(errno.ENOSPC, "no more files")
        outgoing.files[token] = self._preserve(file)

    def _preserve(self, file: OpenFile) -> Preserved:
        inode = file.inode
        if inode.kind not in self._handlers():
            raise OSError(errno.ENOENT, f"no handler takes a {inode.kind}")
        if inode.frozen or inode in self.held:
            raise OSError(errno.EBUSY, "preserved already, or not finished yet")
        if (below := inode.builds_on()) is not None and not below.frozen:
            raise OSError(errno.EINVAL, f"a {inode.kind} is preserved after its {below.kind}")
        if not isinstance(inode, Shmem):
            inode.frozen = True
            return Preserved(file.get(), inode, 0, 0, [])
        size = inode.stat().size
        if -(-size // PAGE_SIZE) > MAX_PAGES:
            raise OSError(errno.EFBIG, f"{size} bytes")
        if size >= MAX_PRESERVED:
            raise OSError(errno.ENOMEM, f"the list of folios of {size} bytes cannot be allocated")
        if inode.seals & ~self.known_seals:
            raise OSError(errno.EOPNOTSUPP, f"seals {inode.seals:#x}")
        try:
            inode.pin()
            blob, folios = write_blob(self.pages, inode.pfns.astype("<i8").tobytes())
        except OSError as error:
            if error.errno == errno.ENOMEM:
                raise OutOfMemoryKill(error.strerror)
            raise
        inode.frozen = True
        return Preserved(file.get(), inode, inode.seals, blob, folios)

    def unpreserve(self, preserved: Preserved) -> None:
        """What closing an outgoing session does to each file."""
        preserved.inode.frozen = False
        free_blob(self.pages, preserved.blob_folios)
        preserved.file.put()

    def serialise(self) -> list[SessionRecord]:
        """Freeze: sessions in order of creation, files first in first out, positions as they are now."""
        records = []
        for session in self.outgoing.values():
            record = SessionRecord(session.name.hex())
            for token, kept in session.files.items():
                record.files.append(self._recorded(token, kept))
            records.append(record)
        return records

    def _recorded(self, token: int, kept: Preserved) -> FileRecord:
        inode, position = kept.inode, kept.file.position
        handler, order, private, inside = self._handlers()[inode.kind], 0, False, ""
        if isinstance(inode, Shmem):
            inode.settle()
            order, private = inode.order, inode.private
        else:
            inside = inode.inside(self._place)
        return FileRecord(token, handler, inode.size, order, kept.seals, position, kept.blob, inode.kind, private, inside)

    def _place(self, file: OpenFile) -> tuple[str, int]:
        """Session and token that a file is preserved under. What has none breaks the jump: here, it would be a bug."""
        return next(
            (name.hex(), token)
            for name, session in self.outgoing.items()
            for token, kept in session.files.items()
            if kept.inode is file.inode
        )

    def retrieved(self, session: str, token: int) -> OpenFile:
        """A file that was retrieved already. Raises OSError(ENOENT)."""
        incoming = self.incoming.get(bytes.fromhex(session))
        waiting = incoming.files.get(token) if incoming else None
        if waiting is None or waiting.file is None:
            raise OSError(errno.ENOENT, f"token {token} is not retrieved")
        return waiting.file

    # Files of an incoming session.

    def _waiting(self, task: Task, session: int, token: int) -> tuple[Incoming, Waiting]:
        incoming = self.session(task, session)
        if not isinstance(incoming, Incoming):
            raise OSError(errno.EINVAL, "an outgoing session gives nothing back")
        waiting = incoming.files.get(token)
        if waiting is None:
            raise OSError(errno.ENOENT, f"no token {token}")
        return incoming, waiting

    def retrieve_fd(self, task: Task, session: int, token: int) -> int:
        """LIVEUPDATE_SESSION_RETRIEVE_FD. A handler that fails has freed the file, and fails the same way for ever."""
        _, waiting = self._waiting(task, session, token)
        if waiting.errno:
            raise OSError(waiting.errno, f"token {token} failed before")
        if waiting.file is None:
            if len(task.table.files) >= task.table.limit:  # before the handler is asked: nothing is lost
                raise OSError(errno.EMFILE, f"{task.table.limit} descriptors are open")
            if not task.cgroup.admits(waiting.record.size):
                self.retrieve_failed(task, errno.ENOMEM, session, token)
                raise OSError(errno.ENOMEM, f"the memory limit of {task.name}[{task.pid}]")
            waiting.file = self._revive(waiting.record, task.cgroup).get()
        return task.install(waiting.file)

    def retrieve_failed(self, task: Task, number: int, session: int, token: int) -> None:
        """The handler fails with `number`: the file's folios are freed."""
        _, waiting = self._waiting(task, session, token)
        if waiting.file is None and not waiting.errno:
            waiting.errno = number
            self.discard(waiting.record)

    def _revive(self, record: FileRecord, cgroup: Cgroup) -> OpenFile:
        """A fresh executable root-owned memfd with the old folios: so F_SEAL_EXEC brings its company along (0x3e)."""
        if not record.folios:
            bare = self.make(record)
            self.held.add(bare)
            return OpenFile(bare)
        inode = self.special.shmem(record.kind, order=record.order, private=record.private)
        inode.pfns, inode.size = frames_of(self.pages.ram, record), record.size
        inode.seals = record.seals | (IMPLIED_BY_EXEC if record.seals & F_SEAL_EXEC else 0)
        inode.charge, inode.charged = cgroup, record.size
        cgroup.charged += record.size
        free_blob(self.pages, read_blob(self.pages.ram, record.folios)[1])
        self.held.add(inode)
        return OpenFile(inode, position=record.position)

    def discard(self, record: FileRecord) -> None:
        """Free a file that nobody retrieved."""
        if not record.folios:
            return
        listed, folios = read_blob(self.pages.ram, record.folios)
        self.pages.give_back(np.frombuffer(listed, dtype="<i8").astype(np.int64), record.order)
        free_blob(self.pages, folios)

    def finish(self, task: Task, session: int) -> None:
        """LIVEUPDATE_SESSION_FINISH; again: no effect."""
        incoming = self.session(task, session)
        if not isinstance(incoming, Incoming):
            raise OSError(errno.EINVAL, "an outgoing session does not finish")
        incoming.finish()


class _Device(Inode):
    """/dev/liveupdate, open."""

    def __init__(self, owner: LiveUpdate) -> None:
        super().__init__("device")
        self.owner = owner

    def free(self) -> None:
        self.owner.device = None
