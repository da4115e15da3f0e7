# SPDX-License-Identifier: LGPL-2.1-or-later
"""Takes the kernel down, for the test of the runner: PID 1 ends when we do, and no kernel survives that."""

from __future__ import annotations

import os

from tests.vm.guest import Guest


def before(vm: Guest) -> None:
    os._exit(1)
