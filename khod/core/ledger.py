# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long everything took, across two kernels.

Within a kernel the monotonic clock counts. Across the jump only the TSC runs on (and CLOCK_REALTIME comes back in whole
seconds from the RTC), so every figure that spans it says how far it can be off.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from khod.core.ports import Stamp
from khod.core.views import SpanView

TSC_UNCERTAINTY = 0.010
RTC_UNCERTAINTY = 1.0
_STAMP = struct.Struct("<8s4QI")
_MAGIC = b"khodtick"
STAMP_SIZE = _STAMP.size


def encode_stamp(stamp: Stamp) -> bytes:
    """The last words of the old kernel, as they lie at the end of the handover tree's file.

    Little-endian: magic, realtime, monotonic, TSC, its kHz (u64 each), CRC-32 of all that.
    """
    body = _STAMP.pack(_MAGIC, stamp.realtime, stamp.monotonic, stamp.tsc, stamp.tsc_khz, 0)[:-4]
    return body + struct.pack("<I", zlib.crc32(body))


def decode_stamp(data: bytes) -> Stamp | None:
    """What was written, or None: a stamp that is missing or torn costs a figure, never the update."""
    if len(data) != STAMP_SIZE:
        return None
    magic, realtime, monotonic, tsc, khz, crc = _STAMP.unpack(data)
    if magic != _MAGIC or crc != zlib.crc32(data[:-4]):
        return None
    return Stamp(realtime, monotonic, tsc, khz)


def across(before: Stamp, after: Stamp) -> tuple[float, float]:
    """Seconds from `before` in the old kernel to `after` in the new one, and plus or minus how much.

    The TSC's rate is the old kernel's: the new one's early calibration is worse.
    """
    khz = before.tsc_khz or after.tsc_khz
    if khz and after.tsc > before.tsc > 0:
        return (after.tsc - before.tsc) / khz / 1e3, TSC_UNCERTAINTY
    return (after.realtime - before.realtime) / 1e9, RTC_UNCERTAINTY


@dataclass(slots=True)
class Gaps:
    """For how long the workload of each instance that a client answers for did not run: from when it stood still in the old
    kernel, as its client said, until it ran in this one."""

    before: Stamp | None = None
    """The old kernel's last; None where it is not known, or there was no jump."""
    still: dict[str, int] = field(default_factory=dict)
    """Since when, by label: the old kernel's monotonic clock, in ns. Those that were told are taken out."""

    def take(self, label: str, now: Stamp, ran: float) -> tuple[float, float] | None:
        """Of one instance, which runs since `ran` seconds before `now`: seconds, and plus or minus how much. None for one of
        which nothing is known, or that has been told."""
        since = self.still.pop(label, None)
        if since is None or self.before is None:
            return None
        between, uncertainty = across(self.before, now)
        return (self.before.monotonic - since) / 1e9 + between - ran, uncertainty


@dataclass(slots=True)
class Ledger:
    """The rows of one update, as they come in."""

    rows: list[SpanView] = field(default_factory=list)

    def add(self, phase: str, seconds: float, *, instance: str = "", uncertainty: float = 0.0) -> None:
        """One row."""
        self.rows.append(SpanView(phase=phase, instance=instance, seconds=round(seconds, 6), uncertainty=uncertainty))

    def record(self) -> list[dict[str, Any]]:
        """For the journal."""
        return [asdict(row) for row in self.rows]


def from_record(rows: Any) -> list[SpanView]:
    """Rows as a journal holds them; those that are none are left out (an older khod's journal is read, not judged)."""
    out = []
    for row in rows if isinstance(rows, list) else []:
        if isinstance(row, Mapping) and set(row) == {"phase", "instance", "seconds", "uncertainty"}:
            out.append(SpanView(**row))
    return out
