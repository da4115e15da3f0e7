# SPDX-License-Identifier: LGPL-2.1-or-later
"""The table of mappings: written and read back, merged, and nothing taken on trust."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from khod.abi import ioas_table
from khod.abi.ioas_table import FIRST, Mapping, Table, merged, read_head, read_records, records
from khod.client.iommu import Record
from khod.errors import FormatError, InvalidRequest

PAGE = 4096


def mapping(iova: int, pages: int = 1, offset: int = 0, file: int = 0, protection: int = 6) -> Mapping:
    return Mapping(iova * PAGE, pages * PAGE, offset * PAGE, file, protection)


def test_what_continues_is_one_and_what_does_not_stays_apart() -> None:
    apart = [mapping(10, 1, 20), mapping(11, 1, 22), mapping(12, 1, 23, 1), mapping(13, 1, 24, 1, 4), mapping(15, 1, 26, 1, 4)]
    assert merged(apart) == apart
    assert merged([mapping(8, 4, 3), mapping(0, 8, 5), mapping(12, 1, 7)]) == [mapping(0, 8, 5), mapping(8, 5, 3)]
    with pytest.raises(InvalidRequest, match="0x0-0x1fff and 0x1000-0x1fff overlap"):
        merged([mapping(0, 2), mapping(1)])


@given(st.sets(st.tuples(st.integers(0, 200), st.integers(0, 3), st.sampled_from([2, 4, 6])), max_size=60))
def test_a_table_comes_back_page_for_page(pages: set[tuple[int, int, int]]) -> None:
    one = {iova: (file, protection) for iova, file, protection in pages}
    table = merged(mapping(iova, 1, iova + file, file, protection) for iova, (file, protection) in one.items())
    back = read_records(records(table), 4)
    assert back == table
    flat = {m.iova // PAGE + i: (m.file, m.protection, m.offset // PAGE + i) for m in back for i in range(m.length // PAGE)}
    assert flat == {iova: (file, protection, iova + file) for iova, (file, protection) in one.items()}


@pytest.mark.parametrize(
    "record",
    [
        (0x1001, PAGE, 0, 0, 6),
        (0, 0, 0, 0, 6),
        (0, PAGE, 1, 0, 6),
        (0, PAGE, 0, 1, 6),
        (0, PAGE, 0, 0, 0),
        (0, PAGE, 0, 0, 7),
        ((1 << 64) - PAGE, 2 * PAGE, 0, 0, 6),
        (0, PAGE, (1 << 64) - PAGE, 0, 6),
    ],
)
def test_a_record_that_cannot_be_is_named(record: tuple[int, ...]) -> None:
    good = records([mapping(1)])
    bad = struct.pack("<QQQII", *record)
    if record[2] == (1 << 64) - PAGE:
        bad = struct.pack("<QQQII", 0, 2 * PAGE, *record[2:])
    with pytest.raises(FormatError, match="record 0"):
        read_records(bad, 1)
    with pytest.raises(FormatError, match="record 1"):
        read_records(good + good, 1)


def page(**changes: object) -> bytes:
    fields = {"magic": b"khodioas", "version": 1, "ioas": 1, "count": 0, "names": b"ram:ram\0", "length": None, "huge": 1}
    fields.update(changes)
    names = fields["names"]
    assert isinstance(names, bytes)
    length = len(names) if fields["length"] is None else fields["length"]
    raw = struct.pack("<8sIIQII", *(fields[n] for n in ("magic", "version", "ioas", "count")), length, fields["huge"])
    return (raw + names).ljust(PAGE, b"\0")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"magic": b"khodnope"}, "no table"),
        ({"version": 2}, "version 2"),
        ({"count": (1 << 64) - 1}, "being changed"),
        ({"count": 129}, "has room for 128"),
        ({"length": 5000}, "5000 bytes of names"),
        ({"names": b"ram\0"}, "not INSTANCE:DESCRIPTOR"),
        ({"names": b"ram:ram"}, "not INSTANCE:DESCRIPTOR"),
        ({"names": b"\xff:ram\0"}, "UTF-8"),
        ({"huge": 2}, "2 for huge pages"),
    ],
)
def test_a_head_that_cannot_be_is_refused(changes: dict[str, object], says: str) -> None:
    assert read_head(page(), 2 * PAGE) == (Table(1, [("ram", "ram")], (), True), 0)
    with pytest.raises(FormatError, match=says):
        read_head(page(**changes), 2 * PAGE)
    with pytest.raises(FormatError, match="no table"):
        read_head(page()[:100], 100)


@pytest.fixture
def record() -> Iterator[Record]:
    made = Record.create(3, 64)
    yield made
    made.close()


def reread(record: Record) -> list[Mapping]:
    again = Record(os.dup(record.fd))
    again.close()
    assert again.ioas == 3
    return again.mappings


def test_a_record_is_true_after_every_call(record: Record) -> None:
    for first, second in ((0, 8), (16, 24), (8, 16)):
        record.add(first * PAGE, (second - first) * PAGE, "guest", "ram", first * PAGE)
    assert reread(record) == record.mappings == [mapping(0, 24)]
    record.add(32 * PAGE, PAGE, "other", "ram", 0, writable=False)
    record.remove(4 * PAGE, 4 * PAGE)
    assert reread(record) == [mapping(0, 4), mapping(8, 16, 8), mapping(32, 1, 0, 1, 4)]
    record.remove(8 * PAGE, 16 * PAGE)
    record.remove(0, 4 * PAGE)
    assert reread(record) == [mapping(32, 1, 0, 1, 4)]
    with pytest.raises(InvalidRequest, match="recorded already"):
        record.add(31 * PAGE, 2 * PAGE, "guest", "ram", 0)
    for iova, length in ((0, PAGE), (32 * PAGE, 2 * PAGE), (31 * PAGE, PAGE)):
        with pytest.raises(InvalidRequest, match="not recorded"):
            record.remove(iova, length)
    assert reread(record) == [mapping(32, 1, 0, 1, 4)]


def test_a_full_record_refuses_and_stays_true(record: Record) -> None:
    room = record.room
    for number in range(room):
        record.add(2 * number * PAGE, PAGE, "guest", "ram", 0)
    before = reread(record)
    with pytest.raises(InvalidRequest, match=f"room for {room} mappings"):
        record.add(2 * room * PAGE, PAGE, "guest", "ram", 0)
    assert reread(record) == before
    record.add(PAGE, PAGE, "guest", "ram", PAGE)  # continues the first one
    assert reread(record)[0] == mapping(0, 2)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20), st.integers(1, 5)), max_size=40))
def test_adding_and_removing_is_what_a_list_of_pages_says(calls: list[tuple[bool, int, int]]) -> None:
    record, model = Record.create(3, 64), set[int]()
    try:
        for add, first, count in calls:
            pages = set(range(first, first + count))
            allowed = not pages & model if add else pages <= model
            try:
                if add:
                    record.add(first * PAGE, count * PAGE, "guest", "ram", first * PAGE)
                else:
                    record.remove(first * PAGE, count * PAGE)
            except InvalidRequest:
                assert not allowed
            else:
                assert allowed
                model = model | pages if add else model - pages
            assert {m.iova // PAGE + i for m in reread(record) for i in range(m.length // PAGE)} == model
    finally:
        record.close()


def test_the_first_page_is_where_the_records_begin() -> None:
    assert FIRST == PAGE
    assert ioas_table.file_size(1) == 2 * PAGE
    assert ioas_table.room(ioas_table.file_size(128)) == 128
