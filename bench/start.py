# SPDX-License-Identifier: LGPL-2.1-or-later
"""How long khod takes from exec to its first RETRIEVE_SESSION when a handover waits: what a guest waits for before anything
of it can be looked at. Measured against ``python -c 'import asyncio'``, the least that a program of this kind can take.

Nothing is called inside our own process. A simulated machine jumps with a khod session; as init of its second kernel
(``python -m bench.start FILE``) we plan the fault that a process dies in front of its next retrieve_session, start khod as
systemd would, and wait for its end. The session is still there afterwards, so this can be done again and again. The ways to
the simulated kernel and back, and khod's death, count as khod's.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import khod_guestmemfd

from bench.rows import Result, Row, milliseconds
from khod import simulated
from khod.core.callers import Caller, Lifetime
from khod.core.host import Host
from khod.core.service import Registration
from khod.core.settings import Settings
from khod.core.state import State
from khod.plugin.manager import PluginManager
from khod.simulated import image, power

ROUNDS = 25
TARGET = 2.5
MIB = 1 << 20


def exec_to_first_retrieve() -> Iterator[Result]:
    """The row."""
    with tempfile.TemporaryDirectory(prefix="khod-bench-") as temporary:
        directory, out = Path(temporary) / "machine", Path(temporary) / "samples.json"
        simulated.create(directory, memory=256 * MIB)
        status = power.run(directory, [sys.executable, "-m", "bench.start", str(out)])
        if status:
            raise RuntimeError(f"the simulated machine ended with status {status}")
        ours, theirs = (statistics.median(samples) for samples in json.loads(out.read_text()))
    yield Result("exec of khod to its first RETRIEVE_SESSION, to import asyncio", ours / theirs, TARGET, "x", ours, theirs)


def main() -> int:
    """Init of either kernel."""
    directory = Path(os.environ[simulated.ENVIRONMENT])
    process = simulated.connect(directory, "init")
    if process.call("boot")[2]:  # a handover: the second kernel
        Path(sys.argv[1]).write_text(json.dumps(_measure(process, directory)))
        return 0
    asyncio.run(_jump(process, directory))
    return 1  # a jump does not return


async def _jump(process: simulated.Process, directory: Path) -> None:
    """Register some memory, and go."""
    plugins = PluginManager()
    plugins.register(khod_guestmemfd, "guestmemfd")
    host = Host(simulated.machine(process), Settings(reserve=MIB), plugins)
    assert await host.start() is State.IDLE
    asked = Registration(name="guest", lifetime=Lifetime.PERSISTENT)
    await host.register(Caller.itself(), asked, [("ram", process.memfd(64 * MIB))])
    kernel = directory / "disk" / "bzImage"
    kernel.write_bytes(image.build())
    await host.load(str(kernel))
    async for event in await host.update():
        if event.kind in ("problem", "failed"):
            print(event.message, file=sys.stderr)


def _measure(process: simulated.Process, directory: Path) -> tuple[list[float], list[float]]:
    """Milliseconds of each: khod's, and the interpreter's. In turns; the first turn warms up."""
    config = directory / "disk" / "khod.yaml"
    config.write_text(json.dumps({"machine": f"simulated:{directory}", "socket": str(directory / "khod.sock")}))
    khod = [sys.executable, "-m", "khod.daemon", "--config", str(config)]
    plain = [sys.executable, "-c", "import asyncio"]

    def start() -> None:
        process.inject("retrieve_session")
        assert _run(khod) == -signal.SIGKILL, "khod did not get as far as its session"

    ours, theirs = [], []
    for turn in range(ROUNDS + 1):
        pair = (milliseconds(start), milliseconds(lambda: _run(plain)))
        if turn:
            ours.append(pair[0])
            theirs.append(pair[1])
    return ours, theirs


def _run(argv: Sequence[str]) -> int:
    return subprocess.run(argv, stdin=subprocess.DEVNULL, timeout=60).returncode


ROWS: tuple[Row, ...] = (exec_to_first_retrieve,)

if __name__ == "__main__":
    sys.exit(main())
