# SPDX-License-Identifier: LGPL-2.1-or-later
"""Falls silent, for the test of the runner."""

from __future__ import annotations

import signal

from tests.vm.guest import Guest


def before(vm: Guest) -> None:
    signal.pause()
