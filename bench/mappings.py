# SPDX-License-Identifier: LGPL-2.1-or-later
"""IOMMU mappings: whether recording, reading and making them again takes time linear in their number."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import khod_iommu

from bench.rows import ROUNDS, Result, Row, Side, alternating
from khod.abi import cells
from khod.abi.ioas_table import FIRST, Mapping, Table, file_size, head, merged, read_records, records
from khod.client.iommu import Record
from khod.plugin import Instance
from khod.simulated import Process, create, machine
from khod.simulated.cards import Card, plug
from khod.simulated.kernel import Kernel

COUNT = 1_000_000
FEWER = 100_000
"""Where each mapping is a call."""
PAGE = 4096


@cache
def apart(count: int) -> list[Mapping]:
    """Mappings of one page, none of which continues another."""
    return [Mapping(2 * n * PAGE, PAGE, n * PAGE, 0, 6) for n in range(count)]


@cache
def touching(count: int) -> list[Mapping]:
    """Mappings of one page that are one range."""
    return [Mapping(n * PAGE, PAGE, n * PAGE, 0, 6) for n in range(count)]


@cache
def table(count: int) -> bytes:
    return records(apart(count))


def write(count: int) -> int:
    return len(records(merged(apart(count))))


def merge(count: int) -> int:
    return len(merged(touching(count)))


def read(count: int) -> int:
    return len(read_records(table(count), 1))


def add(count: int) -> int:
    """One by one, as a client makes them."""
    record = Record.create(1, count)
    for mapping in apart(count):
        record.add(mapping.iova, mapping.length, "ram", "memory", mapping.offset)
    found = len(record.mappings)
    record.close()
    return found


def linear(name: str, work: Callable[[int], int], answer: Callable[[int], int], number: int = COUNT) -> Row:
    """All of them, against four times what a quarter takes."""

    def row() -> Iterator[Result]:
        def side(count: int) -> Side:
            assert work(count) == answer(count)
            return Side(lambda: None, lambda _: work(count))

        whole, quarter = alternating(side(number), side(number // 4), rounds=ROUNDS // 3)
        yield _result(name, number, whole, quarter)

    return row


def _result(name: str, number: int, whole: float, quarter: float) -> Result:
    title = f"{name} {number:,} mappings: time linear (to four times a quarter of them)"
    return Result(title, whole / (4 * quarter), 1.25, "x", whole, 4 * quarter)


class Restoring:
    """The driver in a kernel that has just been jumped to: the table is there, and the memory."""

    def __init__(self, process: Process, count: int, mappings: list[Mapping]) -> None:
        ram = process.memfd(2 * count * PAGE)
        table = process.memfd(file_size(len(mappings)))
        process.write(table, 0, head(Table(1, [("ram", "memory")], ()), len(mappings)))
        process.write(table, FIRST, records(mappings))
        properties = {"mappings": cells.u64(len(mappings)), "iova-ranges": b""}
        self.files = machine(process).files
        self.instance = Instance(
            "mappings", {}, machine(process), {"table": table}, {}, properties, required={"ram": {"memory": ram}}
        )

    def side(self) -> Side:
        """All of it, again and again."""
        made: list[int] = []

        def work(_: object) -> None:
            made.extend(khod_iommu.khod_restore(self.instance).values())

        def close(_: object) -> None:
            self.files.close(made.pop())

        return Side(lambda: None, work, close)


def restore() -> Iterator[Result]:
    """Each by a system call of a simulated kernel; and as many that were merged when they were recorded."""
    with tempfile.TemporaryDirectory(prefix="khod-bench-") as temporary, ExitStack() as stack:
        directory = create(Path(temporary) / "machine", memory=256 << 20)
        plug(directory, Card("0000:00:04.0"))
        kernel = Kernel.boot(directory)
        stack.callback(kernel.power_off)
        process = kernel.spawn("khod")
        whole, quarter = (Restoring(process, count, apart(count)).side() for count in (FEWER, FEWER // 4))
        yield _result("restore", FEWER, *alternating(whole, quarter, rounds=ROUNDS // 3))
        merged_, one = (Restoring(process, COUNT, m).side() for m in (merged(touching(COUNT)), touching(1)))
        ours, theirs = alternating(merged_, one, rounds=ROUNDS)
        yield Result(
            f"restore {COUNT:,} mappings that were merged into one, to restore one", ours / theirs, 1.5, "x", ours, theirs
        )


ROWS: tuple[Row, ...] = (
    linear("record", write, lambda count: 32 * count),
    linear("record one by one", add, lambda count: count, FEWER),
    linear("merge", merge, lambda count: 1),
    linear("read back with validation", read, lambda count: count),
    restore,
)
