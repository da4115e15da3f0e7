# SPDX-License-Identifier: LGPL-2.1-or-later
"""The tutorial's plugin: found by its entry point as if it were installed, and taken through a live update."""

from __future__ import annotations

import asyncio
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from khod.core.callers import Lifetime
from khod.core.registry import InstanceState
from khod.core.service import Registration
from khod.core.state import State
from khod.errors import InvalidRequest, Refused, UpdateFailed
from khod.simulated import Process, ProcessDied
from tests.orchestration.world import ME, World

EXAMPLE = Path(__file__).parents[3] / "examples/ringlog"
SIZE = 4096 + 64 * 64


@pytest.fixture
def ringlog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The example, on sys.path with the metadata that an installer would make of its pyproject.toml."""
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    metadata = tmp_path / "site" / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    points = [f"{name} = {value}\n" for name, value in project["entry-points"]["khod"].items()]
    (metadata / "entry_points.txt").write_text("[khod]\n" + "".join(points))
    monkeypatch.syspath_prepend(EXAMPLE)
    monkeypatch.syspath_prepend(metadata.parent)
    import khod_ringlog

    yield khod_ringlog


class Writer:
    """ringlog itself, as far as it matters here."""

    def __init__(self, ringlog: ModuleType, process: Process, fd: int) -> None:
        self.ringlog, self.process, self.fd = ringlog, process, fd

    @classmethod
    def new(cls, ringlog: ModuleType, process: Process) -> Writer:
        fd = process.memfd(SIZE)
        process.write(fd, 0, ringlog.HEADER.pack(ringlog.MAGIC, 0, 0))
        return cls(ringlog, process, fd)

    @property
    def paused(self) -> bool:
        return bool(self._header()[1])

    @property
    def head(self) -> int:
        return self._header()[2]

    def _header(self) -> tuple[bytes, int, int]:
        found: tuple[bytes, int, int] = self.ringlog.HEADER.unpack(self.process.read(self.fd, 0, self.ringlog.HEADER.size))
        return found

    def log(self, text: str, *, politely: bool = True) -> bool:
        if self.paused and politely:
            return False
        self.process.write(self.fd, 4096 + self.head % 64 * 64, text.encode().ljust(64, b"\0"))
        self.process.write(self.fd, 0, self.ringlog.HEADER.pack(self.ringlog.MAGIC, self.paused, self.head + 1))
        return True


async def registered(world: World, ringlog: ModuleType, records: int, **options: str) -> Writer:
    writer = Writer.new(ringlog, world.workload)
    for number in range(records):
        assert writer.log(f"record {number}")
    fd = world.workload.give(writer.fd, world.process)
    asked = Registration(name="log", driver="ringlog", lifetime=Lifetime.PERSISTENT, options=options)
    await world.host.register(ME, asked, [("ring", fd)])
    return writer


def test_a_ring_comes_through_and_its_writer_goes_on(ringlog: ModuleType, world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await registered(world, ringlog, 70, keep="8")
        (view,) = await world.host.instances()
        assert view.detail == {"records": "70", "writer": "runs"}
        assert view.driver == "ringlog"
        host = await world.jump()
        assert host.state is State.RESTORED
        (view,) = await host.instances()
        assert (view.state, view.problem) == (InstanceState.RESTORED, "")
        answer = await host.claim(ME, "log")
        process = world.kernel.spawn("ringlog")
        writer = Writer(ringlog, process, process.call("descriptor", world.process.pid, answer.fds[0]))
        assert writer.head == 70
        assert writer.log("record 70")
        assert process.read(writer.fd, 4096 + 5 * 64, 10) == b"record 69\0"
        await host.finish()
        assert (await world.jump()).state is State.RESTORED, "the second update needs no registering"

    asyncio.run(scenario())


def test_an_update_that_is_undone_lets_the_writer_go_on(ringlog: ModuleType, world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        writer = await registered(world, ringlog, 3)
        following = await world.held(State.FROZEN)
        assert writer.paused
        assert not writer.log("too late")
        await world.host.abort()
        with pytest.raises(UpdateFailed):
            await following
        assert not writer.paused
        assert writer.log("record 3")

    asyncio.run(scenario())


@pytest.mark.parametrize("counted", [True, False])
def test_a_writer_that_did_not_stop_is_found_out(ringlog: ModuleType, world: World, counted: bool) -> None:
    """By the driver alone: khod's own sample, which would find it first in so small a file, is switched off."""

    async def scenario() -> None:
        world.settings = replace(world.settings, sample_pages=0)
        await world.khod()
        writer = await registered(world, ringlog, 3)
        following = await world.held(State.FROZEN)
        if counted:
            assert writer.log("nobody tells me", politely=False)
        else:
            world.workload.write(writer.fd, 4096 + 2 * 64, b"history, written anew")
        await world.host.proceed()
        with pytest.raises(ProcessDied):
            await following
        assert world.kernel.jumped
        world.boot()
        host = await world.khod()
        (view,) = await host.instances()
        assert view.state == InstanceState.DAMAGED
        said = "the ring has 4 records, it was frozen with 3" if counted else "the last records are not those"
        assert said in view.problem
        assert (await host.claim(ME, "log")).answer == "hold"

    asyncio.run(scenario())


def test_what_is_no_ring_or_cannot_be_stopped_is_turned_down(ringlog: ModuleType, world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        writer = Writer.new(ringlog, world.workload)

        async def refusal(fd: int, name: str = "ring", **options: str) -> str:
            with pytest.raises((InvalidRequest, Refused)) as caught:
                given = world.workload.give(fd, world.process)
                await host.register(ME, Registration(name="log", driver="ringlog", options=options), [(name, given)])
            return str(caught.value)

        assert "not a ring" in await refusal(world.memory())
        assert "'ring' is wanted" in await refusal(writer.fd, "memory")
        assert "no options ['kept']" in await refusal(writer.fd, kept="1")
        assert "keep=many" in await refusal(writer.fd, keep="many")
        assert "keep=65" in await refusal(writer.fd, keep="65")
        assert "read-only" in await refusal(world.workload.reopen(writer.fd, "r"))
        assert len(host.registry) == 0

    asyncio.run(scenario())


def test_a_ring_that_somebody_paused_blocks_the_update(ringlog: ModuleType, world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        writer = await registered(world, ringlog, 1)
        world.workload.write(writer.fd, ringlog.PAUSED_AT, b"\1")
        with pytest.raises(Refused, match="somebody else has paused the ring"):
            await world.update()

    asyncio.run(scenario())
