# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whose instance it is: khod itself on a simulated machine, real callers, before a jump and after it."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from khod.api.server import serve
from khod.config import Rule
from khod.core.callers import Lifetime
from khod.core.host import Host
from khod.core.service import Registration
from khod.core.state import State
from khod.simulated import machine
from tests.integration.api.somebody import ONLY_ROOT, Somebody, control_group, names
from tests.orchestration.world import World, caller

RULES = (Rule("any", "", ("instances", "opaque")), Rule("unit", "khodtest-vmm@*.service", ("instances",)))


@pytest.fixture
def place() -> Iterator[Path]:
    """Not tmp_path, which its owner alone can reach."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        yield Path(directory)


def attempts(owner: str, handle: str) -> Mapping[str, Mapping[str, Any]]:
    """Everything that acts on an instance, on one that is another's."""
    mine = {"name": "vm-1", "owner": owner}
    answer = {"update": "u", "phase": "quiesce", "handles": [handle]}
    return {
        "Unregister": mine,
        "Claim": mine,
        "Discard": mine,
        "Finished": {"handle": handle},
        "Subscribe": {"handles": [handle]},
        "Ready": answer,
        "Failed": answer,
        "GetStates": {"handle": handle},
        "OpenSession": {"handle": handle},
    }


def refused(answers: list[dict[str, Any]]) -> bool:
    """Whether the answer is that it is another's, or nothing that this caller knows of: and no descriptor."""
    claim = answers[0].get("parameters", {}).get("claim")
    if claim is not None:
        return claim["answer"] in ("hold", "cold") and not claim["fds"]
    return answers[0].get("error") in ("org.khod.Host.NotPermitted", "org.khod.Host.InvalidRequest")


async def nobody_else_can(world: World, host: Host, path: Path, owner: Somebody, others: list[Somebody]) -> None:
    """Serve this khod, and try everything as everybody but `owner`, whose vm-1 is as it was afterwards."""
    async with serve(host, machine(world.process).files, path, rules=RULES):
        (before,) = await host.instances()
        handle = host.registry.named("vm-1")[0].handle
        for other in others:
            tried = attempts(f"user:{owner.user}", handle)
            calls = [(method, parameters, 0) for method, parameters in tried.items()]
            calls += [
                ("Unregister", {"handle": handle}, 0),
                ("Claim", {"name": "vm-1"}, 0),
                ("Unregister", {"name": "vm-1"}, 0),
            ]
            answers = await asyncio.to_thread(other.calls, path, *[[call] for call in calls])
            for call, answer in zip(calls, answers, strict=True):
                assert refused(answer), f"{other}: {call}: {answer}"
        assert await host.instances() == [before]


def scenario(place: Path, then: Callable[[World, Somebody, list[Somebody]], Awaitable[None]]) -> None:
    mine, another = names(2)
    world = World(place)
    with ExitStack() as stack:
        units = [
            stack.enter_context(control_group(f"system.slice/system-khodtest.slice/khodtest-vmm@{n}.service")) for n in (1, 2)
        ]

        async def main() -> None:
            host = await world.khod()
            fd = world.workload.give(world.memory(), world.process)
            asked = Registration(name="vm-1", lifetime=Lifetime.PERSISTENT)
            await host.register(caller(mine), asked, [("memory", fd)])
            # The same user in a unit is that unit, which owns nothing of the user's.
            await then(
                world, Somebody(mine), [Somebody(another), Somebody(mine, (), units[0]), Somebody(another, (), units[1])]
            )

        asyncio.run(main())


@ONLY_ROOT
def test_nobody_can_touch_anothers_instance(place: Path) -> None:
    async def then(world: World, owner: Somebody, others: list[Somebody]) -> None:
        await nobody_else_can(world, world.host, place / "khod.sock", owner, others)

    scenario(place, then)


@ONLY_ROOT
def test_nor_after_a_jump_where_its_owner_finds_it(place: Path) -> None:
    async def then(world: World, owner: Somebody, others: list[Somebody]) -> None:
        host = await world.jump()
        assert host.state is State.RESTORED
        path = place / "khod.sock"
        await nobody_else_can(world, host, path, owner, others)
        async with serve(host, machine(world.process).files, path, rules=RULES):
            ((answer,),) = await asyncio.to_thread(owner.calls, path, [("Claim", {"name": "vm-1"}, 0)])
            claim = answer["parameters"]["claim"]
            assert (claim["answer"], [entry["name"] for entry in claim["fds"]]) == ("fds", ["memory"])
            ((answer,),) = await asyncio.to_thread(owner.calls, path, [("Finished", {"handle": claim["handle"]}, 0)])
            assert "error" not in answer

    scenario(place, then)


@ONLY_ROOT
def test_a_name_can_be_everybodys(place: Path) -> None:
    async def then(world: World, owner: Somebody, others: list[Somebody]) -> None:
        path = place / "khod.sock"
        async with serve(world.host, machine(world.process).files, path, rules=RULES):
            for other in others:
                ((answer,),) = await asyncio.to_thread(other.calls, path, [("RegisterOpaque", {"name": "vm-1"}, 0)])
                assert answer["parameters"]["instance"]["owner"] != f"user:{owner.user}"
            assert f"user:{owner.user}" in [view.owner for view in await world.host.instances()]

    scenario(place, then)
