# SPDX-License-Identifier: LGPL-2.1-or-later
"""Fails, for the test of the runner."""

from __future__ import annotations

from tests.vm.guest import Guest


def before(vm: Guest) -> None:
    raise RuntimeError("this scenario fails")
