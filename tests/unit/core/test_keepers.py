# SPDX-License-Identifier: LGPL-2.1-or-later
"""What instances hang on."""

from __future__ import annotations

import asyncio
from pathlib import Path

from khod.core.callers import Lifetime
from tests.orchestration.world import Link, World, caller


def test_a_client_that_registers_and_unregisters_all_day_leaves_nothing_behind(tmp_path: Path) -> None:
    async def scenario() -> None:
        host = await World(tmp_path).khod()
        link = Link()
        me = caller(connection=link)
        for _ in range(20):
            made = await host.register_opaque(me, "vm-1", Lifetime.CONNECTION)
            await host.unregister(me, handle=made.handle)
        assert len(link._told) == 1

    asyncio.run(scenario())


def test_the_end_of_a_connection_is_that_of_all_that_hangs_on_it_and_of_nothing_else(tmp_path: Path) -> None:
    async def scenario() -> None:
        host = await World(tmp_path).khod()
        one, other = caller(), caller("other")
        for name in ("vm-1", "vm-2"):
            await host.register_opaque(one, name, Lifetime.CONNECTION)
        await host.register_opaque(one, "vm-3", Lifetime.PROCESS)
        await host.register_opaque(other, "vm-1", Lifetime.CONNECTION)
        assert isinstance(one.connection, Link)
        one.connection.end()
        async with asyncio.timeout(10):
            while len(host.registry) > 2:  # noqa: ASYNC110 - it ends in a task of khod's own
                await asyncio.sleep(0)
        assert {(str(e.owner), e.name) for e in host.registry} == {("user:root", "vm-3"), ("user:other", "vm-1")}

    asyncio.run(scenario())
