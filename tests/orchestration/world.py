# SPDX-License-Identifier: LGPL-2.1-or-later
"""A simulated host with khod on it, in one Python process: what the tests of orchestration drive."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import khod_guestmemfd

from khod.core.host import Host
from khod.core.settings import Settings
from khod.core.state import State
from khod.core.views import EventView
from khod.errors import UpdateFailed
from khod.plugin import Declaration, Instance, Preserve, Request, StateBound, hookimpl
from khod.plugin.manager import PluginManager
from khod.simulated import Process, ProcessDied, create, machine
from khod.simulated.image import build
from khod.simulated.kernel import Kernel

MIB = 1 << 20
QUICK = Settings(preparing=5, freezing=5, sync=5, restoring=5, reserve=MIB)


class Recorder:
    """A driver that notes what it is told, and can be told to fail or to hang at it. Has one state of 64 bytes."""

    def __init__(self, name: str = "recorder", log: list[str] | None = None) -> None:
        self.name = name
        self.log: list[str] = [] if log is None else log
        self.fails: dict[str, str] = {}
        """Hook and instance, as 'freeze vm-1', to what it raises."""
        self.hangs: set[str] = set()
        self.state = b"state"
        self.during: Any = None

    async def _note(self, hook: str, instance: Instance) -> None:
        call = f"{hook} {instance.name}"
        self.log.append(call)
        if self.during is not None:
            self.during(call)
        if call in self.hangs:
            await asyncio.Event().wait()
        if call in self.fails:
            raise UpdateFailed(self.fails[call])

    @hookimpl
    def khod_compatible(self) -> str:
        return f"test,{self.name}-v1"

    @hookimpl
    def khod_declare(self, request: Request) -> Declaration:
        return Declaration(
            f"test,{self.name}-v1",
            tuple(Preserve(name, fd) for name, fd in request.fds.items()),
            states=(StateBound("registers", 64),),
            properties={"marker": b"before"},
            size=4096,
        )

    @hookimpl
    async def khod_prepare(self, instance: Instance) -> None:
        await self._note("prepare", instance)

    @hookimpl
    async def khod_freeze(self, instance: Instance) -> Mapping[str, bytes]:
        await self._note("freeze", instance)
        instance.states["registers"].write(self.state)
        return {"marker": b"frozen"}

    @hookimpl
    async def khod_thaw(self, instance: Instance) -> None:
        await self._note("thaw", instance)

    @hookimpl
    async def khod_restore(self, instance: Instance) -> None:
        await self._note("restore", instance)
        self.log.append(f"{instance.name} {instance.states['registers'].read()!r} {instance.properties['marker']!r}")

    @hookimpl
    async def khod_finish(self, instance: Instance) -> None:
        await self._note("finish", instance)


@dataclass(eq=False)
class Guest:
    """A client that stands still when asked, unless told otherwise."""

    name: str
    instances: tuple[str, ...]
    log: list[str] = field(default_factory=list)
    silent: set[str] = field(default_factory=set)
    connected: bool = True

    @property
    def valid(self) -> bool:
        """It is its own lease."""
        return self.connected

    async def _hear(self, what: str) -> None:
        self.log.append(what)
        if what in self.silent:
            await asyncio.Event().wait()

    async def preparing(self, update: str) -> None:
        await self._hear("preparing")

    async def quiesce(self, update: str) -> Guest:
        await self._hear("quiesce")
        return self

    async def commit(self, update: str, lease: object) -> None:
        await self._hear("commit")

    async def executing(self, update: str) -> None:
        await self._hear("executing")

    async def resume(self, update: str) -> None:
        await self._hear("resume")


class World:
    """A host: one kernel at a time, khod on it, and processes that use memory."""

    def __init__(self, directory: Path, memory: int = 256 * MIB, settings: Settings = QUICK) -> None:
        self.directory = create(directory / "machine", memory=memory)
        self.image = directory / "bzImage"
        self.image.write_bytes(build())
        self.settings = settings
        self.plugins: list[Recorder] = []
        self.boot()

    def boot(self) -> None:
        """Start the machine: the next kernel after a jump, a cold boot otherwise."""
        self.kernel = Kernel.boot(self.directory)
        self.workload = self.kernel.spawn("workload")

    async def khod(self) -> Host:
        """A new khod process, started."""
        self.process = self.kernel.spawn("khod")
        manager = PluginManager()
        manager.register(khod_guestmemfd, "guestmemfd")
        for plugin in self.plugins:
            manager.register(plugin, plugin.name)
        self.host = Host(machine(self.process), self.settings, manager)
        await self.host.start()
        return self.host

    def kill(self, *victims: Process) -> None:
        """SIGKILL, all at once."""
        self.workload.kill(*(victim.pid for victim in victims))

    def twins(self) -> tuple[Process, ...]:
        """The two processes of the custodian."""
        return tuple(self.kernel.seen(task) for task in self.kernel.custodian.twins)

    def memory(self, size: int = MIB, fill: bytes = b"guest", process: Process | None = None) -> int:
        """A memfd of the workload's, with `fill` at the start of every page."""
        owner = process or self.workload
        fd = owner.memfd(size)
        for offset in range(0, size, 4096):
            owner.write(fd, offset, fill + offset.to_bytes(8, "little"))
        return fd

    def intact(self, fd: int, size: int = MIB, fill: bytes = b"guest", process: Process | None = None) -> bool:
        """Whether that memory still is as `memory` made it."""
        owner = process or self.workload
        return all(
            owner.read(fd, offset, len(fill) + 8) == fill + offset.to_bytes(8, "little") for offset in range(0, size, 4096)
        )

    async def register(self, name: str, fd: int, driver: str = "guestmemfd", **kwargs: Any) -> None:
        """Register a descriptor of the workload's."""
        mine = self.workload.give(fd, self.process)
        await self.host.register(name, driver, [("memory", mine)], owner="uid:0", **kwargs)

    def process_fd(self, name: str) -> int:
        """khod's own descriptor of an instance's first file."""
        return next(iter(self.host.registry.get(name).fds.values()))

    def received(self, descriptor: int, name: str = "vmm") -> tuple[Process, int]:
        """A new process that was sent a descriptor of khod's, and its number there."""
        process = self.kernel.spawn(name)
        return process, process.call("descriptor", self.process.pid, descriptor)

    def contains(self, needle: bytes) -> bool:
        """Whether physical memory holds these bytes anywhere."""
        with open(self.directory / "memory", "rb") as file:
            at = 0
            while True:
                try:
                    at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                except OSError:
                    return False
                end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
                if needle in os.pread(file.fileno(), end - at, at):
                    return True
                at = end

    async def update(self, hold_at: State | None = None) -> list[EventView]:
        """Load and run an update to its end. Raises UpdateFailed, or ProcessDied when the machine jumped."""
        await self.host.load(str(self.image))
        return [event async for event in await self.host.update(hold_at)]

    async def jump(self) -> Host:
        """An update that goes through, the next kernel, and the next khod; the events are in `self.events`."""
        self.events: list[EventView] = []
        await self.host.load(str(self.image))
        try:
            async for event in await self.host.update():
                self.events.append(event)
        except ProcessDied:
            pass
        assert self.kernel.jumped, "the machine did not jump"
        self.boot()
        return await self.khod()

    async def held(self, state: State) -> asyncio.Task[list[EventView]]:
        """An update that stands at `state`; the task follows it to its end."""
        await self.host.load(str(self.image))
        events = await self.host.update(state)

        async def follow() -> list[EventView]:
            return [event async for event in events]

        async for event in events:
            if event.kind == "held":
                break
        return asyncio.create_task(follow())
