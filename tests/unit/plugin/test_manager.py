# SPDX-License-Identifier: LGPL-2.1-or-later
"""Plugins are held to the contract of the hooks, and isolated from each other."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from khod.core.driver import Driver, Instance
from khod.core.ports import Machine
from khod.core.registry import InstanceState
from khod.core.state import State
from khod.errors import InvalidRequest, Refused, UpdateFailed
from khod.kernel.files import KernelFiles
from khod.plugin import Declaration, Preserve, Probe, Request, StateBound, hookimpl
from khod.plugin.manager import PluginError, PluginManager
from tests.orchestration.world import Recorder, World

MACHINE = cast("Machine", None)
REQUEST = Request("vm-1", {"ram": 3}, {})


def instance(**properties: bytes) -> Instance:
    return Instance("vm-1", {}, MACHINE, {"ram": 3}, {}, properties)


class Plain:
    """The least that a plugin is: two hooks."""

    @hookimpl
    def khod_compatible(self) -> Any:
        return "test,plain-v1"

    @hookimpl
    def khod_declare(self, request: Request) -> Any:
        return Declaration("test,plain-v1", tuple(Preserve(n, fd) for n, fd in request.fds.items()))


def plugin(base: type = Plain, /, **hooks: Any) -> object:
    """A plugin with these hooks beside or instead of Plain's."""
    return type("Made", (base,), {name: staticmethod(hookimpl(hook)) for name, hook in hooks.items()})()


def driver(**hooks: Any) -> Driver:
    return PluginManager().register(plugin(**hooks), "made")


class TestRegister:
    def test_two_hooks_are_enough_and_the_rest_has_defaults(self) -> None:
        async def scenario() -> None:
            made = driver()
            assert made.name == "made"
            assert made.compatible == ("test,plain-v1",)
            assert await made.probe(MACHINE) == Probe(True)
            assert await made.declare(MACHINE, REQUEST) == Declaration("test,plain-v1", (Preserve("ram", 3),))
            assert await made.check(instance()) == ()
            assert await made.freeze(instance()) == {}
            assert await made.describe(instance()) == {}
            for hook in (made.prepare, made.thaw, made.restore, made.finish):
                await hook(instance())

        asyncio.run(scenario())

    @pytest.mark.parametrize(
        ("hooks", "said"),
        [
            ({"khod_freze": lambda: None}, "khod_freze"),
            ({"khod_check": lambda instance, everything: ()}, "everything"),
            ({"khod_compatible": lambda: 5}, "returned 5, not strings"),
            ({"khod_compatible": lambda: ()}, "returned (), not strings"),
            ({"khod_compatible": lambda: ["a,b-v1", ""]}, "not strings"),
            ({"khod_compatible": lambda: b"a,b-v1"}, "not strings"),
        ],
    )
    def test_a_plugin_that_breaks_the_contract_leaves_no_trace(self, hooks: dict[str, Any], said: str) -> None:
        manager = PluginManager()
        with pytest.raises(PluginError) as caught:
            manager.register(plugin(**hooks), "made")
        assert "made" in str(caught.value)
        assert said in str(caught.value)
        assert manager.names() == []
        assert manager.for_compatible("test,plain-v1") is None
        manager.register(plugin(), "made")
        assert manager.names() == ["made"]

    @pytest.mark.parametrize("missing", ["khod_compatible", "khod_declare"])
    def test_required_hooks_are_required(self, missing: str) -> None:
        other = {"khod_compatible": lambda: "a,b-v1", "khod_declare": lambda: None}
        del other[missing]
        with pytest.raises(PluginError, match=f"does not implement {missing}"):
            PluginManager().register(plugin(object, **other), "made")

    def test_a_hook_that_raises_at_the_start_is_a_plugin_that_cannot_be_used(self) -> None:
        def khod_compatible() -> str:
            raise RuntimeError("no licence")

        manager = PluginManager()
        with pytest.raises(PluginError, match=r"'made': khod_compatible raised RuntimeError: no licence"):
            manager.register(plugin(khod_compatible=khod_compatible), "made")
        manager.register(plugin(), "made")

    def test_two_plugins_cannot_read_the_same_nodes(self) -> None:
        manager = PluginManager()
        first = manager.register(plugin(khod_compatible=lambda: ["a,b-v2", "a,b-v1"]), "first")
        with pytest.raises(PluginError, match=r"\['a,b-v1'\]"):
            manager.register(plugin(khod_compatible=lambda: ["a,c-v1", "a,b-v1"]), "second")
        assert manager.for_compatible("a,b-v1") is first
        assert manager.for_compatible("a,c-v1") is None
        assert manager.names() == ["first"]

    def test_a_name_is_taken_once(self) -> None:
        manager = PluginManager()
        first = manager.register(plugin(), "made")
        with pytest.raises(PluginError, match="made"):
            manager.register(plugin(khod_compatible=lambda: "a,b-v1"), "made")
        assert manager.get("made") is first
        assert manager.for_compatible("a,b-v1") is None

    def test_an_unknown_driver_is_told_from_those_that_exist(self) -> None:
        manager = PluginManager()
        with pytest.raises(InvalidRequest, match="drivers here: none"):
            manager.get("vfio")
        manager.register(plugin(), "made")
        with pytest.raises(InvalidRequest, match="drivers here: made"):
            manager.get("vfio")


