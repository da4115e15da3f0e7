# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that are asked, and answer well, badly and not at all. With whole updates: tests/orchestration/test_clients.py."""

from __future__ import annotations

import asyncio

import pytest

from khod.core.broker import QUIET_AT_MOST
from khod.core.question import ANSWERED, Phase
from khod.errors import DeadlinePassed, InvalidRequest, Lost, Refused
from tests.unit.core.table import UPDATE, Table, caller, hang_up, hears, quiesced, run

# Asking


@pytest.mark.parametrize("phase", ANSWERED)
def test_a_question_is_answered_when_every_instance_is(phase: Phase) -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b", "c")
        client = caller()
        stream = table.broker.subscribe(client, ["a", "b", "c"])
        await hears(stream, "subscribed")
        if phase is Phase.COMMIT:
            await quiesced(table, client, stream)
        task = table.asking(phase)
        view = await hears(stream, phase)
        assert set(view.handles) == {"a", "b", "c"}
        assert view.update == UPDATE
        promised = 10 if phase is Phase.COMMIT else 5
        assert promised - 1 < view.deadline <= promised
        table.broker.ready(client, UPDATE, phase, ["a", "c"])
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not task.done(), "one instance is not answered for"
        table.broker.ready(client, UPDATE, phase, ["b"])
        assert await task == {}

    run(scenario)


def test_silence_and_no_fail_the_instances_that_they_are_about_and_no_others() -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b", "c", "d")
        client, other = caller(), caller()
        stream = table.broker.subscribe(client, ["a", "b", "c"])
        table.broker.subscribe(other, ["d"])
        task = table.asking(Phase.PREPARING, 0.05)
        await hears(stream, "subscribed", "preparing")
        table.broker.ready(client, UPDATE, "preparing", ["a"])
        table.broker.failed(client, UPDATE, "preparing", ["b"], "the disk\nis\x1b[31m busy" + "!" * 1000)
        failures = await task
        assert set(failures) == {"b", "c", "d"}
        assert isinstance(failures["c"], DeadlinePassed)
        assert isinstance(failures["d"], DeadlinePassed)
        assert "the disk?is?[31m busy!" in failures["b"].message
        assert len(failures["b"].message) < 400

    run(scenario)


def test_who_has_no_client_is_asked_nothing_unless_it_had_one() -> None:
    async def scenario(table: Table) -> None:
        a, b = table.add("a", "b")
        assert await table.ask(Phase.PREPARING) == {}
        stream = table.broker.subscribe(caller(), ["a"])
        assert a.attended
        assert not b.attended
        assert table.broker.without_client([a, b]) == []
        await stream.aclose()
        assert table.broker.without_client([a, b]) == [a]
        failures = await table.ask(Phase.PREPARING)
        assert set(failures) == {"a"}
        assert isinstance(failures["a"], Lost)

    run(scenario)


@pytest.mark.parametrize("how", ["stream", "connection"])
def test_a_client_that_goes_away_fails_what_it_owes_at_once(how: str) -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b", "c")
        client = caller()
        stream = table.broker.subscribe(client, ["a", "b"])
        task = table.asking(Phase.PREPARING, 3600)
        await hears(stream, "subscribed", "preparing")
        table.broker.ready(client, UPDATE, "preparing", ["a"])
        if how == "stream":
            await stream.aclose()
        else:
            hang_up(client)
            with pytest.raises(Lost, match="connection"):
                await anext(stream)
        failures = await asyncio.wait_for(task, 5)
        assert set(failures) == {"b"}
        assert set(await table.ask(Phase.QUIESCE)) == {"a", "b"}, "nobody is there to stand still"

    run(scenario)


def test_a_question_that_is_given_up_can_be_answered_no_more() -> None:
    """As when an operator aborts."""

    async def scenario(table: Table) -> None:
        table.add("a")
        client = caller()
        stream = table.broker.subscribe(client, ["a"])
        task = table.asking(Phase.QUIESCE)
        await hears(stream, "subscribed", "quiesce")
        task.cancel()
        await asyncio.wait([task])
        with pytest.raises(Refused, match="nothing is being asked"):
            table.broker.ready(client, UPDATE, "quiesce", ["a"])

    run(scenario)


# Answers that are none


