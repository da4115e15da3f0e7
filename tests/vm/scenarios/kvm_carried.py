# SPDX-License-Identifier: LGPL-2.1-or-later
"""A KVM guest whose memory the kernel does not preserve runs on through a live update."""

from __future__ import annotations

from tests.vm.guest import Guest
from tests.vm.scenarios.kvm_guest import before, goes_on

__all__ = ("after", "before")


def after(vm: Guest) -> None:
    goes_on(vm)
