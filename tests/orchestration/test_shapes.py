# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a khod tells of its instances, in the words of the bundled driver, is what stand-ins are made by."""

from __future__ import annotations

import asyncio
from pathlib import Path

from khod.rehearsal.shapes import File, shapes
from tests.orchestration.world import MIB, World


def test_stand_ins_are_of_the_shapes_that_are_registered(tmp_path: Path) -> None:
    async def scenario() -> None:
        world = World(tmp_path, huge_pages=8)
        await world.khod()
        sparse, huge, guest = (
            world.workload.memfd(64 * MIB),
            world.workload.special("hugetlb", 4 * MIB),
            world.workload.special("guest_memfd", MIB),
        )
        world.workload.poke(sparse, 0, b"x")
        world.workload.poke(sparse, 8 * MIB, b"x")
        for name, fd in (("sparse", sparse), ("huge", huge), ("guest", guest)):
            await world.register(name, fd, options={"carry": "yes"})
        found, others = shapes(await world.host.instances())
        files = {shape.name: shape.files for shape in found}
        (ram,) = files["sparse"]
        assert files == {"sparse": (ram,), "huge": (File(ram.name, "hugetlb", 4 * MIB, 4 * MIB),)}
        assert (ram.kind, ram.size, ram.allocated) == ("memfd", 64 * MIB, 8192)
        assert [label.rpartition("/")[2] for label in others] == ["guest"]

    asyncio.run(scenario())
