# SPDX-License-Identifier: LGPL-2.1-or-later
"""The participant on an event loop: its calls are awaited, its workload's are coroutines of that loop."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from khod.client import Claimed, Notice
from khod.client.aio import Participant, Workload
from khod.errors import InvalidRequest, Lost
from tests.integration.client.scripted import Answer, Heard, ScriptedKhod


class Guest(Workload):
    """Notes its calls, each of which takes more than one turn of the loop."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[tuple[str, Notice]] = asyncio.Queue()
        self.refuses = ""

    async def _note(self, call: str, notice: Notice) -> None:
        await asyncio.sleep(0)
        self.calls.put_nowait((call, notice))
        if self.refuses == call:
            raise ValueError("no")

    async def preparing(self, notice: Notice) -> None:
        await self._note("preparing", notice)

    async def quiesce(self, notice: Notice) -> None:
        notice.states["vm1"]["vcpus"].write(b"registers")
        await self._note("quiesce", notice)

    async def commit(self, notice: Notice) -> None:
        await self._note("commit", notice)

    async def executing(self, notice: Notice) -> None:
        await self._note("executing", notice)

    async def aborted(self, notice: Notice) -> None:
        await self._note("aborted", notice)

    async def restored(self, notice: Notice) -> None:
        await self._note("restored", notice)

    async def expect(self, call: str) -> Notice:
        async with asyncio.timeout(10):
            name, notice = await self.calls.get()
        assert name == call
        return notice


async def heard(khod: ScriptedKhod, *methods: str) -> Heard:
    return await asyncio.to_thread(khod.next, *methods)


def run(test: Callable[[], object]) -> None:
    """The test, in a loop with a deadline."""

    async def inside() -> None:
        async with asyncio.timeout(20):
            await test()  # type: ignore[misc]

    asyncio.run(inside())


def test_an_update(khod: ScriptedKhod) -> None:
    async def test() -> None:
        guest = Guest()
        async with Participant(guest, path=khod.path) as participant:
            await participant.register("vm1", {}, states={"vcpus": 100})
            await participant.start()
            await heard(khod, "Register")
            news = (await heard(khod, "Subscribe")).line
            for phase, methods in (("preparing", ("Ready",)), ("quiesce", ("GetStates", "Ready")), ("commit", ("Ready",))):
                news.tell(phase, "u1", handles=["h1"], deadline=10.0)
                await guest.expect(phase)
                for method in methods:
                    last = await heard(khod, method)
                assert (last.parameters.pop("stood", 0.0) > 0) == (phase == "quiesce")
                assert last.parameters == {"update": "u1", "phase": phase, "handles": ["h1"]}
            assert os.pread(khod.state_files["vcpus"], 9, 8) == b"registers"
            news.tell("executing", "u1")
            await guest.expect("executing")
            news.tell("aborted", "u1", reason="it came back")
            assert (await guest.expect("aborted")).reason == "it came back"
            guest.refuses = "preparing"
            news.tell("preparing", "u2", deadline=10.0)
            assert (await heard(khod, "Failed")).parameters["reason"] == "no"

    run(test)


def test_errors_arrive(khod: ScriptedKhod, tmp_path: Path) -> None:
    async def test() -> None:
        async with Participant(Guest(), path=khod.path) as participant:
            with pytest.raises(InvalidRequest, match="nothing to answer for"):
                await participant.start()
        with pytest.raises(Lost):
            async with Participant(Guest(), path=tmp_path / "none.sock"):
                raise AssertionError("nobody is there")

    run(test)


def test_a_claim_whose_caller_is_cancelled_leaves_nothing_open(khod: ScriptedKhod) -> None:
    asked, go = threading.Event(), threading.Event()

    def claim(_: Heard) -> Answer:
        asked.set()
        assert go.wait(10)
        fds = [{"name": "ram", "fd": 0}]
        answer = {"answer": "fds", "reason": "", "fds": fds, "states": [], "handle": "h9"}
        return {"parameters": {"claim": answer}}, [os.memfd_create("ram", 0)]

    async def test() -> None:
        async with Participant(Guest(), path=khod.path) as participant:
            await participant.register("vm0", {})
            await heard(khod, "Register")
            before = set(Path("/proc/self/fd").iterdir())  # noqa: ASYNC240 - /proc
            khod.plan("Claim", claim)
            claiming = asyncio.create_task(participant.claim("vm1"))
            await asyncio.to_thread(asked.wait, 10)
            claiming.cancel()
            await asyncio.sleep(0)
            assert not claiming.done()  # the call is under way
            go.set()
            with pytest.raises(asyncio.CancelledError):
                await claiming
            await heard(khod, "Claim")
            left = {fd.name for fd in set(Path("/proc/self/fd").iterdir()) - before if fd.exists()}  # noqa: ASYNC240
            assert not left
            khod.plan("Claim", claim)
            claimed = await participant.claim("vm1")
            assert isinstance(claimed, Claimed) and list(claimed.fds) == ["ram"]
            claimed.close()

    run(test)


def test_closing_within_a_call_to_the_workload(khod: ScriptedKhod) -> None:
    async def test() -> None:
        closed = asyncio.Event()

        class Closing(Workload):
            async def preparing(self, notice: Notice) -> None:
                await participant.close()
                closed.set()

        participant = Participant(Closing(), path=khod.path)
        await participant.__aenter__()
        await participant.register("vm1", {})
        await participant.start()
        await heard(khod, "Register")
        (await heard(khod, "Subscribe")).line.tell("preparing", "u1", deadline=5.0)
        await closed.wait()
        await participant.close()

    run(test)


def test_closing_waits_for_a_call_that_is_under_way(khod: ScriptedKhod) -> None:
    async def test() -> None:
        begun, go, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        class Slow(Workload):
            async def preparing(self, notice: Notice) -> None:
                begun.set()
                await go.wait()
                ended.set()

        participant = Participant(Slow(), path=khod.path)
        await participant.__aenter__()
        await participant.register("vm1", {})
        await participant.start()
        await heard(khod, "Register")
        (await heard(khod, "Subscribe")).line.tell("preparing", "u1", deadline=5.0)
        await begun.wait()
        closing = asyncio.create_task(participant.close())
        await asyncio.sleep(0)
        go.set()
        await closing
        assert ended.is_set()

    run(test)
