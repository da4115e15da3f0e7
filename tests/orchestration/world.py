# SPDX-License-Identifier: LGPL-2.1-or-later
"""A simulated host with khod on it, in one Python process: what the tests of orchestration drive."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import khod_guestmemfd
import pytest

from khod.core.callers import Caller, Kind, Lifetime, Owner, Right
from khod.core.host import Host
from khod.core.images import close_image
from khod.core.keepers import Watch
from khod.core.ports import Machine
from khod.core.question import ANSWERED
from khod.core.registry import Entry
from khod.core.service import Registration
from khod.core.settings import Settings
from khod.core.state import State
from khod.core.views import EventView, LifecycleView
from khod.errors import Lost, UpdateFailed
from khod.plugin import Declaration, Instance, Preserve, Request, StateBound, hookimpl
from khod.plugin.manager import PluginManager
from khod.simulated import Process, ProcessDied, Release, create, machine
from khod.simulated.image import build
from khod.simulated.kernel import Kernel
from khod.simulated.layout import DEFAULT_CMDLINE

MIB = 1 << 20
ME = Caller.itself()
"""Root, who may do everything."""
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


class Link:
    """A connection, or a process, that the test ends."""

    since = 0

    def __init__(self) -> None:
        self.there = True
        self._told: list[Callable[[], None]] = []

    def on_end(self, told: Callable[[], None]) -> None:
        self._told.append(told)

    def end(self) -> None:
        self.there = False
        for told in self._told:
            told()


def caller(
    name: str = "root", rights: Iterable[Right] = Right, *, kind: Kind = Kind.USER, connection: Link | None = None
) -> Caller:
    """Somebody, on a connection of his own."""
    link = connection or Link()
    return Caller(owner=Owner(kind, name), rights=frozenset(rights), pid=4711, connection=link, process=Link())


class Guest:
    """A client that stands still when asked, unless it is to be silent; it notes what it hears."""

    def __init__(self, *instances: str, silent: Iterable[str] = ()) -> None:
        self.instances, self.silent = instances, set(silent)
        self.log: list[str] = []
        self.on: dict[str, Callable[[], Awaitable[None]]] = {}
        """What it does before it answers, by phase."""
        self.link = Link()
        self.me = caller(connection=self.link)

    async def attend(self, host: Host) -> None:
        """Subscribe to its instances, and answer from now on."""
        self.host = host
        handles = [host.registry.get((self.me.owner, name)).handle for name in self.instances]
        self.subscription = await host.subscribe(self.me, handles)
        self.listening = asyncio.create_task(self._listen())

    async def _listen(self) -> None:
        with suppress(Lost):  # the subscription ended by itself
            async for view in self.subscription:
                self.log.append(view.phase)
                await self.hear(view)

    async def hear(self, view: LifecycleView) -> None:
        """Answer."""
        if view.phase in self.on:
            await self.on[view.phase]()
        if view.phase in ANSWERED and view.phase not in self.silent:
            await self.host.ready(self.me, view.update, view.phase)

    async def leave(self) -> None:
        """Say goodbye."""
        self.listening.cancel()
        await asyncio.wait([self.listening])
        await self.subscription.aclose()  # type: ignore[attr-defined]


Hear: TypeAlias = Callable[["Scripted", LifecycleView], Awaitable[None]]


class Scripted(Guest):
    """A client that does something of its own when it hears certain phases, and answers all others."""

    def __init__(self, *instances: str, **scripts: Hear) -> None:
        super().__init__(*instances)
        self.scripts = scripts
        self.views: list[LifecycleView] = []

    async def hear(self, view: LifecycleView) -> None:
        self.views.append(view)
        if view.phase in self.scripts:
            await self.scripts[view.phase](self, view)
        else:
            await super().hear(view)

    def heard(self, phase: str) -> LifecycleView:
        return next(v for v in self.views if v.phase == phase)


async def vanish(client: Scripted, view: LifecycleView) -> None:
    """It dies."""
    client.link.end()


async def settled() -> None:
    """Everybody's turn to hear of it."""
    for _ in range(5):
        await asyncio.sleep(0)


