# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who subscribes to what, and what is told."""

from __future__ import annotations

import asyncio
import re
import time
from pathlib import Path

import pytest

from khod.core.callers import Right
from khod.core.question import ANSWERED, Phase
from khod.core.registry import InstanceState
from khod.core.state import State
from khod.core.subscription import BACKLOG
from khod.errors import InvalidRequest, Lost, Refused
from tests.unit.core.table import UPDATE, Link, Table, caller, hang_up, hears, quiesced, run

# Subscriptions


def test_what_cannot_be_subscribed_to() -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b", "c")
        table.add("bob's", user="bob")
        subscribe, client = table.broker.subscribe, caller()
        for handles in ([], ["no such"], ["a", "bob's"]):
            with pytest.raises(InvalidRequest):
                subscribe(client, handles)
        assert not any(t.attended for t in table.things.values())
        stream = subscribe(client, ["b", "b"])
        for who in (client, caller()):
            with pytest.raises(Refused, match="vm-b"):
                subscribe(who, ["a", "b"])
        assert not table.things["a"].attended
        assert set(await table.ask(Phase.PREPARING, 0.01)) == {"b"}, "nobody else is asked"
        await stream.aclose()
        subscribe(caller(), ["a", "b"])
        subscribe(caller("root", rights=[Right.ADMINISTER]), ["bob's"])

    run(scenario)


@pytest.mark.parametrize("state", State)
def test_who_comes_while_the_workload_is_stopped_comes_too_late(state: State) -> None:
    async def scenario(table: Table) -> None:
        (a,) = table.add("a")
        table.state, table.update = state, UPDATE
        if state in (State.FREEZING, State.FROZEN, State.EXECUTING, State.ABORTING):
            with pytest.raises(Refused, match=state):
                table.broker.subscribe(caller(), ["a"])
            assert not a.attended
        else:
            view = await hears(table.broker.subscribe(caller(), ["a"]), "subscribed")
            assert (view.reason, view.handles, view.update) == (state, ("a",), UPDATE)

    run(scenario)


def test_who_comes_while_memory_is_preserved_hears_how_it_ends() -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b")
        early = table.broker.subscribe(caller(), ["a"])
        table.state, table.update = State.PREPARED, UPDATE
        late = table.broker.subscribe(caller(), ["b"])
        table.broker.aborted(UPDATE, "for a test")
        await hears(late, "subscribed", "aborted")
        table.broker.aborted(UPDATE, "again")
        table.state = State.IDLE
        await early.aclose()
        await late.aclose()
        with pytest.raises(StopAsyncIteration):
            await anext(late)
        await hears(table.broker.subscribe(caller(), ["b"]), "subscribed")
        assert set(await table.ask(Phase.PREPARING, 0.01)) == {"a", "b"}

    run(scenario)


def test_what_came_through_a_jump_is_told_to_who_subscribes_to_it() -> None:
    async def scenario(table: Table) -> None:
        things = table.add("a", "b", "c", "d", "e")
        s = InstanceState
        for thing, state in zip(things, (s.REGISTERED, s.RESTORED, s.CLAIMED, s.DAMAGED, s.CLAIMED), strict=True):
            thing.state, thing.incoming = state, "khod.1"
        things[-1].incoming = ""  # it is finished
        table.state, table.update = State.RESTORED, UPDATE
        stream = table.broker.subscribe(caller(), [t.handle for t in things])
        view = await hears(stream, "subscribed", "restored")
        assert (view.handles, view.update) == (("b", "c"), UPDATE)

    run(scenario)


def test_a_handle_that_is_void_is_forgotten_and_the_last_one_ends_the_subscription() -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b")
        client = caller()
        stream = table.broker.subscribe(client, ["a", "b"])
        task = table.asking(Phase.PREPARING)
        await hears(stream, "subscribed", "preparing")
        table.broker.forget("a")
        table.broker.forget("a")
        table.broker.ready(client, UPDATE, "preparing")
        assert "unregistered" in (await task)["a"].message
        table.broker.forget("b")
        with pytest.raises(Lost, match="unregistered"):
            await anext(stream)

    run(scenario)


def test_a_client_that_does_not_read_is_cut_off() -> None:
    async def scenario(table: Table) -> None:
        (a,) = table.add("a")
        stream = table.broker.subscribe(caller(), ["a"])
        for _ in range(BACKLOG):
            assert table.broker.without_client([a]) == []
            assert set(await table.ask(Phase.PREPARING, 0)) == {"a"}
        assert set(await asyncio.wait_for(table.ask(Phase.PREPARING, 3600), 5)) == {"a"}
        assert table.broker.without_client([a]) == [a]
        with pytest.raises(Lost, match="did not read"):
            await anext(stream)
        with pytest.raises(Lost):
            await anext(stream)

    run(scenario)


def test_the_deadline_is_what_is_left_when_it_is_read() -> None:
    async def scenario(table: Table) -> None:
        table.add("a")
        stream = table.broker.subscribe(caller(), ["a"])
        assert set(await table.ask(Phase.PREPARING, 0.01)) == {"a"}
        view = await hears(stream, "subscribed", "preparing")
        assert 0 < view.deadline <= 0.002

    run(scenario)


