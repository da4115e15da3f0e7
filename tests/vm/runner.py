# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's virtual machine: boots the lab kernel on a read-only view of this host's root, plays a scenario in it across
its kexecs, and says how that went: passed, failed, or lost.

*Lost* is no verdict at all: the kernel panicked, QEMU ended, a deadline passed. A guest's exit status could not tell it from
failure, and an empty one would look like success; so a run has passed only when the guest said that word.

Runnable by hand::

    .venv/bin/python -m tests.vm.runner tests/vm/scenarios/NAME.py
"""

from __future__ import annotations

import compileall
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.vm import kernel as lab_kernel
from tests.vm import qemu
from tests.vm.qemu import PATH, QEMU, Outcome

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STATE_BYTES = 64 << 20
PROGRAMS = (QEMU, "mke2fs", "setpriv")


@dataclass(frozen=True)
class Machine:
    """What to run, and on what."""

    scenario: Path
    memory: str = "2G"
    cpus: int = 2
    cpu: str = "Nehalem"
    """QEMU's model. The plainest that numpy runs on: emulating newer instructions makes everything a sixth slower. "max" has
    SVM, for KVM in the machine."""
    cmdline: tuple[str, ...] = ()
    """Words added to the kernel's command line, of both kernels when the scenario jumps with the running one."""
    qemu: tuple[str, ...] = ()
    """More of QEMU's arguments."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON for the scenario: `Guest.parameters`."""
    answers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """What the scenario may have called on the host: `Guest.ask`."""
    boot_deadline: float = 60
    """Seconds from power on, or from the last word of the old kernel, to the first word of the scenario."""
    stage_deadline: float = 60
    """Seconds for each function of the scenario, the boot that follows it included."""
    deadline: float = 180
    """Seconds for everything."""


@dataclass(frozen=True)
class Record:
    """What the scenario told by `Guest.record`."""

    stage: int
    name: str
    facts: dict[str, Any]


