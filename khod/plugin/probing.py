# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether the running kernel preserves files of a kind: found by trying, for there is nothing that says so.

A fresh file of the kind is preserved in a session that is closed at once: nobody's memory is touched, nor an update that is
under way. What came out holds as long as the kernel runs, and is remembered by this process.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

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


def _try(machine: Machine, specimen: int) -> bool:
    session = machine.liveupdate.create_session(SESSION)
    try:
        machine.liveupdate.preserve_fd(session, specimen, 0)
    except FdNotPreservable:
        return False
    finally:
        machine.files.close(session)
    return True
