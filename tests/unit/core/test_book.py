# SPDX-License-Identifier: LGPL-2.1-or-later
"""The book: many hands at once, torn lines, what another version wrote, and what is no book."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from khod.core import lines
from khod.core.book import Book, page_of, read
from khod.core.callers import Lifetime
from khod.core.driver import Declaration, StateBound
from khod.core.registry import ROOT, Entry
from khod.errors import FormatError
from khod.simulated import create, machine
from khod.simulated.kernel import Kernel


def entry(name: str) -> Entry:
    return Entry(
        name, None, "driver", ROOT, True, (), {"a": "1"}, Declaration("x", ()), {}, handle="h", lifetime=Lifetime.PROCESS,
        keeper_pid=7, keeper_since=9, client_states=(StateBound("cpu", 8),), shares={"ram": ((ROOT, "other"), "memory")},
        keepsake={"command": b"\x07"},
    )  # fmt: skip


@pytest.fixture
def book(tmp_path: Path) -> Book:
    made = Book(machine(Kernel.boot(create(tmp_path / "machine", memory=64 << 20)).spawn("khod")))
    made.open()
    return made


def written(book: Book) -> bytes:
    return book._machine.files.read(book._fd, 0, book._end)


def test_a_page_is_read_as_it_was_written(book: Book) -> None:
    book.put(entry("vm-1"))
    (page,) = read(written(book)).pages.values()
    assert page == page_of(entry("vm-1"))


def test_records_of_several_threads_do_not_overwrite_each_other(book: Book) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: book.put(entry(f"vm-{number}")), range(200)))
    assert len(read(written(book)).pages) == 200


def test_a_torn_record_was_never_acknowledged(book: Book) -> None:
    book.put(entry("vm-1"))
    whole = len(written(book))
    book.put(entry("vm-2"))
    data = written(book)
    for length in (whole, whole + 1, whole + 20, len(data) - 2):
        assert [page.name for page in read(data[:length]).pages.values()] == ["vm-1"]


def test_what_a_newer_khod_wrote_besides_is_passed_over(book: Book) -> None:
    book.put(entry("vm-1"))
    body = lines.decode(written(book).split(b"\n")[1])
    body["page"]["colour"] = "blue"
    (page,) = read(lines.encode(body)).pages.values()
    assert page == page_of(entry("vm-1"))


@pytest.mark.parametrize(
    "wrong", [{"page": {"owner": "x"}}, {"page": 7}, {"gone": "vm-1"}, [], {"page": {"owner": "user:root"}}]
)
def test_what_checks_and_is_no_record_is_named(wrong: object) -> None:
    with pytest.raises(FormatError):
        read(lines.encode(wrong))  # type: ignore[arg-type]


def test_what_is_over_is_forgotten_with_its_session(book: Book) -> None:
    one = entry("vm-1")
    book.put(one)
    book.remove(one, over="khod.u.1")
    found = read(written(book))
    assert not found.pages
    assert found.over == {"khod.u.1"}
