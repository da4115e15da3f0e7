# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is kept, step by step, and what the survivor makes of a step that was not ended.

Either twin can be killed between any two instructions. The other finds the same descriptors and the labels of `table`; this is
what it can find (`recover`), and why nothing is lost and nothing is double whichever it is:

No label.
    A connection, a pipe, /dev/liveupdate: closed. The last above all, which nobody else can open as long as we have it.
    A descriptor that a client sent: closed. The client has no answer, has its own descriptor, and asks again.
    A retrieved file: closed. The session, which has its label, gives it again.
    An incoming session: this one *is* the only descriptor, and closing it frees its memory. It says its own name, so it gets
    the label that it was about to get. `Table.retrieving` tells it from a session that a client sent.
STORING.
    PID 1 may have it or not, and the client has no answer: taken out there, and closed.
DEPOSIT twice under one name.
    One was about to take the other's place: the older goes. (Their ages are in the labels.)
DROPPING.
    The client was going to hear that it is gone: so it goes.
SESSION that is not marked as stored.
    Given to PID 1, once more or for the first time: PID 1 tells that it is the same file.
Table.offered.
    Left as it is: `offer` and `withdraw` may both be asked again, and each ends what a dead twin began.

Marks are the names in PID 1's store. A deposit's is its own name, with a letter (none, A, B, none, …) that changes whenever
another file takes its place: for a moment the store has both, and must be told to drop the old one. A session's is S and a
number, an offered one's O, six digits of the boot's id, and a number: out of the store of another boot it comes as an incoming
one.
"""

from __future__ import annotations

import fcntl
import os
import stat

from khod.custodian import luo, protocol
from khod.custodian.log import ERROR, WARNING, say
from khod.custodian.store import LONGEST_MARK, NAMES, Silent, Store
from khod.custodian.table import DEPOSIT, DROPPING, FILE, FOREIGN, NOTHING, OFFERED, SESSION, STORING, Table

SPARE = 64
"""Numbers of the table that are left for connections and for what is on its way."""
_FILES = 1 << 32
"""Added to a file's number, so that files come behind their sessions."""
_LETTERS = (b"", b"A", b"B")
_NAME = frozenset(b"abcdefghijklmnopqrstuvwxyz0123456789")


class Refusal(Exception):
    """A request that is not done; `status` and `text` are those of the protocol's answer."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status, self.text = status, text


def check_name(name: bytes) -> bytes:
    """A deposit's name. Raises Refusal."""
    if not 1 <= len(name) <= protocol.MAX_NAME or not _NAME.issuperset(name):
        raise Refusal(protocol.INVALID, f"a deposit's name is 1 to {protocol.MAX_NAME} of a-z and 0-9, not {name!r}")
    return name