def test_answers_that_nobody_asked_for_are_refused_and_change_nothing() -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b", "unasked")
        table.add("bob's", user="bob")
        client, stranger = caller(), caller("bob")
        stream = table.broker.subscribe(client, ["a", "b"])
        ready, failed = table.broker.ready, table.broker.failed

        with pytest.raises(Refused, match="nothing is being asked"):
            ready(client, UPDATE, "preparing", ["a"])
        task = table.asking(Phase.PREPARING)
        await hears(stream, "subscribed", "preparing")
        for wrong, error in [
            ((client, "feedfeedfeedfeed", "preparing", ["a"]), Refused),
            ((client, UPDATE, "quiesce", ["a"]), Refused),
            ((client, UPDATE, "commit", ["a"]), Refused),
            ((client, UPDATE, "executing", ["a"]), InvalidRequest),
            ((client, UPDATE, "subscribed", ["a"]), InvalidRequest),
            ((client, UPDATE, "\x00" * 100000, ["a"]), InvalidRequest),
            ((client, UPDATE, "", ["a"]), InvalidRequest),
            ((client, UPDATE, "preparing", ["a", "no such"]), InvalidRequest),
            ((client, UPDATE, "preparing", ["a", "bob's"]), InvalidRequest),
            ((client, UPDATE, "preparing", ["a", "unasked"]), Refused),
            ((stranger, UPDATE, "preparing", ["a"]), InvalidRequest),
            ((stranger, UPDATE, "preparing", []), InvalidRequest),
        ]:
            with pytest.raises(error) as caught:
                ready(*wrong)
            assert len(str(caught.value)) < 400
            with pytest.raises(error):
                failed(*wrong, "because")
        ready(client, UPDATE, "preparing", ["a"])
        for again in (["a"], ["b", "a"]):
            with pytest.raises(Refused, match="vm-a"):
                ready(client, UPDATE, "preparing", again)
            with pytest.raises(Refused, match="vm-a"):
                failed(client, UPDATE, "preparing", again, "changed my mind")
        await asyncio.sleep(0)
        assert not task.done()
        ready(client, UPDATE, "preparing", ["b", "b"])
        assert await task == {}

    run(scenario)


def test_an_answer_that_names_nobody_is_for_the_subscription_of_the_connection_or_of_the_process() -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b", "c", "d")
        one, two = caller(pid=10), caller(pid=10)
        first, second = table.broker.subscribe(one, ["a", "b"]), table.broker.subscribe(two, ["c"])
        alone = caller(pid=11)
        table.broker.subscribe(alone, ["d"])
        task = table.asking(Phase.PREPARING)
        await hears(first, "subscribed", "preparing")
        with pytest.raises(InvalidRequest, match="2 subscriptions"):
            table.broker.ready(caller(pid=10), UPDATE, "preparing")
        for nobody in (caller(pid=12), caller("bob", pid=11), caller()):
            with pytest.raises(InvalidRequest, match="0 subscriptions"):
                table.broker.ready(nobody, UPDATE, "preparing")
        table.broker.ready(one, UPDATE, "preparing", ["a"])
        table.broker.ready(one, UPDATE, "preparing")
        with pytest.raises(Refused, match="answered already"):
            table.broker.ready(one, UPDATE, "preparing")
        table.broker.ready(caller(pid=11), UPDATE, "preparing")
        assert not task.done()
        await second.aclose()
        assert set(await task) == {"c"}
        task = table.asking(Phase.QUIESCE)
        await hears(first, "quiesce")
        table.broker.ready(caller(pid=10), UPDATE, "quiesce")  # the other one is gone: it is clear now
        table.broker.failed(alone, UPDATE, "quiesce", [], "no")
        assert set(await task) == {"c", "d"}

    run(scenario)


@pytest.mark.parametrize("quiet_for", [-1.0, float("nan"), float("inf"), QUIET_AT_MOST + 1])
def test_a_time_to_stay_quiet_that_is_none(quiet_for: float) -> None:
    async def scenario(table: Table) -> None:
        table.add("a")
        client = caller()
        stream = table.broker.subscribe(client, ["a"])
        task = table.asking(Phase.QUIESCE)
        await hears(stream, "subscribed", "quiesce")
        with pytest.raises(InvalidRequest, match="quiet"):
            table.broker.ready(client, UPDATE, "quiesce", ["a"], quiet_for=quiet_for)
        table.broker.ready(client, UPDATE, "quiesce", ["a"])
        assert await task == {}

    run(scenario)


def test_only_the_answer_to_quiesce_is_a_lease() -> None:
    async def scenario(table: Table) -> None:
        table.add("a")
        client = caller()
        stream = table.broker.subscribe(client, ["a"])
        task = table.asking(Phase.PREPARING)
        await hears(stream, "subscribed", "preparing")
        with pytest.raises(InvalidRequest, match="quiet"):
            table.broker.ready(client, UPDATE, "preparing", ["a"], quiet_for=5)
        table.broker.ready(client, UPDATE, "preparing", ["a"])
        assert await task == {}

    run(scenario)