class TestCalls:
    @pytest.mark.parametrize(
        ("hook", "wrong", "said"),
        [
            ("probe", True, "khod_probe returned bool, not Probe"),
            ("declare", {"fds": []}, "khod_declare returned dict, not Declaration"),
            ("declare", None, "khod_declare returned None"),
            ("check", 7, "khod_check returned int, not Sequence"),
            ("freeze", b"state", "khod_freeze returned bytes, not Mapping"),
            ("describe", ["fine"], "khod_describe returned list, not Mapping"),
        ],
    )
    def test_what_is_returned_is_looked_at(self, hook: str, wrong: object, said: str) -> None:
        made = driver(**{f"khod_{hook}": lambda: wrong})
        arguments = {"probe": (MACHINE,), "declare": (MACHINE, REQUEST)}.get(hook, (instance(),))
        with pytest.raises(PluginError, match=said):
            asyncio.run(getattr(made, hook)(*arguments))

    @pytest.mark.parametrize(
        ("declared", "said"),
        [
            (Declaration("test,other-v1", (), made=("ram",)), "declares 'test,other-v1' and writes 'test,plain-v1'"),
            (Declaration("test,plain-v1", (Preserve("ram", 9),)), r"descriptors \[9\] that were not in the request"),
            (Declaration("test,plain-v1", (), (StateBound("a", 1), StateBound("a", 1))), "of one name"),
            (Declaration("test,plain-v1", (), (StateBound("a", -1),)), "negative size"),
            (Declaration("test,plain-v1", (), properties={"khod,owner": b""}), "belong to khod"),
            (Declaration("test,plain-v1", ()), r"\['ram'\] that are neither preserved nor made anew"),
            (Declaration("test,plain-v1", (Preserve("ram", 3),), made=("ram",)), r"\['ram'\] .* or both"),
        ],
    )
    def test_a_declaration_is_held_to_its_contract(self, declared: Declaration, said: str) -> None:
        with pytest.raises((PluginError, InvalidRequest), match=said):
            asyncio.run(driver(khod_declare=lambda: declared).declare(MACHINE, REQUEST))

    def test_freeze_changes_values_and_makes_none_longer(self) -> None:
        made = driver(khod_freeze=lambda: {"head": b"12345678"})
        assert asyncio.run(made.freeze(instance(head=b"87654321"))) == {"head": b"12345678"}
        with pytest.raises(PluginError, match="returned 8 bytes for property 'head', declared with 4"):
            asyncio.run(made.freeze(instance(head=b"1234")))
        with pytest.raises(PluginError, match="declared with 0"):
            asyncio.run(made.freeze(instance()))

    def test_an_error_of_ours_goes_through_and_any_other_names_the_plugin(self) -> None:
        def refuse() -> None:
            raise Refused("not now", hint="later")

        def stumble() -> None:
            raise ZeroDivisionError("by zero")

        with pytest.raises(Refused, match=r"^not now \(later\)$"):
            asyncio.run(driver(khod_prepare=refuse).prepare(instance()))
        with pytest.raises(PluginError, match=r"plugin 'made': khod_prepare raised ZeroDivisionError: by zero") as caught:
            asyncio.run(driver(khod_prepare=stumble).prepare(instance()))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_a_hook_gets_the_arguments_that_it_asks_for(self) -> None:
        seen: list[object] = []

        def khod_declare(request: Request) -> Declaration:
            seen.append(request)
            return Declaration("test,plain-v1", (), made=("ram",))

        asyncio.run(driver(khod_declare=khod_declare).declare(MACHINE, REQUEST))
        assert seen == [REQUEST]

    def test_async_hooks_run_in_the_loop_and_blocking_ones_beside_it(self) -> None:
        """The blocking one waits for the other: were it run in the loop, both would stand still for ever."""
        go = threading.Event()
        threads: dict[str, int] = {}

        def khod_prepare() -> None:
            threads["blocking"] = threading.get_ident()
            assert go.wait(30), "the loop stood still"

        async def khod_restore() -> None:
            threads["async"] = threading.get_ident()
            await asyncio.sleep(0)
            go.set()

        made = driver(khod_prepare=khod_prepare, khod_restore=khod_restore)

        async def scenario() -> None:
            await asyncio.gather(made.prepare(instance()), made.restore(instance()))

        asyncio.run(scenario())
        assert threads["async"] == threading.get_ident() != threads["blocking"]

    def test_a_blocking_hook_is_waited_for_beyond_its_deadline(self) -> None:
        """What it works on is closed afterwards."""
        at_work, proceed = threading.Event(), threading.Event()
        ended: list[str] = []

        def khod_freeze() -> None:
            at_work.set()
            assert proceed.wait(30)
            ended.append("freeze")

        async def frozen() -> None:
            async with asyncio.timeout(0.01):
                await driver(khod_freeze=khod_freeze).freeze(instance())

        async def scenario() -> None:
            task = asyncio.create_task(frozen())
            assert await asyncio.to_thread(at_work.wait, 30)
            await asyncio.wait([task], timeout=0.05)
            assert not task.done()
            proceed.set()
            with pytest.raises(TimeoutError):
                await task
            assert ended

        asyncio.run(scenario())

    def test_what_is_made_anew_too_late_is_closed(self) -> None:
        made = os.memfd_create("anew")
        at_work, proceed = threading.Event(), threading.Event()

        def khod_restore() -> Mapping[str, int]:
            at_work.set()
            assert proceed.wait(30)
            return {"ram": made}

        async def scenario() -> None:
            machine = cast("Machine", SimpleNamespace(files=KernelFiles()))
            task = asyncio.create_task(driver(khod_restore=khod_restore).restore(replace(instance(), machine=machine)))
            assert await asyncio.to_thread(at_work.wait, 30)
            task.cancel()
            await asyncio.sleep(0)
            proceed.set()
            await asyncio.wait([task])
            assert task.cancelled()

        asyncio.run(scenario())
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(made)

    def test_an_async_hook_can_be_cancelled(self) -> None:
        async def khod_freeze() -> Mapping[str, bytes]:
            await asyncio.Event().wait()
            return {}

        async def scenario() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0):
                    await driver(khod_freeze=khod_freeze).freeze(instance())

        asyncio.run(scenario())


