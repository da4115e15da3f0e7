# SPDX-License-Identifier: LGPL-2.1-or-later
"""An update with clients, on khod itself, while others do to its socket what they can."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.api.client import connect
from khod.api.server import serve
from khod.client import Participant, Workload
from khod.config import Limits
from khod.core.state import State
from khod.errors import KhodError
from khod.simulated import machine
from tests.integration.api.test_limits import FLOOD
from tests.orchestration.world import World

CLIENTS = 20
FDS = 8


@contextlib.contextmanager
def flood(path: Path) -> Iterator[None]:
    command = [sys.executable, "-I", "-S", "-c", FLOOD, str(path), str(Limits().message)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline()
        try:
            yield
        finally:
            process.kill()


def clients(path: Path) -> list[Participant]:
    """Each with an instance of some memfds, answering for it."""
    made = []
    for number in range(CLIENTS):
        fds = {f"ram{n}": os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING) for n in range(FDS)}
        for fd in fds.values():
            os.pwrite(fd, b"vm-%d" % number, 0)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
        participant = Participant(Workload(), path=path, patience=0.1)
        participant.register(f"vm-{number}", fds)
        participant.start()
        made.append(participant)
        for fd in fds.values():
            os.close(fd)
    return made


def update(path: Path, image: Path) -> list[str]:
    """The states that it went through, up to the jump, which ends the connection."""
    states: list[str] = []
    with connect(path, timeout=60) as client:
        client.load(str(image))
        with contextlib.suppress(KhodError):
            for event in client.update():
                states.append(f"{event.state}: {event.message}")
    return states


@pytest.mark.slow
def test_an_update_comes_through_a_flood(tmp_path: Path) -> None:
    path = tmp_path / "khod.sock"

    async def main() -> None:
        world = World(tmp_path)
        host = await world.khod()
        with flood(path):
            async with serve(host, machine(world.process).files, path):
                made = await asyncio.to_thread(clients, path)
                following = asyncio.create_task(asyncio.to_thread(update, path, world.image))
                async with asyncio.timeout(60):
                    while not world.kernel.jumped and not following.done():  # noqa: ASYNC110 - a machine is gone then
                        await asyncio.sleep(0.01)
                assert world.kernel.jumped, following.result()
            await following
        for participant in made:
            await asyncio.to_thread(participant.close)
        world.boot()
        assert (await world.khod()).state is State.RESTORED
        assert len(world.host.registry) == CLIENTS

    asyncio.run(main())