def test_a_connection_is_listened_to_once_however_often_it_subscribes() -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b")
        client = caller()
        for _ in range(100):
            stream = table.broker.subscribe(client, ["a"])
            await stream.aclose()
        assert isinstance(client.connection, Link)
        assert len(client.connection.told) == 1
        stream, other = table.broker.subscribe(client, ["a"]), table.broker.subscribe(client, ["b"])
        hang_up(client)
        for ended in (stream, other):
            with pytest.raises(Lost, match="connection"):
                await anext(ended)

    run(scenario)


def test_a_connection_that_was_gone_before_anybody_said_so_is_in_nobodys_way() -> None:
    async def scenario(table: Table) -> None:
        (a,) = table.add("a")
        client = caller()
        table.broker.subscribe(client, ["a"])
        assert isinstance(client.connection, Link)
        client.connection.there = False
        assert table.broker.without_client([a]) == [a]
        table.broker.subscribe(caller(), ["a"])

    run(scenario)


def test_the_documented_table_of_what_clients_hear_is_the_enum() -> None:
    page = (Path(__file__).parents[3] / "docs/life-cycle.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \|.*\| (yes)? ?\|$", page, re.MULTILINE)
    assert rows == [(str(p), "yes" if p in ANSWERED else "") for p in Phase]


# Telling


def test_aborted_is_told_once_to_whoever_heard() -> None:
    async def scenario(table: Table) -> None:
        a, b, c = table.add("a", "b", "c")
        client = caller()
        stream = table.broker.subscribe(client, ["a", "b"])
        table.broker.aborted(UPDATE, "nothing was said yet")
        task = table.asking(Phase.PREPARING)
        await hears(stream, "subscribed", "preparing")
        later = table.broker.subscribe(caller(), ["c"])
        table.broker.ready(client, UPDATE, "preparing")
        await task
        table.broker.aborted(UPDATE, "stays behind", [b, c])
        view = await hears(stream, "aborted")
        assert (view.handles, view.reason, view.update) == (("b",), "stays behind", UPDATE)
        table.broker.aborted(UPDATE, "all is off")
        view = await hears(stream, "aborted")
        assert (view.handles, view.reason) == (("a",), "all is off")
        table.broker.aborted(UPDATE, "again")
        await hears(later, "subscribed")
        assert a.attended
        for quiet in (stream, later):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(anext(quiet), 0.01)

    run(scenario)


def test_executing_is_waited_for_until_it_is_taken_and_no_longer() -> None:
    async def scenario(table: Table) -> None:
        a, b, c, d = table.add("a", "b", "c", "d")
        good, deaf = table.broker.subscribe(caller(), ["a"]), table.broker.subscribe(caller(), ["b", "c"])
        await hears(deaf, "subscribed")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(deaf), 0.01)  # it came back for more, and then never again
        heard: list[str] = []

        async def listen() -> None:
            async for view in good:
                heard.append(view.phase)

        task = asyncio.create_task(listen())
        started = time.monotonic()
        assert await table.broker.executing(UPDATE, [a, d], 3600) == []
        assert time.monotonic() - started < 60
        assert heard == ["subscribed", "executing"]
        assert await table.broker.executing(UPDATE, [a, b, c, d], 0.02) == [b, c]
        await good.aclose()
        await task
        gone = asyncio.create_task(table.broker.executing(UPDATE, [b], 3600))
        await asyncio.sleep(0)
        await deaf.aclose()
        assert await asyncio.wait_for(gone, 5) == [b], "who is gone has not taken it"
        client = caller()
        stream = table.broker.subscribe(client, ["c"])
        await hears(stream, "subscribed")
        table.things = {"c": c}
        await quiesced(table, client, stream, quiet_for=100)
        await stream.aclose()
        assert await table.broker.executing(UPDATE, [a, c], 3600) == [c], "nor has who stands still by time and does not listen"

    run(scenario)


def test_many_clients_with_many_instances_cost_what_they_are() -> None:
    """Eight times as many clients take about eight times as long; the square would be 64."""

    async def round_trip(clients: int, each: int) -> float:
        table = Table()
        handles = [[f"{n}.{m}" for m in range(each)] for n in range(clients)]
        table.add(*(h for own in handles for h in own))
        started = time.process_time()
        known = [caller(pid=n + 1) for n in range(clients)]
        streams = [table.broker.subscribe(c, own) for c, own in zip(known, handles, strict=True)]
        for phase in ANSWERED:
            task = table.asking(phase, 600)
            for client, stream in zip(known, streams, strict=True):
                while (await anext(stream)).phase != phase:
                    pass
                table.broker.ready(client, UPDATE, phase)
            assert await task == {}
        table.broker.aborted(UPDATE, "done")
        for stream in streams:
            await stream.aclose()
        return time.process_time() - started

    async def main() -> None:
        await round_trip(50, 20)  # warm
        small = min([await round_trip(100, 20) for _ in range(3)])
        large = min([await round_trip(800, 20) for _ in range(3)])
        assert large < 24 * small, (small, large)

    asyncio.run(main())
