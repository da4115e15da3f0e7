# SPDX-License-Identifier: LGPL-2.1-or-later
"""The side of a run that is inside the machine: once in each of its kernels.

Run by ``init`` as ``guest.py SCENARIO``. Which function of the scenario is run, ``before``, ``after``, ``after2``…, is told by
the number of boots, counted on the disk that outlives them: QEMU would have ended at a reset, so that each but the first
came by kexec. The kernel counts kexecs as well, and hands the number to its successor, but one that does not understand its
predecessor knows nothing of it. A function but the last ends in a jump; one that returns instead has failed, unless it has
said that all is `over`.

What happens is told to the host line by line, as JSON, over a virtio serial port: ``machine.py`` has the other half.
"""

from __future__ import annotations

import faulthandler
import importlib.util
import json
import os
import signal
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

STAGES = ("before", "after", "after2", "after3", "after4")
STATE = Path("/run/state")
SHARED = Path("/run/shared")
PORT = "khod.verdict"
_METADATA = Path("/sys/kernel/debug/kho/in/sub_fdts/kexec-metadata")


class Guest:
    """What a scenario's functions are given."""

    def __init__(self, channel: int) -> None:
        self._channel = channel
        self._pending = b""
        self.stage = boots()
        """0 before the first jump."""
        self.is_over = False
        self.state = STATE
        """A directory on a disk that outlives the jump."""
        self.shared = SHARED
        """A directory of the host: kept when the run does not pass."""
        self.parameters: dict[str, Any] = json.loads((SHARED / "parameters.json").read_text())
        """What the host gave to `run`."""
        self.kernel = Path(self.parameters["kernel"])
        """The image to jump into."""

    def record(self, name: str, **facts: Any) -> None:
        """Tell the host something: it is there whatever happens next."""
        self.tell("record", name=name, facts=facts)

    def ask(self, name: str, **arguments: Any) -> Any:
        """Have the host call what it has under `name` in `answers`, and wait for what it returns."""
        self.tell("ask", name=name, arguments=arguments)
        while b"\n" not in self._pending:
            part = os.read(self._channel, 65536)
            if not part:
                raise EOFError("the host closed the channel")
            self._pending += part
        line, _, self._pending = self._pending.partition(b"\n")
        return json.loads(line)

    def over(self) -> None:
        """The run passes when this function returns, whatever stages the scenario has left."""
        self.is_over = True

    def tell(self, event: str, **fields: Any) -> None:
        """One line to the host."""
        data = json.dumps({"event": event, "stage": self.stage, **fields}).encode() + b"\n"
        while data:
            data = data[os.write(self._channel, data) :]


def boots() -> int:
    """Boots before this one, which is counted. Raises AssertionError if the kernel knows better."""
    with open(STATE / "boots", "ab", buffering=0) as file:
        before = file.tell()
        file.write(b".")
        os.fsync(file.fileno())
    count = kexec_count()
    assert count in (0, before), f"the kernel counts {count} kexecs since the cold boot, there were {before}"
    return before


def kexec_count() -> int:
    """Jumps since the cold boot: u32 at 69 of struct kho_kexec_metadata; 0 where the kernel knows of none."""
    try:
        return int(struct.unpack_from("=I", _METADATA.read_bytes(), 69)[0])
    except FileNotFoundError:
        return 0


def open_port() -> int:
    """The serial port to the host. There is no udev here to make the link in /dev/virtio-ports."""
    for port in Path("/sys/class/virtio-ports").iterdir():
        if (port / "name").read_text().strip() == PORT:
            return os.open(f"/dev/{port.name}", os.O_RDWR | os.O_CLOEXEC)
    raise FileNotFoundError(f"no virtio serial port named {PORT}")


def load(scenario: Path) -> ModuleType:
    """The scenario as a module."""
    spec = importlib.util.spec_from_file_location(f"scenario_{scenario.stem}", scenario)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def play(guest: Guest, scenario: Path) -> None:
    """Run this stage's function to its end. Returning means that the scenario as a whole has passed."""
    module = load(scenario)
    name = STAGES[guest.stage]
    result = getattr(module, name)(guest)
    if hasattr(result, "__await__"):
        import asyncio  # scenarios that need none of it start without it

        asyncio.run(result)
    if not guest.is_over and guest.stage + 1 < len(STAGES) and hasattr(module, STAGES[guest.stage + 1]):
        raise AssertionError(f"{name}() returned, and there is a {STAGES[guest.stage + 1]}(): no jump happened")


def main() -> None:
    """Play, tell the verdict, and wait for the host to switch the machine off."""
    guest = Guest(open_port())
    # Where every thread is when the deadline is near: the one trace of a hang that the host can keep.
    stuck = open(SHARED / f"stuck-{guest.stage}.log", "w")  # noqa: SIM115  # open for as long as the machine is on
    faulthandler.dump_traceback_later(guest.parameters["stage_deadline"] * 0.9, file=stuck)
    guest.tell("begin", uptime=float(Path("/proc/uptime").read_text().split()[0]))
    try:
        play(guest, Path(sys.argv[1]))
    except BaseException:
        # Whatever it is: the host must hear of it, and the log is worth more than the machine.
        import subprocess  # every import here costs each boot of each test tenths of a second under emulation
        import traceback

        log = subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout
        (SHARED / f"dmesg-{guest.stage}.log").write_text(log)
        guest.tell("failed", traceback=traceback.format_exc())
    else:
        guest.tell("passed")
    while True:
        signal.pause()


if __name__ == "__main__":
    main()
