# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod.core.journal import Journal, Record, decode, encode
from khod.core.ports import Boot
from khod.core.state import State
from khod.errors import JournalError, MachineError

BOOT = Boot("boot-1", "7.3.4", handover=False)


class MemoryStore:
    """A Store in memory: what is in `data` is on the disk."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = data

    def read(self) -> bytes:
        return self.data

    def append(self, data: bytes) -> None:
        self.data += data

    def cut(self, length: int) -> None:
        self.data = self.data[:length]


def journal(store: MemoryStore) -> Journal:
    return Journal(store, BOOT, lambda: 1234)


def filled() -> MemoryStore:
    store = MemoryStore()
    one = journal(store)
    one.note("u1", "state", state=State.PREPARING)
    one.note("u1", "state", state=State.EXECUTING, sessions=[{"name": "vm-1"}])
    one.note("u1", "verified", folios=3)
    return store


def test_what_was_noted_is_read_back() -> None:
    again = journal(filled())
    assert [r.event for r in again.records] == ["state", "state", "verified"]
    last = again.last_state()
    assert last is not None
    assert (last.state, last.boot, last.time) == (State.EXECUTING, "boot-1", 1234)
    assert last.data["sessions"] == [{"name": "vm-1"}]
    assert again.updates() == ["u1"]


@given(st.integers(0, 400), st.integers(0, 40))
def test_a_torn_tail_is_cut_and_what_was_durable_stays(cut: int, nuls: int) -> None:
    whole = filled().data
    durable = whole.rindex(b"\n", 0, -1) + 1
    torn = whole[: durable + min(cut, len(whole) - durable - 1)] + bytes(nuls)
    store = MemoryStore(torn)
    assert [r.event for r in journal(store).records] == ["state", "state"]
    assert store.data == whole[:durable]
    journal(store).note("u1", "state", state=State.ABORTED)
    last = journal(store).last_state()
    assert last is not None
    assert last.state is State.ABORTED


def test_a_record_that_the_disk_took_in_part_is_no_damage() -> None:
    class Full(MemoryStore):
        full = True

        def append(self, data: bytes) -> None:
            super().append(data[:7] if self.full else data)
            if self.full:
                raise MachineError("append", errno=errno.ENOSPC)

    store = Full()
    one = journal(store)
    for _ in range(2):
        with pytest.raises(MachineError):
            one.note("u1", "state", state=State.PREPARING)
    store.full = False
    one.note("u2", "state", state=State.PREPARING)
    one.note("u2", "state", state=State.ABORTED)
    assert [(r.update, r.state) for r in journal(store).records] == [("u2", State.PREPARING), ("u2", State.ABORTED)]


@given(st.data())
def test_damage_before_good_records_is_an_error_and_never_a_shorter_journal(data: st.DataObject) -> None:
    whole = bytearray(filled().data)
    first = whole.index(b"\n")
    at = data.draw(st.integers(0, first))
    whole[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(JournalError):
        decode(bytes(whole))


def test_a_version_from_the_future_is_an_error() -> None:
    line = encode(Record(1, "b", "u", "state", {"state": "idle"})).replace(b'"v":1', b'"v":9')
    import zlib

    text = line[9:-1]
    with pytest.raises(JournalError, match="version 9"):
        decode(b"%08x %s\n" % (zlib.crc32(text), text))


def test_a_state_that_is_none_is_an_error() -> None:
    with pytest.raises(JournalError, match="byte 0"):
        decode(encode(Record(1, "b", "u", "state", {"state": "levitating"})))
