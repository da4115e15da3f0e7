# SPDX-License-Identifier: LGPL-2.1-or-later
"""Time: the port `Clock` of the running kernel."""

from __future__ import annotations

import time

from khod.core.ports import Stamp
from khod.kernel import tsc

_MEASURABLE = 100_000_000
"""Nanoseconds of measuring before a rate is given: reading the counter may take some 100 us, a thousandth of this."""


class KernelClock:
    """The port `Clock` of the running kernel. The rate is measured from the making of the object on.

    `read_tsc` reads the counter; None: there is none."""

    def __init__(self, read_tsc: tsc.Reader | None) -> None:
        self._read_tsc = read_tsc
        self._first_raw, self._first_tsc = self._pair()

    def stamp(self) -> Stamp:
        """See the port."""
        realtime, monotonic = time.time_ns(), time.monotonic_ns()
        raw, now = self._pair()
        elapsed = raw - self._first_raw
        known = now > self._first_tsc and elapsed >= _MEASURABLE
        khz = round((now - self._first_tsc) * 1_000_000 / elapsed) if known else 0
        return Stamp(realtime, monotonic, now, khz)

    def _pair(self) -> tuple[int, int]:
        raw = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        return raw, self._read_tsc() if self._read_tsc else 0
