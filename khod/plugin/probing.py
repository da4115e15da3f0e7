# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether the running kernel preserves files of a kind: found by trying, for there is nothing that says so.

A fresh file of the kind is preserved in a session that is closed at once: nobody's memory is touched, nor an update that is
under way. What came out holds as long as the kernel runs, and is remembered by this process. Of some kinds the kernel takes one
file and not another, such as devices: these are tried themselves, in preparing (`khod_settle`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from khod.core.ports import Machine
from khod.errors import FdNotPreservable

SESSION = "khod-probe"
_lock = threading.Lock()
"""One at a time: the session's name is taken as long as it is open."""
_known: dict[tuple[str, str], bool] = {}
"""By boot and kind."""


def native(machine: Machine, make: Callable[[], int]) -> bool:
    """Whether the kernel preserves files such as `make` makes: a new descriptor of the machine, which is closed here.

    What says nothing about the kind is raised, and not remembered: DeviceMissing, DeviceForbidden, DeviceBusy, DeviceBroken,
    OutOfMemory and every other failure; and whatever `make` raises. Blocks.
    """
    specimen = make()
    try:
        key = machine.boot.boot().boot_id, machine.files.stat(specimen).kind
        with _lock:
            if key not in _known:
                _known[key] = _try(machine, specimen)
            return _known[key]
    finally:
        machine.files.close(specimen)


def learned(machine: Machine, kind: str) -> None:
    """A file of this kind came through a jump: the kernel has what it takes, and need not be tried."""
    with _lock:
        _known[machine.boot.boot().boot_id, kind] = True


def takes(machine: Machine, fds: Sequence[int]) -> bool:
    """Whether the kernel preserves just these files, each after those that it builds on. Nothing is remembered: another may be
    refused. Raises as `native` does, and FdBusy for what is preserved at the moment. Blocks."""
    with _lock:
        return _try(machine, *fds)


def _try(machine: Machine, *specimens: int) -> bool:
    session = machine.liveupdate.create_session(SESSION)
    try:
        for token, specimen in enumerate(specimens):
            machine.liveupdate.preserve_fd(session, specimen, token)
    except FdNotPreservable:
        return False
    finally:
        machine.files.close(session)
    return True
