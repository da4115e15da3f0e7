# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is synced to the state disk is there after the jump; what is in /run is not."""

from __future__ import annotations

from pathlib import Path

from khod.kernel.kexec import KernelKexec
from khod.kernel.store import FileStore
from tests.vm.guest import Guest

ELSEWHERE = Path("/run/forgotten")


def before(vm: Guest) -> None:
    FileStore(vm.state / "khod").append(b"on the disk")
    ELSEWHERE.write_text("in memory")
    kexec = KernelKexec()
    kexec.load(kexec.open(str(vm.kernel)))
    kexec.execute()


def after(vm: Guest) -> None:
    synced = FileStore(vm.state / "khod").read().decode()
    vm.record("disk", synced=synced, in_run=ELSEWHERE.exists(), stage=vm.stage)
