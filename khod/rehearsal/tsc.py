# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rate of this host's TSC, which the guest's is a copy of."""

from __future__ import annotations

import functools
import time

from khod.kernel import tsc

_SECONDS = 0.05


@functools.cache
def host_tsc_khz() -> int:
    """kHz, measured for a twentieth of a second; 0 where it cannot be read."""
    read = tsc.reader()
    if not read:
        return 0
    first, started = read(), time.monotonic_ns()
    while (elapsed := time.monotonic_ns() - started) < _SECONDS * 1e9:
        pass
    return round((read() - first) * 1_000_000 / elapsed)
