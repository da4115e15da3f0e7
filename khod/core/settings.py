# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an operator may set of the core's policy. ``khod.config`` reads these from a file; the defaults stand here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from khod.core.driver import Continuity
from khod.folio.units import DEFAULT_MAX_ORDER


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Policy. Times are seconds; each bounds one answer of one instance, client or system call of that kind."""

    preparing: float = 120.0
    """For one instance to be prepared and preserved, and for one client to answer `preparing`."""
    freezing: float = 10.0
    """For one client to stand still, one instance to freeze, one client to commit."""
    sync: float = 60.0
    """For the file systems to be written out."""
    restoring: float = 120.0
    """For one instance to be restored."""
    carry_rate: int = 128 << 20
    """Bytes a second, at the least, that are copied and hashed: what freezing and restoring may take longer by; 0: nothing."""
    reserve: int = 64 << 20
    """Bytes of memory that an update must leave free."""
    fleet: Path = Path("/etc/khod/fleet.yaml")
    """The profile of formats that an update's target must read (`khod.abi.fleet`), if there is such a file."""
    max_order: int = DEFAULT_MAX_ORDER
    """Largest folio order that the map may hold."""
    sample_pages: int = 16
    """Pages of each instance whose frame is compared across the jump before it is handed out."""
    sample_budget: float = 0.050
    """For reading bytes of sampled pages while everything stands still: of all instances together."""
    full: bool = False
    """Hash every byte of every instance while frozen, and compare before anything is handed out."""
    require: str = Continuity.RESET
    """The least continuity that every instance must be given; an update that cannot is refused."""
    jump: str = "direct"
    """Who jumps: khod itself, or, 'systemd', PID 1 (decision 17)."""
    early: tuple[tuple[str, tuple[str, ...]], ...] = ()
    """Of each VMM that the initrd is to start, where one is made that does: the owner and the names of its instances."""
    orphans_after: float = 3600.0
    """Seconds after which what came through a jump and nobody claimed is reported."""
    reconnect: float = 60.0
    """Seconds that clients have to come back to a khod that was started anew, until what hangs on their connection is let
    go of."""
    quota_instances: int = 4000
    quota_descriptors: int = 65536
    quota_bytes: int = 0
    """What one owner may have registered; 0: no limit."""

    def allowance(self, size: int) -> float:
        """Seconds that copying and hashing `size` bytes may take."""
        return size / self.carry_rate if self.carry_rate else 0.0
