# SPDX-License-Identifier: LGPL-2.1-or-later
# ruff: noqa: D102 — the contracts stand in khod.core.ports
"""All ports of the running Linux together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from khod.core.ports import Machine
from khod.errors import CustodianGone
from khod.kernel import tsc
from khod.kernel.boot import KernelBootInfo
from khod.kernel.clock import KernelClock
from khod.kernel.facts import KernelFactsReader
from khod.kernel.files import KernelFiles
from khod.kernel.filesystems import KernelFileSystems
from khod.kernel.frames import KernelFrames
from khod.kernel.kexec import KernelKexec
from khod.kernel.liveupdate import BUSY_PATIENCE, KernelLiveUpdate
from khod.kernel.memory import KernelMemory
from khod.kernel.processes import KernelProcesses
from khod.kernel.store import FileStore
from khod.kernel.systemd import Systemd


class NoCustody:
    """The port `Custody` where no custodian can be asked: every call says so."""

    def keep(self, name: str, fd: int) -> None:
        """See the port; so for all."""
        self._gone()

    def kept(self) -> Sequence[str]:
        self._gone()

    def take(self, name: str) -> int:
        self._gone()

    def drop(self, names: Sequence[str]) -> None:
        self._gone()

    def sessions(self) -> Sequence[str]:
        self._gone()

    def release(self, session: str) -> None:
        self._gone()

    def offer(self, sessions: Sequence[int]) -> None:
        self._gone()

    def withdraw(self) -> None:
        self._gone()

    def room(self) -> int:
        self._gone()

    def doubt(self, size: int, files: int) -> str:
        self._gone()

    def _gone(self) -> NoReturn:
        raise CustodianGone("no custodian runs on this machine")


def machine(state_directory: Path, *, device_timeout: float = BUSY_PATIENCE) -> Machine:
    """The running machine, with its journal in `state_directory`, which is made when it is first written to.

    A device that somebody else has open is tried again for `device_timeout` seconds.
    """
    memory = KernelMemory()
    return Machine(
        liveupdate=KernelLiveUpdate(patience=device_timeout),
        files=KernelFiles(),
        frames=KernelFrames(),
        memory=memory,
        kexec=KernelKexec(),
        clock=KernelClock(tsc.reader()),
        store=FileStore(state_directory),
        filesystems=KernelFileSystems(),
        boot=KernelBootInfo(),
        processes=KernelProcesses(),
        custody=NoCustody(),
        manager=Systemd(),
        kernel=KernelFactsReader(memory),
    )