@dataclass
class Result:
    """How a run went, and what it told."""

    directory: Path
    """serial.log, and shared/ with the guest's own files."""
    outcome: Outcome = Outcome.LOST
    reason: str = ""
    records: list[Record] = field(default_factory=list)
    times: list[tuple[float, str]] = field(default_factory=list)
    """Seconds since power on, and what was said then."""

    def facts(self, name: str) -> dict[str, Any]:
        """Of the one record of that name."""
        (record,) = (r for r in self.records if r.name == name)
        return record.facts

    def require(self) -> Result:
        """Itself, if it has passed. Raises AssertionError with the reason and the place of the logs otherwise."""
        if self.outcome is not Outcome.PASSED:
            raise AssertionError(f"the run is {self.outcome}: {self.reason}\nlogs: {self.directory}\n{self._console()}")
        return self

    def discard(self) -> None:
        """Remove what a run that did not pass has left: a test that expected just that has no use for it."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _console(self) -> str:
        log = self.directory / "serial.log"
        return log.read_text(errors="replace")[-3000:] if log.exists() else ""


def missing() -> str:
    """Why no machine can be run here; '' when one can. The kernel is built on demand only by ``make``: it takes minutes."""
    if os.geteuid():
        return "the virtual machine shows root's files to its guest: run as root"
    if absent := [program for program in PROGRAMS if not shutil.which(program, path=PATH)]:
        return f"not installed: {', '.join(absent)}"
    if not (lab_kernel.kernel_directory() / "bzImage").exists():
        return "the lab kernel is not built: make lab-kernel"
    return ""


def run(machine: Machine) -> Result:
    """Play the scenario. One machine at a time on a host: a second caller waits. What is left of a run that did not pass
    stays in its directory."""
    with qemu.one_machine():
        # Not in pytest's long directories: the path of a Unix socket has 107 bytes.
        result = Result(Path(tempfile.mkdtemp(prefix="khod-vm-")))
        prepare(machine, result.directory)
        command = arguments(machine, result.directory)
        with (
            qemu.listening(result.directory / qemu.PORT) as listener,
            qemu.power(command, result.directory) as running,
        ):
            _follow(machine, listener, running, result)
    if result.outcome is Outcome.PASSED:
        shutil.rmtree(result.directory)
    return result


def prepare(machine: Machine, directory: Path) -> None:
    """What the guest will find: its job and its parameters in shared/, and a disk of its own."""
    shared = directory / "shared"
    shared.mkdir()
    parameters = {
        "kernel": str(lab_kernel.kernel_directory() / "bzImage"),
        "stage_deadline": machine.stage_deadline,
        **machine.parameters,
    }
    (shared / "parameters.json").write_text(json.dumps(parameters))
    # The environment's own Python, which need not be the system's, without `site`, whose work takes most of a second
    # there. Bytecode is made here, since the guest can neither write it nor compile fast.
    for package in ("khod", "plugins", "tests"):
        compileall.compile_dir(ROOT / package, quiet=2, workers=1)
    path = f"{ROOT}:{ROOT}/plugins/guestmemfd:{ROOT}/plugins/iommu:{ROOT}/plugins/vfio:{sysconfig.get_path('purelib')}"
    command = f"'{sys.executable}' -S -X faulthandler '{HERE}/guest.py' '{machine.scenario.resolve()}'"
    (shared / "job").write_text(f"cd '{ROOT}'\nPYTHONPATH='{path}' {command}\n")
    image = directory / "state.img"
    with open(image, "wb") as f:
        f.truncate(STATE_BYTES)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(image)], check=True, env={"PATH": PATH}, timeout=30)


def arguments(machine: Machine, directory: Path, *, serial: str = "") -> list[str]:
    """The command that runs QEMU on what `prepare` made: see `qemu.arguments`."""
    words = (
        "ro", "rootfstype=9p",
        # The root does not change under the guest, and 9p without a cache asks the host at every step of an import.
        "rootflags=trans=virtio,version=9p2000.L,msize=524288,cache=loose",
        f"init={HERE}/init", *machine.cmdline,
    )  # fmt: skip
    return [
        *qemu.arguments(
            directory, cpu=machine.cpu, cpus=machine.cpus, memory=machine.memory, words=words, serial=serial
        ),
        "-fsdev", "local,id=root,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=root,mount_tag=/dev/root",
        "-fsdev", f"local,id=shared,path={directory}/shared,security_model=none",
        "-device", "virtio-9p-pci,fsdev=shared,mount_tag=shared",
        "-drive", f"file={directory}/state.img,format=raw,if=none,id=state,cache=writeback",
        "-device", "virtio-blk-pci,drive=state",
        *machine.qemu,
    ]  # fmt: skip


def _follow(machine: Machine, listener: socket.socket, running: subprocess.Popen[bytes], result: Result) -> None:
    """Listen to the guest until it says a verdict, falls silent, or goes."""
    start = time.monotonic()
    deadline = qemu.Deadline(start + machine.deadline, start + machine.boot_deadline)
    try:
        channel = qemu.accept(listener, result.directory)
    except TimeoutError as error:
        result.reason = str(error)
        return
    with channel:
        for message in qemu.messages(channel, deadline):
            event, stage = message["event"], message["stage"]
            result.times.append((time.monotonic() - start, f"{event} {message.get('name', stage)}"))
            match event:
                case "begin":
                    deadline.due, deadline.of = time.monotonic() + machine.stage_deadline, f"stage {stage}"
                case "record":
                    result.records.append(Record(stage, message["name"], message["facts"]))
                case "ask":
                    answer = machine.answers[message["name"]](**message["arguments"])
                    channel.sendall(json.dumps(answer).encode() + b"\n")
                case "failed":
                    result.outcome, result.reason = Outcome.FAILED, f"stage {stage}\n{message['traceback']}"
                    return
                case "passed":
                    result.outcome = Outcome.PASSED
                    return
    result.reason = qemu.silence(running, deadline)


if __name__ == "__main__":
    if reason := missing():
        raise SystemExit(reason)
    outcome = run(Machine(Path(sys.argv[1]), stage_deadline=150))
    for at, said in outcome.times:
        print(f"{at:7.2f} s  {said}")
    for record in outcome.records:
        print(f"stage {record.stage}: {record.name} {record.facts}")
    outcome.require()
