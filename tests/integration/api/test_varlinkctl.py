# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd's varlinkctl as the judge of the wire: khod on a simulated machine, called by nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from khod.api.server import serve
from khod.core.state import State
from khod.simulated import machine
from tests.orchestration.world import World

CALLS = Path(__file__).parents[2] / "vm/varlinkctl-calls"
LAB = Path(os.environ.get("KHOD_LAB_CACHE", "~/.cache/khod-lab")).expanduser()
PUSHES = 258
"""The systemd from which on it passes descriptors."""


@pytest.fixture
def varlinkctl(tmp_path: Path) -> Path:
    """The machine's, or that of the lab's image of a host."""
    found = shutil.which("varlinkctl")
    if found and version(found) >= PUSHES:
        return Path(found)
    for root in sorted(LAB.glob("image-base-*/root")):
        libraries = root / "usr/lib/x86_64-linux-gnu"
        loader = root / "usr/lib64/ld-linux-x86-64.so.2"
        wrapper = tmp_path / "varlinkctl"
        wrapper.write_text(
            f'#!/bin/sh\nexec {loader} --library-path {libraries}:{libraries}/systemd {root}/usr/bin/varlinkctl "$@"\n'
        )
        wrapper.chmod(0o755)
        with contextlib.suppress(OSError, subprocess.CalledProcessError):
            if version(str(wrapper)) >= PUSHES:
                return wrapper
    pytest.skip(f"no varlinkctl of systemd {PUSHES} or later, here or in the lab's image")


def version(command: str) -> int:
    said = subprocess.run([command, "--version"], capture_output=True, text=True, check=True, timeout=10).stdout
    return int(said.split()[1])


async def calls(varlinkctl: Path, socket: Path, *arguments: str) -> str:
    # Into files: a varlinkctl that still listens when the machine jumps would keep pipes open.
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = await asyncio.create_subprocess_exec(
            CALLS, *arguments, env={**os.environ, "SOCKET": str(socket), "VARLINKCTL": str(varlinkctl)},
            stdin=subprocess.DEVNULL, stdout=out, stderr=err,
        )  # fmt: skip
        status = await asyncio.wait_for(process.wait(), 60)
        for file in (out, err):
            file.seek(0)
        assert status == 0, err.read()
        return out.read()


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="/dev/shm and root's rights")
def test_everything_by_varlinkctl_alone(varlinkctl: Path, tmp_path: Path) -> None:
    socket = tmp_path / "khod.sock"

    async def main() -> None:
        world = World(tmp_path)
        host = await world.khod()
        async with serve(host, machine(world.process).files, socket):
            assert (await calls(varlinkctl, socket, "before", str(world.image))).endswith("jumping\n")
            async with asyncio.timeout(30):
                while not world.kernel.jumped:  # noqa: ASYNC110 - there is no event for it: a machine is gone then
                    await asyncio.sleep(0.01)
        world.boot()
        host = await world.khod()
        assert host.state is State.RESTORED
        async with serve(host, machine(world.process).files, socket):
            assert (await calls(varlinkctl, socket, "after")).endswith("all done\n")

    asyncio.run(main())
