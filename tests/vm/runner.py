# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's virtual machine: khod.rehearsal's, with the lab's kernel in it and this checkout's Python; one at a time.

Runnable by hand::

    .venv/bin/python -m tests.vm.runner tests/vm/scenarios/NAME.py
"""

from __future__ import annotations

import compileall
import contextlib
import fcntl
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from khod.rehearsal import machine as vm
from khod.rehearsal.machine import Record, Result, arguments
from tests.vm import kernel as lab_kernel

__all__ = ["HERE", "ROOT", "Machine", "Record", "Result", "arguments", "missing", "one_machine", "prepare", "run"]

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
PATHS = (ROOT, *(ROOT / "plugins" / name for name in ("guestmemfd", "iommu", "vfio")), sysconfig.get_path("purelib"))


@dataclass(frozen=True)
class Machine(vm.Machine):
    """What to run, and on what. The kernel is 7.3; Python is the environment's own, which need not be the system's, without
    `site`, whose work takes most of a second in there."""

    kernel: Path = field(default_factory=lambda: lab_kernel.kernel_directory() / "bzImage")
    python: tuple[str, ...] = (sys.executable, "-S", "-X", "faulthandler")
    environment: Mapping[str, str] = field(default_factory=lambda: {"PYTHONPATH": ":".join(map(str, PATHS))})
    start: Path = ROOT


def missing() -> str:
    """Why no machine can be run here; '' when one can. The kernel is built on demand only by ``make``: it takes minutes."""
    if os.geteuid():
        return "the virtual machine shows root's files to its guest: run as root"
    if absent := vm.absent():
        return f"not installed: {', '.join(absent)}"
    if not (lab_kernel.kernel_directory() / "bzImage").exists():
        return "the lab kernel is not built: make lab-kernel"
    return ""


@contextlib.contextmanager
def one_machine() -> Iterator[None]:
    """One machine of the lab at a time on a host: a second caller waits."""
    with open(lab_kernel.cache() / "vm.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def prepare(machine: Machine, directory: Path) -> None:
    """What the guest will find: see `khod.rehearsal.machine.prepare`."""
    compile_checkout()
    vm.prepare(machine, directory)


def run(machine: Machine) -> Result:
    """Play the scenario: see `khod.rehearsal.machine.run`."""
    with one_machine():
        compile_checkout()
        return vm.run(machine)


def compile_checkout() -> None:
    """Make the bytecode of this checkout here, since the guest can neither write it nor compile fast."""
    for package in ("khod", "plugins", "tests"):
        compileall.compile_dir(ROOT / package, quiet=2, workers=1)


if __name__ == "__main__":
    if reason := missing():
        raise SystemExit(reason)
    outcome = run(Machine(Path(sys.argv[1]), stage_deadline=150))
    for at, said in outcome.times:
        print(f"{at:7.2f} s  {said}")
    for record in outcome.records:
        print(f"stage {record.stage}: {record.name} {record.facts}")
    outcome.require()