class TestLoad:
    """By entry points, as if installed."""

    @pytest.fixture
    def install(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
        monkeypatch.syspath_prepend(tmp_path)

        def install(name: str, source: str, module: str) -> None:
            (tmp_path / f"{module}.py").write_text(source)
            metadata = tmp_path / f"{module}-1.dist-info"
            metadata.mkdir()
            (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1\n")
            (metadata / "entry_points.txt").write_text(f"[khod]\n{name} = {module}\n")

        return install

    def test_what_cannot_be_used_is_left_out_and_named(self, install: Callable[[str, str, str], None]) -> None:
        good = (
            "from khod.plugin import hookimpl\n"
            "@hookimpl\ndef khod_compatible(): return 'test,good-v1'\n"
            "@hookimpl\ndef khod_declare(): return None\n"
        )
        install("absent", "import khod_test_is_not_installed\n", "khod_test_absent")
        install("broken", "this is no Python\n", "khod_test_broken")
        install("clash", good.replace("test,good", "khod,guestmemfd"), "khod_test_clash")
        install("empty", "", "khod_test_empty")
        install("good", good, "khod_test_good")
        install("misspelt", good + "@hookimpl\ndef khod_freze(): pass\n", "khod_test_misspelt")
        manager = PluginManager()
        problems = manager.load()
        # "clash" comes before "guestmemfd" and is of nobody's interest by itself: whoever is second is left out.
        assert [p.split("'")[1] for p in problems] == ["absent", "broken", "empty", "guestmemfd", "misspelt"]
        assert manager.names() == ["clash", "good", "iommu", "vfio"]
        assert "khod_test_is_not_installed" in problems[0]
        assert "(khod_test_broken)" in problems[1]
        assert "khod_compatible" in problems[2]
        assert "khod_freze" in problems[4]

    def test_the_bundled_plugin_is_found_and_what_was_registered_stays(self) -> None:
        manager = PluginManager()
        assert manager.load() == []
        found = manager.get("guestmemfd")
        assert manager.for_compatible("khod,guestmemfd-v1") is found
        assert manager.load() == []
        assert manager.get("guestmemfd") is found


def test_one_plugin_that_raises_in_thaw_stops_nobody_elses_thaw(world: World) -> None:
    """Both are undone after a failed freeze, and the update reports the one that could not be."""

    async def scenario() -> None:
        bad, good = Recorder("bad"), Recorder("good")
        bad.fails = {"freeze b": "cannot stop", "thaw b": "cannot go on either"}
        world.plugins = [bad, good]
        host = await world.khod()
        await world.register("a", world.memory(), "good")
        await world.register("b", world.memory(), "bad")
        await world.register("c", world.memory(), "good")
        with pytest.raises(UpdateFailed) as caught:
            await world.update()
        assert "cannot stop" in str(caught.value)
        assert "cannot go on either" in str(caught.value)
        assert {"thaw a", "thaw c"} <= set(good.log)
        assert "thaw b" in bad.log
        assert host.state is State.FAILED
        assert {e.state for e in host.registry} == {InstanceState.REGISTERED}

    asyncio.run(scenario())
