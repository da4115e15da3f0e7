# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU, whatever runs in it: its arguments, its power, the lines that the guest says, one at a time."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from khod.rehearsal.tsc import host_tsc_khz

QEMU = "qemu-system-x86_64"
PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
PORT = "verdict"


class Outcome(StrEnum):
    """How a run went."""

    PASSED = "passed"
    FAILED = "failed"
    """The scenario said so, with a traceback."""
    LOST = "lost"
    """It said nothing."""


@dataclass
class Deadline:
    """Until when a word is waited for (time.monotonic), and what it would be the end of."""

    overall: float
    due: float
    of: str = "boot"

    def left(self) -> float:
        """Seconds, 0 when it is past."""
        return max(0.0, min(self.due, self.overall) - time.monotonic())

    def __str__(self) -> str:
        return self.of if self.due < self.overall else "the whole run"


def arguments(
    directory: Path,
    kernel: Path,
    *,
    cpu: str,
    cpus: int,
    memory: str,
    words: tuple[str, ...],
    serial: str = "",
) -> list[str]:
    """The command that runs QEMU, without disks and file systems; `listening` must have made the socket `verdict` in the
    directory before. `serial` is where the console goes, the file serial.log by default; `words` are the kernel's, and say
    whether KHO and live update are on."""
    return [
        "setpriv", "--pdeathsig", "KILL",
        QEMU, "-nodefaults", "-display", "none", "-no-reboot",
        "-machine", "q35", "-accel", "tcg", "-cpu", cpu, "-smp", str(cpus), "-m", memory,
        "-kernel", str(kernel), "-append", " ".join([*common_words(), *words]),
        "-serial", serial or f"file:{directory}/serial.log",
        "-device", "virtio-serial-pci",
        "-chardev", f"socket,id=verdict,path={directory}/{PORT}",
        "-device", "virtserialport,chardev=verdict,name=khod.verdict",
    ]  # fmt: skip


def common_words() -> tuple[str, ...]:
    """Words for the command line of every kernel that runs in a machine of ours."""
    words = ("console=ttyS0", "quiet", "panic=-1")
    # Under emulation a kernel that was kexec'ed cannot calibrate its TSC and settles on a wrong rate.
    return (*words, f"tsc_early_khz={khz}") if (khz := host_tsc_khz()) else words


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    """A socket that waits for QEMU to connect the guest's port for verdicts to it."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield listener


@contextlib.contextmanager
def power(command: list[str], directory: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A running QEMU, which is gone afterwards together with all that it started."""
    with open(directory / "qemu.log", "wb") as log:
        qemu = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={"PATH": PATH, "LANG": "C.UTF-8"},
            cwd=directory,
            start_new_session=True,
        )
    try:
        yield qemu
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(qemu.pid, signal.SIGKILL)
        qemu.wait()


def accept(listener: socket.socket, directory: Path) -> socket.socket:
    """The guest's port, once QEMU has connected it. Raises TimeoutError with what QEMU said."""
    listener.settimeout(10)
    try:
        return listener.accept()[0]
    except TimeoutError:
        said = (directory / "qemu.log").read_text(errors="replace").strip()
        raise TimeoutError(f"QEMU did not start: {said}") from None


def messages(channel: socket.socket, deadline: Deadline) -> Iterator[dict[str, Any]]:
    """The guest's lines, until the other end closes or the deadline is past."""
    poll = select.poll()  # select(2) knows descriptors below 1024 alone
    poll.register(channel, select.POLLIN)
    pending = b""
    while True:
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            yield json.loads(line)
        ready = poll.poll(deadline.left() * 1000)
        part = channel.recv(65536) if ready else b""
        if not part:
            return
        pending += part


def silence(qemu: subprocess.Popen[bytes], deadline: Deadline) -> str:
    """Why there is no word any more."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        return f"QEMU ended with status {qemu.wait(0.5)} during {deadline.of}"
    return f"no word before the deadline of {deadline}"


def command(path: Path, name: str, **arguments: Any) -> Any:
    """One command of QEMU's machine protocol, on a connection of its own. Raises RuntimeError with QEMU's words."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(path))
        with connection.makefile("rw") as lines:
            answer: dict[str, Any] = {}
            for execute, given in (("qmp_capabilities", {}), (name, arguments)):
                lines.write(json.dumps({"execute": execute, "arguments": given}) + "\n")
                lines.flush()
                while "return" not in (answer := json.loads(lines.readline())):
                    if "error" in answer:
                        raise RuntimeError(f"{execute}: {answer['error']['desc']}")
            return answer["return"]
