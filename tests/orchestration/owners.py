# SPDX-License-Identifier: LGPL-2.1-or-later
"""Owners of instances, for tests of what is whose."""

from __future__ import annotations

from typing import Any

from khod.core.callers import Caller, Kind, Lifetime, Right
from khod.core.ports import F_SEAL_GROW
from tests.orchestration.world import Link, World, caller

VMM = [Right.OBSERVE, Right.INSTANCES, Right.OPAQUE]


def vmm(unit: str = "vmm@1.service", connection: Link | None = None) -> Caller:
    """A unit that may have instances, and nothing else."""
    return caller(unit, VMM, kind=Kind.UNIT, connection=connection)


async def registered(world: World, who: Caller, name: str, fd: int | None = None, **asked: Any) -> str:
    """An instance of somebody's; its handle."""
    fd = world.memory() if fd is None else fd
    world.workload.call("add_seals", fd, F_SEAL_GROW)
    given = [("memory", world.workload.give(fd, world.process))]
    fields = {"lifetime": Lifetime.CONNECTION, **asked}
    return (await world.host.register(who, world.asked(name, **fields), given)).handle


async def settled(world: World) -> None:
    """Until what ended is let go of."""
    await world.host.holdings.settled()


def names(world: World) -> list[str]:
    return [entry.label for entry in world.host.registry]
