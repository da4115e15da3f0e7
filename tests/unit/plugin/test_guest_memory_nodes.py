# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the bundled driver reads in a node comes from the previous kernel, and is taken for nothing but bytes."""

from __future__ import annotations

import asyncio
from pathlib import Path

import khod_guestmemfd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from khod_guestmemfd import properties
from khod_guestmemfd.properties import Memory

from khod.core.driver import Instance, StateArea, StateBound
from khod.core.ports import Machine
from khod.errors import FormatError
from khod.simulated import create, machine
from khod.simulated.kernel import Kernel

MIB = 1 << 20
MEMORIES = [
    Memory("ram", "memfd", MIB, 4),
    Memory("gmem", "guest_memfd", MIB, 0, carried=True, digest=bytes(32)),
    Memory("huge", "hugetlb", 2 * MIB, 0, page_size=2 * MIB, carried=True, digest=b"\x01" * 32, took=5),
]
NODE = properties.encode(MEMORIES, hashed={"gmem", "huge"})


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Machine:
    directory = tmp_path_factory.mktemp("nodes")
    return machine(Kernel.boot(create(directory / "machine", memory=64 * MIB)).spawn("khod"))


def restored(host: Machine, node: dict[str, bytes]) -> Instance:
    files = host.files
    areas = {}
    for name, size in (("carrier-gmem", MIB), ("carrier-huge", 2 * MIB)):
        areas[name] = StateArea(files, files.memfd(name, size), StateBound(name, size, bulk=True))
    return Instance("vm-1", {}, host, {"ram": files.memfd("ram", MIB)}, areas, node)


def test_a_node_says_what_was_put_into_it(host: Machine) -> None:
    assert properties.decode(restored(host, NODE)) == MEMORIES


def test_a_node_of_the_version_before_is_read(host: Machine) -> None:
    old = {name: NODE[name][:8] for name in ("memory-sizes", "memory-seals")}
    assert properties.decode(restored(host, old)) == [Memory("ram", "memfd", MIB, 4)]
    with pytest.raises(FormatError, match="2 sizes and 1 seals"):
        properties.decode(restored(host, {**old, "memory-sizes": bytes(16)}))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(NODE)), at=st.integers(0, 200), cut=st.integers(0, 40), put=st.binary(max_size=24))
def test_a_mutated_node_raises_format_errors_and_nothing_else(host: Machine, name: str, at: int, cut: int, put: bytes) -> None:
    value = NODE[name]
    at %= len(value) + 1
    node = {**NODE, name: value[:at] + put + value[at + cut :]}
    try:
        found = properties.decode(restored(host, node))
    except FormatError as error:
        assert "vm-1" in error.message
    else:
        assert len({memory.name for memory in found}) == len(found)


@pytest.mark.parametrize("name", sorted(NODE))
def test_a_property_that_is_missing_is_named(host: Machine, name: str) -> None:
    node = {key: value for key, value in NODE.items() if key != name}
    with pytest.raises(FormatError):
        properties.decode(restored(host, node))


@pytest.mark.parametrize(
    ("memory", "about"),
    [
        (Memory("gone", "memfd", MIB, 0), "'gone' is noted, and did not come through"),
        (Memory("gmem", "guest_memfd", 9 * MIB, 0, carried=True), "came back with 1048576 bytes, it had 9437184"),
        (Memory("ram", "memfd", MIB - 4096, 0), "came back with 1048576 bytes, it had 1044480"),
        (Memory("ram", "memfd", MIB, 0, digest=b"\x07" * 32), "are not those that were frozen"),
    ],
)
def test_what_does_not_fit_what_came_through_is_not_restored(host: Machine, memory: Memory, about: str) -> None:
    node = properties.encode([memory], hashed={memory.name} if memory.digest else ())
    with pytest.raises(FormatError, match=about):
        asyncio.run(khod_guestmemfd.khod_restore(restored(host, node)))


def test_nothing_stays_open_of_a_restore_that_fails_half_way(tmp_path: Path) -> None:
    kernel = Kernel.boot(create(tmp_path / "machine", memory=64 * MIB))
    process = kernel.spawn("khod")
    instance = restored(machine(process), properties.encode([MEMORIES[1], Memory("gone", "memfd", 1, 0)], hashed=()))
    before = len(kernel.task(process.pid).table.files)
    with pytest.raises(FormatError, match="gone"):
        asyncio.run(khod_guestmemfd.khod_restore(instance))
    assert len(kernel.task(process.pid).table.files) == before
