# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's host with its init: boots the image, runs a test's commands there as root would, and stays on through jumps.

The test is on this side, a plain function; ``agent.py`` in the image runs what it asks for::

    with Host() as host:
        host.run("systemctl", "is-active", "khod.service")
        host.jump("systemctl", "kexec")             # returns when the next kernel's agent is there
        assert host.record("held").facts["equal"]   # what a program in there has told

Three ends, as everywhere in the lab: *passed* (the block ended), *failed* (it raised), or *lost* (`Lost`: the kernel panicked,
QEMU ended, no word before a deadline). After the latter two the console and the journal stay in `Host.directory`.

Most tests start from a machine that has booted already: its memory is saved once for an image, and loaded in half a second.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from khod.rehearsal import qemu
from khod.rehearsal.machine import Record
from khod.rehearsal.qemu import Outcome
from khod.rehearsal.tsc import host_tsc_khz
from tests.vm import image, runner
from tests.vm import kernel as lab_kernel

HERE = Path(__file__).resolve().parent
NEEDED = ("mmdebstrap", "qemu-img", "debugfs")
PROGRAMS = "/usr/local/lib/khod-lab"
"""Where `Host.programs` go in the machine, as packages: the working directory of who runs them."""
KERNEL = "/boot/bzImage"
"""The lab's kernel, in the image."""
CONTROL = "control"
"""QEMU's own socket, in the machine's directory."""


class Lost(Exception):
    """No verdict: the machine is gone, or silent."""


@dataclass(frozen=True)
class Ran:
    """How a command ended."""

    argv: tuple[str, ...]
    status: int
    out: str
    err: str


def missing() -> str:
    """Why no such host can be run here; '' when one can."""
    if reason := runner.missing():
        return reason
    if absent := [program for program in NEEDED if not shutil.which(program, path=qemu.PATH)]:
        return f"not installed: {', '.join(absent)}"
    if not (image.image_directory() / "root.img").exists():
        return "the lab's image is not built: make lab-image"
    return ""


