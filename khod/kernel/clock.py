# SPDX-License-Identifier: LGPL-2.1-or-later
"""Time: the port `Clock` of the running kernel.

The TSC is the one clock that runs on through a kexec. It is read as MSR 0x10 through /dev/cpu/0/msr, since the
instruction itself would need an executable mapping, which hardened hosts bar.
"""

from __future__ import annotations

import os
import time

from khod.core.ports import Stamp

IA32_TIME_STAMP_COUNTER = 0x10
_MEASURABLE = 100_000_000
"""Nanoseconds of measuring before a rate is given: reading the MSR may take some 100 us, a thousandth of this."""


class KernelClock:
    """The port `Clock` of the running kernel. The rate is measured from the making of the object on."""

    def __init__(self, msr: str = "/dev/cpu/0/msr") -> None:
        try:
            self._msr = os.open(msr, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:  # no x86, no CONFIG_X86_MSR, or lockdown: blackouts are then known to a second only
            self._msr = -1
        self._first_raw, self._first_tsc = self._pair()

    def stamp(self) -> Stamp:
        """See the port."""
        realtime, monotonic = time.time_ns(), time.monotonic_ns()
        raw, tsc = self._pair()
        elapsed = raw - self._first_raw
        known = tsc > self._first_tsc > 0 and elapsed >= _MEASURABLE
        khz = round((tsc - self._first_tsc) * 1_000_000 / elapsed) if known else 0
        return Stamp(realtime, monotonic, tsc, khz)

    def _pair(self) -> tuple[int, int]:
        raw = time.clock_gettime_ns(time.CLOCK_MONOTONIC_RAW)
        if self._msr < 0:
            return raw, 0
        try:
            return raw, int.from_bytes(os.pread(self._msr, 8, IA32_TIME_STAMP_COUNTER), "little")
        except OSError:  # a virtual machine that hides it
            return raw, 0
