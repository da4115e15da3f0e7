# SPDX-License-Identifier: LGPL-2.1-or-later
"""Tables of IOMMU mappings: whether writing and reading them takes time linear in their number."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

from bench.rows import ROUNDS, Result, Row, Side, alternating
from khod.abi.ioas_table import Mapping, merged, read_records, records

COUNT = 1_000_000
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


def linear(name: str, work: Callable[[int], int], answer: Callable[[int], int]) -> Row:
    """All of them, against four times what a quarter takes."""

    def row() -> Iterator[Result]:
        def side(count: int) -> Side:
            assert work(count) == answer(count)
            return Side(lambda: None, lambda _: work(count))

        whole, quarter = alternating(side(COUNT), side(COUNT // 4), rounds=ROUNDS // 3)
        title = f"{name} {COUNT:,} mappings: time linear (to four times a quarter of them)"
        yield Result(title, whole / (4 * quarter), 1.25, "x", whole, 4 * quarter)

    return row


ROWS: tuple[Row, ...] = (
    linear("record", write, lambda count: 32 * count),
    linear("merge", merge, lambda count: 1),
    linear("read back with validation", read, lambda count: count),
)