@dataclass
class Host:
    """A context manager: the machine is on inside of it. One at a time on a host; a second one waits."""

    cold: bool = False
    """Boot, instead of going on where a machine has booted. So is everything that is not the default of the next five."""
    memory: str = "2G"
    cpu: str = "Nehalem"
    cmdline: tuple[str, ...] = ()
    qemu: tuple[str, ...] = ()
    """More of QEMU's arguments."""
    kernel: str = ""
    """The version that it boots first, for another than that of the image."""
    deadline: float = 300
    """Seconds for everything."""
    directory: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="khod-host-")), init=False)
    """serial.log, and after a run that did not pass journal.log as well."""
    outcome: Outcome = field(default=Outcome.LOST, init=False)
    records: list[Record] = field(default_factory=list, init=False)
    """What programs in the machine have told, all of it."""
    stage: int = field(default=-1, init=False)
    """Jumps since the cold boot, as its kernel counts; -1 before there was a word."""

    def __post_init__(self) -> None:
        self.cold = self.cold or (self.memory, self.cpu, self.cmdline, self.qemu, self.kernel) != ("2G", "Nehalem", (), (), "")
        self._ids = itertools.count(1)
        self._done: dict[int, Ran] = {}
        self._asked: dict[int, tuple[str, ...]] = {}
        self._taken: dict[str, int] = {}
        self._outer = contextlib.ExitStack()
        self._powered = contextlib.ExitStack()

    # On and off.

    def __enter__(self) -> Host:
        with contextlib.ExitStack() as stack:
            stack.enter_context(runner.one_machine())
            base = image.build()
            if self.cold:
                self._switch_on(base / "root.img", "raw")
            else:
                saved = _saved(base)
                self._switch_on(saved / "disk.qcow2", "qcow2", "-incoming", f"exec:cat {saved}/memory")
            self._outer = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        with self._outer:
            self._close(error)

    def _close(self, error: BaseException | None) -> None:
        with self._powered:
            if error is None:
                self.outcome = Outcome.PASSED
            else:
                self.outcome = Outcome.LOST if isinstance(error, Lost) else Outcome.FAILED
                self._keep_journal()
                error.add_note(f"the run is {self.outcome}; logs: {self.directory}\n{self._console()}")
        self._disk.unlink(missing_ok=True)
        if error is None:
            self.discard()

    def discard(self) -> None:
        """Remove what is left of the run."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def pull_the_plug(self) -> None:
        """Take the machine's power, and boot from its disk: what it had not flushed is gone. Returns with the agent there."""
        self._powered.close()
        self._power()

    # Commands.

    def run(self, *argv: str, input: str = "", seconds: float = 60, status: int | None = 0) -> Ran:
        """Run a command to its end, which must be with `status` unless that is None. Raises AssertionError with its words."""
        return self.wait(self.start(*argv, input=input, seconds=seconds), seconds=seconds, status=status)

    def start(self, *argv: str, input: str = "", seconds: float = 60) -> int:
        """Start a command, which has so many seconds; a number to `wait` for."""
        number = next(self._ids)
        self._asked[number] = argv
        self._send({"id": number, "argv": argv, "input": input, "seconds": seconds})
        return number

    def wait(self, number: int, *, seconds: float = 60, status: int | None = 0) -> Ran:
        """Until a command has ended. Raises like `run`."""
        # The command's own limit is counted in there; what is added is for its answer to come here.
        self._listen(lambda: number in self._done, seconds + 10, f"the end of {' '.join(self._asked[number])}")
        ran = self._done.pop(number)
        if status is not None and ran.status != status:
            raise AssertionError(f"{' '.join(ran.argv)}: status {ran.status}, not {status}\n{ran.out}{ran.err}")
        return ran

    def write(self, path: str, content: str, *, mode: str = "0644") -> None:
        """A file in the machine, with the directories above it."""
        self.run("install", "-D", "-m", mode, "/dev/stdin", path, input=content)

    def programs(self, *names: str) -> None:
        """Programs of ours, ``programs/NAME.py``, into the machine, under PROGRAMS as they are here."""
        ours = [HERE / "content.py", *(HERE / "programs" / f"{name}.py" for name in ("inside", *names))]
        for path in ours:
            self.write(f"{PROGRAMS}/{path.relative_to(image.ROOT)}", path.read_text())

    def program(self, name: str, *words: str, seconds: float = 60, status: int | None = 0) -> Ran:
        """Run one of `programs` to its end: see `run`."""
        command = ("env", "-C", PROGRAMS, "python3", "-m", f"tests.vm.programs.{name}", *words)
        return self.run(*command, seconds=seconds, status=status)

    def unit(self, name: str, content: str, *, start: bool = True) -> None:
        """A unit of the machine's administrator, started, and enabled where it says how."""
        self.write(f"/etc/systemd/system/{name}", content)
        self.run("systemctl", "daemon-reload")
        if "[Install]" in content:
            self.run("systemctl", "--quiet", "enable", name)
        if start:
            self.run("systemctl", "start", name)

    # Jumps, and what is told.

    def jump(self, *argv: str, seconds: float = 120) -> None:
        """Run a command that makes the machine jump; returns when the next kernel's agent is there."""
        number = self.start(*argv, seconds=seconds)
        stage = self.stage
        self._listen(lambda: self.stage > stage or number in self._done, seconds, f"a jump by {' '.join(argv)}")
        if (ran := self._done.pop(number, None)) and ran.status:
            raise AssertionError(f"{' '.join(argv)}: status {ran.status}, and no jump\n{ran.out}{ran.err}")
        self._listen(lambda: self.stage > stage, seconds, f"the kernel after {' '.join(argv)}")

    def record(self, name: str, *, seconds: float = 60) -> Record:
        """The next thing that a program tells under this name, or told since we last asked."""

        def told() -> list[Record]:
            return [r for r in self.records if r.name == name][self._taken.get(name, 0) :]

        self._listen(lambda: bool(told()), seconds, f"the record {name}")
        record = told()[0]
        self._taken[name] = self._taken.get(name, 0) + 1
        return record

    def booted(self, *, seconds: float = 120) -> None:
        """Until everything that starts at boot has started. Raises AssertionError if something has failed to."""
        ran = self.run("systemctl", "is-system-running", "--wait", seconds=seconds, status=None)
        if ran.out.strip() != "running":
            raise AssertionError(f"the system is {ran.out.strip()}:\n{self.run('systemctl', '--failed', '--no-legend').out}")

    # Within.

    @property
    def _disk(self) -> Path:
        return self.directory / "disk.qcow2"

    def _switch_on(self, disk: Path, kind: str, *incoming: str) -> None:
        """On a fresh layer over this disk; with the memory that comes in, if any does."""
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(disk), "-F", kind, str(self._disk)]
        subprocess.run(create, check=True, timeout=30)
        self._deadline = qemu.Deadline(time.monotonic() + self.deadline, 0)
        self._power(*incoming)

    def _power(self, *incoming: str) -> None:
        (self.directory / qemu.PORT).unlink(missing_ok=True)
        with contextlib.ExitStack() as stack:
            listener = stack.enter_context(qemu.listening(self.directory / qemu.PORT))
            self._process = stack.enter_context(qemu.power([*self._arguments(), *incoming], self.directory))
            try:
                self._channel = stack.enter_context(qemu.accept(listener, self.directory))
            except TimeoutError as error:
                raise Lost(str(error)) from None
            self._said = qemu.messages(self._channel, self._deadline)
            self.stage = 0 if incoming else -1
            self._listen(lambda: self.stage >= 0, 60, "the boot")
            self._powered = stack.pop_all()

    def _arguments(self) -> list[str]:
        root = ("root=/dev/vda", "rw", "rootfstype=ext4")
        words = ("kho=on", "liveupdate=on", *root, "TERM=dumb", "systemd.show_status=0", *self.cmdline)
        return [
            *qemu.arguments(
                self.directory, lab_kernel.kernel_directory(self.kernel or lab_kernel.DEFAULT_VERSION) / "bzImage",
                cpu=self.cpu, cpus=2, memory=self.memory, words=words,
            ),
            # What is lost with the guest's power is in its own cache, not in this host's.
            "-drive", f"file={self._disk},format=qcow2,if=none,id=root,cache=unsafe",
            "-device", "virtio-blk-pci,drive=root",
            "-qmp", f"unix:{self.directory}/{CONTROL},server=on,wait=off",
            *self.qemu,
        ]  # fmt: skip

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._channel.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            raise Lost(qemu.silence(self._process, self._deadline)) from None

    def _listen(self, until: Callable[[], bool], seconds: float, what: str) -> None:
        """Take in what the machine says until something is true. Raises Lost."""
        self._deadline.due, self._deadline.of = time.monotonic() + seconds, what
        while not until():
            message = next(self._said, None)
            if message is None:
                raise Lost(qemu.silence(self._process, self._deadline))
            match message["event"]:
                case "begin":
                    self.stage = message["stage"]
                case "record":
                    self.records.append(Record(message["stage"], message["name"], message["facts"]))
                case "done":
                    number = message["id"]
                    self._done[number] = Ran(self._asked[number], message["status"], message["out"], message["err"])

    def _console(self) -> str:
        log = self.directory / "serial.log"
        return log.read_text(errors="replace")[-3000:] if log.exists() else ""

    def _keep_journal(self) -> None:
        """The journal of all boots: told by the machine itself if it still answers, else its files from the disk."""
        self._deadline.overall = time.monotonic() + 60
        try:
            ran = self.run("journalctl", "--no-pager", "-o", "short-monotonic", seconds=30, status=None)
            (self.directory / "journal.log").write_text(ran.out + ran.err)
        except Lost:
            self._powered.close()
            raw = self.directory / "disk.raw"
            for command in (
                ["qemu-img", "convert", "-O", "raw", str(self._disk), str(raw)],
                ["debugfs", "-R", f"rdump /var/log/journal {self.directory}", str(raw)],
            ):
                subprocess.run(command, check=False, capture_output=True, timeout=60, env={"PATH": qemu.PATH})
            raw.unlink(missing_ok=True)


