# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a row of the table is, and how two sides are timed against each other."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol

ROUNDS = 15
"""Odd, and enough that a neighbour who is busy for a second decides no median."""


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table. Met when `value` is at most `target`."""

    name: str
    value: float
    target: float
    unit: str
    """'x' for a ratio to the other side, 'ms', 'bytes'."""
    ours: float
    """Milliseconds, a median unless the name says otherwise; 0 where nothing was timed."""
    theirs: float = 0.0
    exact: bool = False
    """The value has to be the target."""
    note: str = ""

    @property
    def met(self) -> bool:
        return self.value == self.target if self.exact else self.value <= self.target

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "met": self.met}


class Row(Protocol):
    """A benchmark: measures when called, and yields what it found."""

    def __call__(self) -> Iterator[Result]: ...


def milliseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e6


@dataclass(frozen=True, slots=True)
class Side:
    """One side of a comparison: `setup` makes a fresh subject, `work` is timed on it, `teardown` ends it."""

    setup: Callable[[], object]
    work: Callable[[object], object]
    teardown: Callable[[object], object] = lambda subject: None

    def sample(self) -> float:
        subject = self.setup()
        took = milliseconds(lambda: self.work(subject))
        self.teardown(subject)
        return took


def alternating(ours: Side, theirs: Side, rounds: int = ROUNDS) -> tuple[float, float]:
    """Medians of both, taken in turns, so that a busy machine is busy for both. The first turn warms up."""
    samples: list[tuple[float, float]] = []
    gc.collect()
    gc.disable()
    try:
        for turn in range(rounds + 1):
            pair = (ours.sample(), theirs.sample())
            if turn:
                samples.append(pair)
    finally:
        gc.enable()
    return statistics.median(a for a, _ in samples), statistics.median(b for _, b in samples)