class World:
    """A host: one kernel at a time, khod on it, and processes that use memory."""

    kernels: ClassVar[list[Kernel]] = []
    """All that were booted."""
    hosts: ClassVar[list[Host]] = []
    """Every khod that was started."""

    def __init__(
        self,
        directory: Path,
        memory: int = 256 * MIB,
        settings: Settings = QUICK,
        *,
        systemd: bool = False,
        preserves: tuple[str, ...] = (),
        huge_pages: int = 0,
    ) -> None:
        """`preserves`: kinds of files that its kernels take besides memfds; `huge_pages`: in their pools."""
        cmdline = DEFAULT_CMDLINE + (f" hugepages={huge_pages}" if huge_pages else "")
        self.directory = create(directory / "machine", memory=memory, cmdline=cmdline, systemd=systemd)
        self.release = Release(preserves=preserves)
        self.image = directory / "bzImage"
        self.image.write_bytes(build())
        self.settings = settings
        self.plugins: list[Any] = []
        self.watch: Watch = lambda pid: None
        self.fit: Callable[[Machine], Machine] = lambda ports: ports
        """What khod's ports are put into."""
        self.boot()

    def boot(self) -> None:
        """Start the machine: the next kernel after a jump, a cold boot otherwise."""
        self.kernel = Kernel.boot(self.directory, release=self.release)
        self.kernels.append(self.kernel)
        self.workload = self.kernel.spawn("workload")

    async def khod(self) -> Host:
        """A new khod process, started."""
        return await self.khod_in(self.kernel.spawn("khod"))

    async def khod_in(self, process: Process) -> Host:
        """khod in a process that is there already."""
        self.process = process
        manager = PluginManager()
        manager.register(khod_guestmemfd, "guestmemfd")
        for plugin in self.plugins:
            manager.register(plugin, plugin.name)
        self.host = Host(self.fit(machine(self.process)), self.settings, manager, self.watch)
        self.hosts.append(self.host)
        self.told: list[str] = []
        """What systemd would hear while khod starts."""
        await self.host.start(lambda text, seconds: self.told.append(text))
        return self.host

    @classmethod
    def switch_off(cls) -> None:
        """All kernels, and the khods on them: what these had open is open in this process, which outlives them."""
        while cls.kernels:
            cls.kernels.pop().power_off()
        while cls.hosts:
            if image := cls.hosts.pop()._image:
                close_image(image)

    def power_cut(self) -> None:
        """The machine is reset in the middle of whatever it does, and boots from its disk."""
        self.kernel.power_off()
        self.boot()

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
        await self.host.register(ME, self.asked(name, driver, **kwargs), [("memory", mine)])

    @staticmethod
    def asked(name: str, driver: str = "guestmemfd", **kwargs: Any) -> Registration:
        """A registration that nothing but an operator ends, unless told otherwise."""
        return Registration(**{"name": name, "driver": driver, "lifetime": Lifetime.PERSISTENT, **kwargs})

    def entry(self, name: str) -> Entry:
        """An instance of root's."""
        return self.host.registry.get((ME.owner, name))

    def process_fd(self, name: str) -> int:
        """khod's own descriptor of an instance's first file."""
        return next(iter(self.entry(name).fds.values()))

    def received(self, descriptor: int, name: str = "vmm") -> tuple[Process, int]:
        """A new process that was sent a descriptor of khod's, and its number there."""
        process = self.kernel.spawn(name)
        return process, process.call("descriptor", self.process.pid, descriptor)

    async def claimed(self, name: str, **kwargs: Any) -> tuple[Process, int]:
        """Claim an instance: a new process that was given its first descriptor, and its number there."""
        answer = await self.host.claim(ME, name, **kwargs)
        assert answer.answer == "fds", answer
        return self.received(answer.fds[0])

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

    async def update(
        self, hold_at: State | None = None, *, overrides: Iterable[str] = (), cmdline: str | None = None
    ) -> list[EventView]:
        """Load and run an update to its end. Raises UpdateFailed, or ProcessDied when the machine jumped."""
        await self.host.load(str(self.image), cmdline=cmdline)
        return [event async for event in await self.host.update(hold_at, overrides=list(overrides))]

    async def jump(self) -> Host:
        """An update that goes through, the next kernel, and the next khod; the events are in `self.events`."""
        await self.jump_away()
        return await self.khod()

    async def jump_away(self) -> None:
        """An update that goes through, and the next kernel, without khod."""
        self.events: list[EventView] = []
        await self.host.load(str(self.image))
        try:
            async for event in await self.host.update():
                self.events.append(event)
        except ProcessDied:
            pass
        assert self.kernel.jumped, "the machine did not jump"
        self.boot()

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


async def refused(world: World, match: str, *overrides: str) -> None:
    """An update that fails, with everything as before."""
    with pytest.raises(UpdateFailed, match=match):
        await world.update(overrides=overrides)
    assert world.host.state is State.ABORTED
    assert not world.kernel.luo.outgoing
    assert not world.kernel.jumped
    await settled()