class Keeper:
    """All that is held. A descriptor that it is given is its own as soon as it has a label, and the caller's to close as long
    as it has none; those that it returns stay its own, to be passed on at once."""

    def __init__(self, table: Table, store: Store, device: str, boot: str) -> None:
        self.table, self.store = table, store
        self._device = device
        self._offered_mark = b"O" + boot.replace("-", "")[:6].encode()
        self._forget()

    def _forget(self) -> None:
        # What follows from the labels.
        self.deposits: dict[bytes, int] = {}
        self.sessions: dict[bytes, int] = {}
        self.files: dict[int, dict[int, int]] = {}  # of each session, by token
        self.offers: set[int] = set()
        self.leftovers: set[int] = set()  # DROPPING, and PID 1 did not listen
        self._marks: dict[bytes, int] = {}
        self._inodes: dict[tuple[int, int], set[int]] = {}
        self._age = 0
        self._number = 0

    # -- deposits

    def keep(self, name: bytes, fd: int) -> None:
        """Keep `fd`. Raises Refusal, with nothing changed."""
        check_name(name)
        old = self.deposits.get(name)
        if old is not None and luo.same(old, fd):  # asked again
            self._in_store(old)
            return
        self._check_room(self._wanted())
        fd = self._apart(fd)
        self._age += 1
        letter = b""
        if old is not None:
            letter = _LETTERS[(_LETTERS.index(self.table.read(old).mark[len(name) :]) + 1) % 3]
        self._label(fd, STORING, name, name + letter, token=self._age)
        try:
            self._in_store(fd)
        except Silent:
            self._drop(fd)
            raise
        self.table.set_kind(fd, DEPOSIT)
        self.deposits[name] = fd
        if old is not None:
            self._drop(old)

    def take(self, name: bytes) -> int:
        """What is kept under `name`. Raises Refusal."""
        fd = self.deposits.get(name)
        if fd is None:
            raise Refusal(protocol.INVALID, f"nothing is kept under the name {name.decode('utf-8', 'replace')!r}")
        return fd

    def drop(self, names: list[bytes]) -> None:
        """Let go of these. Raises Silent when PID 1 did not confirm: they are no longer kept, and ours goes when its does."""
        going = [*self.leftovers, *(self.deposits[name] for name in dict.fromkeys(names) if name in self.deposits)]
        for fd in going:
            self._drop(fd)
        self._confirm(bool(going))

    # -- incoming sessions

    def retrieve_session(self, name: bytes) -> int:
        """The incoming session: the one that is held, or the kernel's. Raises Refusal."""
        fd = self.sessions.get(name)
        if fd is None:
            fd = self._retrieve_session(name)
        self._in_store(fd)
        return fd

    def _retrieve_session(self, name: bytes) -> int:
        if not 1 <= len(name) <= 63 or b"\0" in name:
            raise Refusal(protocol.INVALID, f"a session's name is 1 to 63 bytes without NUL, not {name!r}")
        self._check_room(self._wanted())
        try:
            device = os.open(self._device, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise Refusal(error.errno or -1, "open_device")
        self.table.retrieving = True
        try:
            fd = luo.retrieve_session(device, name)
            self._label(fd, SESSION, name, self._new_mark(b"S"))
        except OSError as error:
            raise Refusal(error.errno or -1, "retrieve_session")
        finally:
            self.table.retrieving = False
            os.close(device)
        self.sessions[name] = fd
        return fd

    def retrieve_fd(self, given: int, token: int) -> int:
        """The file behind `token` of the session that `given`, which is borrowed, is a duplicate of. Raises Refusal."""
        try:
            session = self.sessions.get(luo.name(given)) if luo.is_session(given) else None
        except OSError:
            session = None
        if session is None or not luo.same(session, given):
            raise Refusal(protocol.UNHELD, "the session is none of those in custody")
        known = self.files.get(session, {}).get(token)
        if known is not None:
            return known
        self._check_room(stored=False)
        try:
            fd = luo.retrieve_fd(session, token)
        except OSError as error:
            raise Refusal(error.errno or -1, "retrieve_fd")
        self._label(fd, FILE, session=session, token=token)
        return fd

    def release(self, name: bytes) -> None:
        """Let go of a session and its files."""
        going = [*self.leftovers, *([self.sessions[name]] if name in self.sessions else [])]
        for fd in going:
            self._drop(fd)
        self._confirm(bool(going))

    # -- a jump that PID 1 makes

    def offer(self, fds: list[int], last: bool) -> None:
        """Give outgoing sessions to PID 1's store; with the last of them, take all others out. Raises Refusal."""
        if not self.store.room:
            raise Refusal(protocol.REFUSED, "no fd store: it takes systemd 254 and FileDescriptorStoreMax= of the unit")
        if not all(map(luo.is_session, fds)):
            raise Refusal(protocol.INVALID, "what is offered is not a live-update session")
        for fd in fds:
            if not any(luo.same(fd, other) for other in self.offers):
                self._offer(fd)
        if last:
            self.table.offered = True
            for fd in [*self.deposits.values(), *self.sessions.values()]:
                label = self.table.read(fd)
                if label.stored:
                    self.store.remove(label.mark)
                    self.table.set_stored(fd, False)
            self.store.barrier()

    def _offer(self, fd: int) -> None:
        self._check_room(stored=True)
        self._label(fd, STORING, luo.name(fd), self._new_mark(self._offered_mark))
        try:
            self._in_store(fd, offered=True)
        except Silent:
            self._drop(fd)
            raise
        self.table.set_kind(fd, OFFERED)
        self.offers.add(fd)

    def withdraw(self) -> None:
        """Undo `offer`, however far it came. Raises Silent; asked again, it goes on."""
        if not self.table.offered and not self.offers:
            return
        # Room for the rest first: sessions that are no longer offered can only be in the way.
        for fd in [*self.offers, *self.leftovers]:
            self._drop(fd)
        if self.store.room and self.table.offered:
            for fd in [*self.deposits.values(), *self.sessions.values()]:
                self.store.add(self.table.read(fd).mark, fd)
            self.store.barrier()
            for fd in [*self.deposits.values(), *self.sessions.values()]:
                self.table.set_stored(fd, True)
        self.table.offered = False

    # -- from one custodian to another

    def next_held(self, after: int) -> tuple[int, int]:
        """Deposits and sessions, and behind them the files, one after the other: where to go on, and the descriptor; (0, -1)
        behind the last one."""
        held = [*self.deposits.values(), *self.sessions.values()]
        held += [_FILES + fd for files in self.files.values() for fd in files.values()]
        place = min((fd for fd in held if fd > after), default=0)
        return (place, place % _FILES) if place else (0, -1)

    def inherit(self, fd: int, kind: int, name: bytes, session: int, token: int) -> int:
        """Take over what another custodian has held: `fd`, or what is held of the same kind and name already. Returns the
        number by which it is held; 0 for a file whose session is not."""
        self._check_room(stored=kind != FILE and self._wanted())
        if kind == DEPOSIT:
            held = self.deposits.get(name)
            if held is None:
                self.keep(name, fd)
            return self.deposits[name]
        if kind == SESSION:
            held = self.sessions.get(name)
            if held is None:
                self._label(fd, SESSION, name, self._new_mark(b"S"))
                self.sessions[name] = held = fd
            self._in_store(held)
            return held
        if not self.table.kind(session):
            return 0
        known = self.files.get(session, {}).get(token)
        if known is None:
            self._label(fd, FILE, session=session, token=token)
        return fd if known is None else known

    # -- limits

    def holds(self) -> int:
        """Descriptors that are held."""
        files = sum(map(len, self.files.values()))
        return len(self.deposits) + len(self.sessions) + files + len(self.offers)

    def room(self) -> int:
        """How many more deposits there is room for."""
        room = self.table_room()
        return min(room, self._store_room()) if self.store.room else room

    def table_room(self) -> int:
        """How many more descriptors the table takes."""
        return max(0, self.table.numbers - SPARE - self.holds() - len(self.leftovers))

    def _store_room(self) -> int:
        used = len(self._marks)
        names = sum(map(len, self._marks)) + used
        return max(0, min(self.store.room - used, (NAMES - names) // (LONGEST_MARK + 1)))

    def _check_room(self, stored: bool) -> None:
        if self.table_room() < 1:
            raise Refusal(protocol.FULL, f"the custodian may have {self.table.numbers} descriptors open (LimitNOFILE=)")
        if stored and self._store_room() < 1:
            raise Refusal(protocol.FULL, f"PID 1's store takes {self.store.room} descriptors (FileDescriptorStoreMax=)")

    # -- labels and PID 1

    def _wanted(self) -> bool:
        # While sessions are offered, the store is theirs alone.
        return bool(self.store.room) and not self.table.offered

    def _in_store(self, fd: int, *, offered: bool = False) -> None:
        """Have PID 1 hold it too, if it shall and does not. Raises Silent."""
        label = self.table.read(fd)
        if label.mark and not label.stored and (offered or self._wanted()):
            self.store.add(label.mark, fd)
            self.store.barrier()
            self.table.set_stored(fd, True)

    def _label(self, fd: int, kind: int, name: bytes = b"", mark: bytes = b"", session: int = 0, token: int = 0) -> None:
        self.table.write(fd, kind, name=name, mark=mark if self.store.room else b"", session=session, token=token)
        self._index(fd)

    def _index(self, fd: int) -> None:
        label = self.table.read(fd)
        if label.mark:
            self._marks[label.mark] = fd
            if label.mark[:1] in b"SO":
                self._number = max(self._number, int(label.mark[1 if label.mark[:1] == b"S" else 7 :] or b"0", 16))
        if label.kind == FILE:
            self.files.setdefault(label.session, {})[label.token] = fd
            return
        status = os.fstat(fd)
        self._inodes.setdefault((status.st_dev, status.st_ino), set()).add(fd)

    def _new_mark(self, prefix: bytes) -> bytes:
        return b"%s%x" % (prefix, self._number + 1)

    def _apart(self, fd: int) -> int:
        # PID 1 takes one open file once: a second name for it would be none, and dropping the first would drop both. So a
        # file that is kept already gets an open file of its own.
        status = os.fstat(fd)
        for other in self._inodes.get((status.st_dev, status.st_ino), ()) if self.store.room else ():
            if luo.same(fd, other):
                if not stat.S_ISREG(status.st_mode):
                    raise Refusal(protocol.INVALID, f"the file is kept already, as {self.table.read(other).name!r}")
                access = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
                return os.open(f"{luo.FDS}/{fd}", access | os.O_CLOEXEC)
        return fd

    def _drop(self, fd: int) -> None:
        """Let go, however far somebody came with it before."""
        label = self.table.read(fd)
        self.table.set_kind(fd, DROPPING)
        for index in (self.deposits, self.sessions):
            if index.get(label.name) == fd:
                del index[label.name]
        self.offers.discard(fd)
        self.leftovers.discard(fd)
        for file in self.files.pop(fd, {}).values():
            self._close(file)
        if label.mark:
            try:
                self.store.remove(label.mark)
            except Silent as error:
                say(f"{label.mark.decode()} is not dropped yet: {error}", WARNING)
                self.leftovers.add(fd)
                return
            self._marks.pop(label.mark, None)
        status = os.fstat(fd)
        self._inodes.get((status.st_dev, status.st_ino), set()).discard(fd)
        self._close(fd)

    def _close(self, fd: int) -> None:
        self.table.set_kind(fd, NOTHING)
        os.close(fd)

    def _confirm(self, anything: bool) -> None:
        if anything and self.store.room:
            self.store.barrier()

    # -- starting, and taking over

    def adopt(self, given: list[tuple[int, bytes]]) -> None:
        """Take back what PID 1 kept while there was no custodian, or through a jump of its own."""
        for fd, mark in given:
            if fd >= self.table.numbers:
                say(f"{mark!r} stays in PID 1's store: descriptor {fd} is beyond LimitNOFILE={self.table.numbers}", ERROR)
                continue
            os.set_inheritable(fd, False)
            name = mark[:-1] if mark[-1:] in _LETTERS[1:] else mark
            if 1 <= len(name) <= protocol.MAX_NAME and _NAME.issuperset(name):
                self._adopt_deposit(fd, name, mark)
            elif luo.is_session(fd) and mark[:1] in (b"S", b"O"):
                self._adopt_session(fd, mark)
            else:
                say(f"PID 1's store has {mark!r} of this unit, which no custodian gave it", WARNING)
                self._label(fd, FOREIGN, mark=mark[:16])
            self.table.set_stored(fd, True)

    def _adopt_deposit(self, fd: int, name: bytes, mark: bytes) -> None:
        self._age += 1
        self._label(fd, DEPOSIT, name, mark, token=self._age)
        other = self.deposits.get(name)
        self.deposits[name] = fd
        if other is not None:
            # Somebody died between giving PID 1 the one and taking back the other.
            before, after = (_LETTERS.index(self.table.read(which).mark[len(name) :]) for which in (other, fd))
            newer, older = (fd, other) if after == (before + 1) % 3 else (other, fd)
            self.deposits[name] = newer
            self._drop(older)

    def _adopt_session(self, fd: int, mark: bytes) -> None:
        name = luo.name(fd)
        if mark.startswith(self._offered_mark):
            self._label(fd, OFFERED, name, mark)
            self.offers.add(fd)
            self.table.offered = True
        else:
            self._label(fd, SESSION, name, mark)
            self.sessions[name] = fd

    def recover(self, ours: set[int]) -> None:
        """Make order after the death of the twin that served; `ours` are the descriptors of the program itself. Interrupted by
        a death, it may be done again."""
        self._forget()
        unlabelled = []
        for fd in sorted(map(int, os.listdir(luo.FDS))):
            if fd >= self.table.numbers or self.table.kind(fd) == NOTHING:
                unlabelled.append(fd)
            else:
                self._recall(fd)
        for fd in unlabelled:
            if fd in ours:
                continue
            if self.table.retrieving and luo.is_session(fd):
                name = luo.name(fd)
                self._label(fd, SESSION, name, self._new_mark(b"S"))
                self.sessions[name] = fd
            else:
                try:
                    os.close(fd)
                except OSError:
                    pass  # the listing's own
        self.table.retrieving = False
        for fd in list(self.leftovers):
            self._drop(fd)
        try:
            for fd in self.sessions.values():
                self._in_store(fd)
        except Silent as error:  # whoever asks for it has it tried again
            say(str(error), ERROR)

    def _recall(self, fd: int) -> None:
        label = self.table.read(fd)
        self._index(fd)
        if label.kind == SESSION:
            self.sessions[label.name] = fd
        elif label.kind == OFFERED:
            self.offers.add(fd)
        elif label.kind in (STORING, DROPPING):
            self.leftovers.add(fd)
        elif label.kind == DEPOSIT:
            self._age = max(self._age, label.token)
            other = self.deposits.get(label.name)
            if other is None or self.table.read(other).token < label.token:
                self.deposits[label.name] = fd
                fd = -1 if other is None else other
            if fd >= 0:
                self.leftovers.add(fd)
