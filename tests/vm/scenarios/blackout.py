# SPDX-License-Identifier: LGPL-2.1-or-later
"""One live update of 64 MiB, by khod or by a C program, for `bench.vm`, which says what is measured and why so.

The job of the second kernel's init is given a first part: there whoever waits for the memory runs, as the first that runs at
all. The Python that plays this scenario comes after it, and reads what it left.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

from tests.vm.guest import Guest

SIZE = 64 << 20
SOCKET = "/run/khod/khod.sock"


def first(vm: Guest, *lines: str) -> None:
    """Have the next kernel's init do these lines of shell before anything else. The environment is that of the job."""
    job = vm.shared / "job"
    change_directory, rest = job.read_text().split("\n", 1)
    # What init would do if this went wrong is end, and the machine with it; the log says why.
    job.write_text("\n".join([change_directory, f"exec 2>>{vm.shared}/blackout.log", *lines, rest]))


def before(vm: Guest) -> None:
    program, out = vm.parameters["program"], vm.shared / "blackout"
    if vm.parameters["side"] == "c":
        first(vm, shlex.join([program, "retrieve", str(out)]))
        subprocess.run([program, "update", str(vm.kernel)], check=True)
        raise AssertionError("the jump came back")
    from khod.kernel.tsc import reader
    from khod.rehearsal.inside import CONFIG
    from tests.vm.driving import Khod

    khod = Khod(vm)
    config = vm.state / "khod.yaml"
    config.write_bytes(CONFIG.read_bytes())
    daemon = shlex.join([sys.executable, "-S", "-m", "khod.daemon", "--config", str(config)])
    environment = f"PYTHONPATH={shlex.quote(os.environ['PYTHONPATH'])}"
    first(vm, f"{environment} {daemon} &", shlex.join([program, "claim", str(out), SOCKET]))
    ram = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | 0x10)  # MFD_EXEC
    os.ftruncate(ram, SIZE)
    subprocess.run([program, "fill", str(ram)], check=True, pass_fds=[ram])
    read_tsc = reader()
    assert read_tsc
    with khod.client() as client:
        client.register("guest", "guestmemfd", [("ram", ram)], lifetime="persistent")
        client.load(str(vm.kernel))
        for event in (events := client.update("prepared")):
            if event.kind == "held":
                break
        with khod.client() as second:
            os.pwrite(ram, read_tsc().to_bytes(8, "little"), 0)
            second.proceed()
            list(events)
    signal.pause()


def after(vm: Guest) -> None:
    last, began, held, compared = map(int, Path(vm.shared / "blackout").read_text().split())
    vm.record("blackout", last=last, began=began, held=held, compared=compared)
