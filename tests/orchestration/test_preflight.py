# SPDX-License-Identifier: LGPL-2.1-or-later
"""Preflight on the simulated machine: what stops an update, and what comes of stopping it not."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path

import pytest

from khod.core.driver import StateBound
from khod.core.preflight.verdict import Verdict
from khod.core.state import State
from khod.core.views import CheckView
from khod.errors import InvalidRequest, NotAKernel, Refused, UpdateFailed
from khod.simulated import ProcessDied, Release, machine
from khod.simulated.image import build
from tests import images
from tests.orchestration.world import ME, MIB, Guest, World


async def checks(world: World, *overrides: str) -> dict[str, CheckView]:
    return {check.name: check for check in (await world.host.preflight(overrides=overrides)).checks}


async def blocked(world: World, name: str, words: str, cmdline: str | None = None) -> CheckView:
    """The check blocks and says these words, and the update is refused with nothing touched."""
    await world.host.load(str(world.image), cmdline=cmdline)
    found = await checks(world)
    assert found[name].verdict == Verdict.BLOCKER, found[name]
    assert words in found[name].evidence
    with pytest.raises(Refused, match=f"{name}: "):
        await world.host.update()
    assert world.host.state is State.IDLE
    assert not world.kernel.luo.outgoing
    return found[name]


def test_a_host_that_is_ready(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        await world.host.load(str(world.image))
        started = time.monotonic()
        view = await world.host.preflight()
        assert time.monotonic() - started < 2
        assert {c.name: c.verdict for c in view.checks if c.verdict != Verdict.OK} == {}
        assert (view.verdict, view.running, view.target) == ("ok", "7.3.4", "7.3.4")
        assert (await world.jump()).state is State.RESTORED

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("release", "check", "words", "state"),
    [
        (Release("7.4.0", kho="kho-v9"), "format:kho", "kho-v4 is written, kho-v9 is read", State.LOST),
        (Release("7.4.0", memfd="memfd-v9"), "format:memfd", "memfd-v2 is written, memfd-v9 is read", State.UNREACHABLE),
    ],
)
def test_another_format_blocks_and_overridden_does_what_it_was_said_to_do(
    world: World, release: Release, check: str, words: str, state: State
) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        world.image.write_bytes(build(release))
        found = await blocked(world, check, words)
        assert found.overridable
        with pytest.raises(ProcessDied):
            await world.update(overrides=[check])
        world.boot()
        host = await world.khod()
        assert host.state is state
        (update,) = await host.history()
        assert len(update.overridden) == 1
        assert words in update.overridden[0]
        assert (await host.claim(ME, "vm-1")).answer == ("cold" if state is State.LOST else "hold")

    asyncio.run(scenario())


def test_another_luo_format_cannot_be_overridden(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        world.image.write_bytes(build(Release("7.4.0", luo="luo-v9")))
        found = await blocked(world, "format:luo", "luo-v5 is written, luo-v9 is read: the target panics")
        assert not found.overridable
        with pytest.raises(Refused, match="format:luo cannot be overridden"):
            await world.host.update(overrides=["format:luo"])
        with pytest.raises(Refused, match="format:luo cannot be overridden"):
            await world.host.preflight(overrides=["format:luo"])

    asyncio.run(scenario())


def test_one_override_passes_over_one_check(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        world.image.write_bytes(build(Release("7.4.0", kho="kho-v9", memfd="memfd-v9")))
        await world.host.load(str(world.image))
        found = await checks(world, "format:kho")
        assert (found["format:kho"].overridden, found["format:memfd"].overridden) == (True, False)
        with pytest.raises(Refused, match="format:memfd"):
            await world.host.update(overrides=["format:kho"])
        with pytest.raises(InvalidRequest, match="no check is called all"):
            await world.host.update(overrides=["all"])

    asyncio.run(scenario())


def test_a_kernel_without_handover(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        world.image.write_bytes(build(Release("6.12.0", kho="", luo="", memfd="")))
        await blocked(world, "target-config", "built without CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE")
        assert "knows no kho format" in (await checks(world))["format:kho"].evidence
        world.image.write_bytes(build(Release("7.4.0", memfd="")))
        await blocked(world, "target-config", "built without CONFIG_LIVEUPDATE_MEMFD: the memory stays reserved")

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("cmdline", "words"), [("kho=on", "liveupdate=on"), ("kho=off liveupdate=1", "kho=on"), ("", "liveupdate=on")]
)
def test_a_target_that_is_not_told_to_hand_over(world: World, cmdline: str, words: str) -> None:
    async def scenario() -> None:
        await world.khod()
        await blocked(world, "target-options", f"lacks {words}", cmdline)

    asyncio.run(scenario())


def test_scratch_that_is_too_small(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        world.image.write_bytes(build(Release("7.4.0", kernel_size=64 * MIB)))
        await blocked(world, "scratch", f"the kernel of {64 * MIB} bytes fits into none of the areas")

    asyncio.run(scenario())


def test_an_image_that_was_cut_off_or_is_for_another_machine(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        whole = images.bzimage(images.vmlinux())
        world.image.write_bytes(whole[: images.SETUP + images.PAYLOAD + 100])
        found = await blocked(world, "image", "it was cut off")
        assert found.overridable
        assert (await checks(world))["format:kho"].verdict == Verdict.UNKNOWN
        world.image.write_bytes(images.bzimage(images.vmlinux(machine=183)))
        assert not (await blocked(world, "architecture", "for arm64, this machine is x86-64")).overridable
        world.image.write_bytes(b"#!/bin/sh\n" * 100)
        with pytest.raises(NotAKernel):
            await world.host.preflight(str(world.image))

    asyncio.run(scenario())


def test_memory_that_is_not_there(world: World) -> None:
    """A sparse memfd that does not fit: overridden, the kernel kills the child that preserves it, and everything is undone."""

    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.workload.memfd(512 * MIB))
        await blocked(world, "memory", "not enough memory")
        with pytest.raises(UpdateFailed, match="everything was undone"):
            await world.update(overrides=["memory"])
        assert world.host.state is State.ABORTED
        assert not world.kernel.luo.outgoing

    asyncio.run(scenario())


def test_limits_that_the_next_kernel_s_khod_would_meet(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory(8 * MIB))
        world.workload.limit_custody(memory=4 * MIB)
        await blocked(world, "next-boot", "raise MemoryMax=")

    asyncio.run(scenario())


def test_states_of_clients_count_for_the_next_kernels_limits(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory(), states=[StateBound("device", 8 * MIB)])
        world.workload.limit_custody(memory=4 * MIB)
        await blocked(world, "next-boot", "raise MemoryMax=")

    asyncio.run(scenario())


def test_an_image_of_somebody_else_is_in_place(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        await world.register("vm-1", world.memory())
        world.workload.load_old("root=/dev/vda")
        await blocked(world, "loaded", "khod did not load")
        with pytest.raises(ProcessDied):
            await world.update(overrides=["loaded"])
        world.boot()
        assert (await world.khod()).state is State.RESTORED

    asyncio.run(scenario())


def test_lockdown_and_the_device(world: World) -> None:
    async def scenario() -> None:
        await world.khod()
        world.workload.lock_down("confidentiality")
        await world.host.load(str(world.image))
        found = await checks(world)
        assert (found["lockdown"].verdict, found["device"].verdict) == (Verdict.WARNING, Verdict.OK)
        held = world.workload.open_device()
        await blocked(world, "device", "/dev/liveupdate")
        world.workload.close(held)
        world.kernel.kexec.disabled = True
        await blocked(world, "lockdown", "kernel.kexec_load_disabled is set")

    asyncio.run(scenario())


def test_a_client_that_is_gone(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await world.register("vm-1", world.memory())
        guest = Guest("vm-1")
        await guest.attend(host)
        await host.load(str(world.image))
        assert "client:vm-1" not in await checks(world)
        await guest.leave()
        guest.link.end()
        await blocked(world, "client:vm-1", "no living one is subscribed")

    asyncio.run(scenario())


def test_another_image_than_the_loaded_one_is_looked_at_and_let_go_of(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        assert {c.name for c in (await host.preflight()).checks if c.verdict == Verdict.BLOCKER} == {"image"}
        view = await host.preflight(str(world.image))
        assert (view.verdict, view.target) == ("ok", "7.3.4")
        assert (await host.status()).image is None

    asyncio.run(scenario())


def test_what_is_read_of_an_image_is_remembered_by_its_digest(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        await host.load(str(world.image))
        assert (await host.preflight()).target == "7.3.4"
        world.image.write_bytes(build(replace(Release(), release="7.9.0")))
        await host.load(str(world.image))
        assert (await host.preflight()).target == "7.9.0"

    asyncio.run(scenario())


def test_the_facts_are_those_of_the_machine(world: World) -> None:
    facts = machine(world.workload).kernel.facts()
    assert [str(f) for f in facts.formats] == ["kho-v4", "luo-v5", "memblock-v1", "memfd-v2", "reserve-mem-v1"]
    assert facts.scratch == machine(world.workload).memory.scratch()


def test_what_a_fleet_has_agreed_on_is_demanded(world: World, tmp_path: Path) -> None:
    async def scenario() -> None:
        profile = tmp_path / "fleet.yaml"
        world.settings = replace(world.settings, fleet=profile)
        host = await world.khod()
        await host.load(str(world.image))
        assert (await checks(world))["fleet"].evidence == "no profile of a fleet is demanded"
        profile.write_text("fleet: front\nformats: [kho-v4, luo-v5, memfd-v2]\n")
        assert (await checks(world))["fleet"].verdict == Verdict.OK
        profile.write_text("fleet: front\nformats: [kho-v4, luo-v6]\n")
        await blocked(world, "fleet", "luo-v6 is written, luo-v5 is read")
        profile.write_text("fleet: front\n")
        await blocked(world, "fleet", "`formats` is missing")
        profile.unlink()
        profile.mkdir()
        await blocked(world, "fleet", "not a regular file")

    asyncio.run(scenario())


def test_a_configuration_may_lie_beside_the_image(world: World) -> None:
    async def scenario() -> None:
        host = await world.khod()
        world.image.write_bytes(images.bzimage(images.vmlinux(config=None, release="7.4.0"), release="7.4.0"))
        await host.load(str(world.image))
        assert (await checks(world))["target-config"].verdict == Verdict.UNKNOWN
        beside = world.image.parent / "config-7.4.0"
        beside.write_text("CONFIG_KEXEC_FILE=y\nCONFIG_KEXEC_HANDOVER=y\nCONFIG_LIVEUPDATE=y\n")
        assert "config-7.4.0 beside it says so" in (await checks(world))["target-config"].evidence
        beside.write_text("CONFIG_KEXEC_FILE=y\n")
        await blocked(world, "target-config", "built without CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE")
        # The name is the image's word, and leads nowhere else.
        world.image.write_bytes(images.bzimage(images.vmlinux(config=None), release="../config-7.4.0"))
        await world.host.load(str(world.image))
        assert (await checks(world))["target-config"].verdict == Verdict.UNKNOWN

    asyncio.run(scenario())


def test_what_the_initrd_is_to_start_and_will_not_is_said_before(world: World) -> None:
    async def scenario() -> None:
        groups = (("vm-1",), ("shared",), ("needy",), ("gone",), ("other", "needs-other"), ("half", "vm-1"))
        world.settings = replace(world.settings, early=tuple(("user:root", names) for names in groups))
        await world.khod()
        memory = world.memory()
        await world.register("vm-1", memory, shareable=True)
        await world.register("shared", memory, shareable=True)
        await world.register("needy", world.memory(), requires=["vm-1"])
        await world.register("other", world.memory())
        await world.register("needs-other", world.memory(), requires=["other"])
        await world.register("half", world.memory(), requires=["vm-1", "other"])
        await world.host.load(str(world.image))
        found = {name: c.evidence for name, c in (await checks(world)).items() if name.startswith("early:")}
        assert set(found) == {"early:shared", "early:needy", "early:gone of user:root", "early:half"}
        for name, needed in (("shared", "vm-1"), ("needy", "vm-1"), ("half", "other")):
            assert f"needs {needed}, which is not started with it" in found[f"early:{name}"]
        assert "not registered" in found["early:gone of user:root"]
        assert (await world.jump()).state is State.RESTORED, "a warning stops nothing"

    asyncio.run(scenario())
