# SPDX-License-Identifier: LGPL-2.1-or-later
"""A virtual machine that boots a kernel on a read-only view of this host's root, plays a scenario in it across its kexecs,
and says how that went: passed, failed, or lost.

*Lost* is no verdict at all: the kernel panicked, QEMU ended, a deadline passed. A guest's exit status could not tell it from
failure, and an empty one would look like success; so a run has passed only when the guest said that word.
"""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from khod.rehearsal import qemu
from khod.rehearsal.qemu import PATH, QEMU, Outcome

HERE = Path(__file__).resolve().parent
INSIDE = ("init", "fstab")
"""What the machine starts with, put into the directory of the run."""
STATE_BYTES = 64 << 20
PROGRAMS = (QEMU, "mke2fs", "setpriv")


@dataclass(frozen=True)
class Machine:
    """What to run, and on what."""

    scenario: Path
    kernel: Path
    """The image to boot."""
    python: tuple[str, ...] = (sys.executable,)
    """The command that runs Python inside."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables of its."""
    start: Path = Path("/")
    """Where it is started."""
    memory: str = "2G"
    cpus: int = 2
    cpu: str = "Nehalem"
    """QEMU's model. The plainest that numpy runs on: emulating newer instructions makes everything a sixth slower. "max" has
    SVM, for KVM in the machine."""
    options: tuple[str, ...] = ("kho=on", "liveupdate=on")
    """What the kernel is told of live update."""
    cmdline: tuple[str, ...] = ()
    """Words added to the kernel's command line, of both kernels when the scenario jumps with the running one."""
    qemu: tuple[str, ...] = ()
    """More of QEMU's arguments."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON for the scenario: `Guest.parameters`."""
    answers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    """What the scenario may have called on the host: `Guest.ask`."""
    told: Callable[[Record], None] = lambda record: None
    """Called with each record, when it comes."""
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
            raise AssertionError(f"the run is {self.outcome}: {self.reason}\nlogs: {self.directory}\n{self.console()}")
        return self

    def discard(self) -> None:
        """Remove what a run that did not pass has left: a test that expected just that has no use for it."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def console(self) -> str:
        """The last of what the kernels printed."""
        log = self.directory / "serial.log"
        return log.read_text(errors="replace")[-3000:] if log.exists() else ""


def absent(path: str = PATH) -> list[str]:
    """Programs that no machine can be run without, and that are not installed here."""
    return [program for program in PROGRAMS if not shutil.which(program, path=path)]


def run(machine: Machine, parameters: Callable[[Path], Mapping[str, Any]] | None = None, *, keep: bool = False) -> Result:
    """Play the scenario. What is left of a run that did not pass stays in its directory, and of any if it is to be kept;
    `parameters` makes those that depend on the directory, beside the machine's."""
    # Not in a caller's long directories: the path of a Unix socket has 107 bytes.
    result = Result(Path(tempfile.mkdtemp(prefix="khod-vm-")))
    if parameters is not None:
        machine = replace(machine, parameters={**machine.parameters, **parameters(result.directory)})
    prepare(machine, result.directory)
    command = arguments(machine, result.directory)
    with (
        qemu.listening(result.directory / qemu.PORT) as listener,
        qemu.power(command, result.directory) as running,
    ):
        try:
            _follow(machine, listener, running, result)
        except KeyboardInterrupt:
            result.discard()
            raise
    if result.outcome is Outcome.PASSED and not keep:
        shutil.rmtree(result.directory)
    return result


def prepare(machine: Machine, directory: Path) -> None:
    """What the guest will find: its job and its parameters in shared/, and a disk of its own."""
    for name in INSIDE:
        shutil.copyfile(HERE / name, directory / name)
    (directory / "init").chmod(0o755)
    shared = directory / "shared"
    shared.mkdir()
    parameters = {"kernel": str(machine.kernel), "stage_deadline": machine.stage_deadline, **machine.parameters}
    (shared / "parameters.json").write_text(json.dumps(parameters))
    variables = " ".join(f"{name}={shlex.quote(value)}" for name, value in machine.environment.items())
    command = shlex.join([*machine.python, "-P", f"{HERE}/guest.py", str(machine.scenario.resolve())])
    (shared / "job").write_text(f"cd {shlex.quote(str(machine.start))}\n{variables} {command}\n")
    image = directory / "state.img"
    with open(image, "wb") as f:
        f.truncate(STATE_BYTES)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(image)], check=True, env={"PATH": PATH}, timeout=30)


def root_words(directory: Path) -> tuple[str, ...]:
    """Words for the command line of every kernel of a run: what its root is, and what starts there."""
    return (
        "ro", "rootfstype=9p",
        # The root does not change under the guest, and 9p without a cache asks the host at every step of an import.
        "rootflags=trans=virtio,version=9p2000.L,msize=524288,cache=loose",
        f"init={directory}/init",
    )  # fmt: skip


def arguments(machine: Machine, directory: Path, *, serial: str = "") -> list[str]:
    """The command that runs QEMU on what `prepare` made: see `qemu.arguments`."""
    words = (*root_words(directory), *machine.options, *machine.cmdline)
    return [
        *qemu.arguments(
            directory, machine.kernel,
            cpu=machine.cpu, cpus=machine.cpus, memory=machine.memory, words=words, serial=serial,
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
                    machine.told(result.records[-1])
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