def _saved(base: Path) -> Path:
    """A machine that has booted this image, at rest: `disk.qcow2` on top of the image, and its `memory`. Made if need be,
    and again if this host's TSC, whose rate its kernel was told, runs at another rate now. To be called with the lock held."""
    saved, khz = base / "booted", host_tsc_khz()
    if saved.exists() and abs(int((saved / "khz").read_text()) - khz) <= khz * 0.002:
        return saved
    image.say("booting the lab's host once, for tests to go on from there: half a minute")
    shutil.rmtree(saved, ignore_errors=True)
    host = Host(cold=True)
    with tempfile.TemporaryDirectory(prefix="build-", dir=lab_kernel.cache()) as work:
        ready = Path(work) / "ready"
        ready.mkdir()
        host._switch_on(base / "root.img", "raw")
        try:
            host.booted()
            # In the page cache from here on, for every test.
            host.run("khoctl", "status")
            host.run("sync")
            _save_memory(host.directory / CONTROL, ready / "memory")
        except BaseException as error:
            host._close(error)
            raise
        host._powered.close()
        shutil.move(host._disk, ready / "disk.qcow2")
        (ready / "khz").write_text(str(khz))
        ready.rename(saved)
    host._close(None)
    return saved


def _save_memory(control: Path, to: Path) -> None:
    """By QEMU's migration, which stops the machine for good. Raises RuntimeError if that fails, TimeoutError if it lasts."""
    qemu.command(control, "migrate-set-parameters", **{"max-bandwidth": 1 << 40})
    qemu.command(control, "migrate", uri=f"exec:cat >{to}")
    end = time.monotonic() + 60
    while (status := qemu.command(control, "query-migrate")["status"]) != "completed":
        if status in {"failed", "cancelled"} or time.monotonic() > end:
            raise RuntimeError(f"saving the machine's memory: {status}")
