# SPDX-License-Identifier: LGPL-2.1-or-later
"""READY to 'quiesce' is a lease (decision 13)."""

from __future__ import annotations

import pytest

from khod.core.question import ANSWERED, Phase
from khod.errors import DeadlinePassed, Refused
from tests.unit.core.table import UPDATE, S, Table, Thing, caller, hang_up, hears, quiesced, run


def test_commit_is_answered_on_the_connection_of_the_lease() -> None:
    async def scenario(table: Table) -> None:
        table.add("a")
        client, answering = caller(), caller()
        stream = table.broker.subscribe(client, ["a"])
        await hears(stream, "subscribed")
        await quiesced(table, answering, stream)
        task = table.asking(Phase.COMMIT)
        await hears(stream, "commit")
        with pytest.raises(Refused, match="connection"):
            table.broker.ready(client, UPDATE, "commit", ["a"])
        assert not task.done()
        table.broker.ready(answering, UPDATE, "commit", ["a"])
        assert await task == {}

    run(scenario)


@pytest.mark.parametrize("when", ["in quiesce", "between", "in commit"])
def test_a_lease_by_connection_ends_with_it(when: str) -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b")
        client, answering, slow = caller(), caller(), caller()
        stream, other = table.broker.subscribe(client, ["a"]), table.broker.subscribe(slow, ["b"])
        await hears(stream, "subscribed")
        task = table.asking(Phase.QUIESCE)
        await hears(stream, "quiesce")
        table.broker.ready(answering, UPDATE, "quiesce", ["a"])
        if when == "in quiesce":
            hang_up(answering)
        table.broker.ready(slow, UPDATE, "quiesce", ["b"])
        failures = await task
        if when != "in quiesce":
            assert failures == {}
            if when == "between":
                hang_up(answering)
            task = table.asking(Phase.COMMIT)
            await hears(other, "subscribed", "quiesce", "commit")
            if when == "in commit":
                table.broker.ready(answering, UPDATE, "commit", ["a"])
                hang_up(answering)
            table.broker.ready(slow, UPDATE, "commit", ["b"])
            failures = await task
        assert set(failures) == {"a"}
        assert "the connection on which its client said READY is gone" in failures["a"].message

    run(scenario)


def test_a_lease_by_time_needs_no_connection_and_no_second_answer() -> None:
    """A varlinkctl call is one connection each."""

    async def scenario(table: Table) -> None:
        table.add("a")
        stream = table.broker.subscribe(caller(), ["a"])
        await hears(stream, "subscribed")
        call = caller()
        await quiesced(table, call, stream, quiet_for=20)
        hang_up(call)
        table.now += 10 * S
        assert await table.ask(Phase.COMMIT, 5) == {}, "it lasts for just as long as is promised: twice the limit"
        await hears(stream, "commit")
        await stream.aclose()
        assert await table.ask(Phase.COMMIT, 5) == {}, "it stands, whether anybody listens or not"

    run(scenario)


@pytest.mark.parametrize("passed", [11, 20, 3000])
def test_a_lease_by_time_that_does_not_last_until_the_jump_is_none(passed: int) -> None:
    async def scenario(table: Table) -> None:
        table.add("a")
        client = caller()
        stream = table.broker.subscribe(client, ["a"])
        await hears(stream, "subscribed")
        await quiesced(table, client, stream, quiet_for=20)
        table.now += passed * S
        failures = await table.ask(Phase.COMMIT, 5)
        assert isinstance(failures["a"], DeadlinePassed)
        assert "too short" in failures["a"].message

    run(scenario)


def test_a_lease_by_time_counts_from_the_question_and_ends_although_the_connection_does_not() -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b")
        client = caller()
        stream = table.broker.subscribe(client, ["a", "b"])
        task = table.asking(Phase.QUIESCE)
        await hears(stream, "subscribed", "quiesce")
        table.now += 3 * S
        table.broker.ready(client, UPDATE, "quiesce", ["a"], quiet_for=2)
        table.broker.ready(client, UPDATE, "quiesce", ["b"], quiet_for=4)
        failures = await task
        assert set(failures) == {"a"}
        assert "the time" in failures["a"].message

    run(scenario)


def test_one_with_a_lease_by_time_can_say_no_to_commit_while_others_are_asked() -> None:
    async def scenario(table: Table) -> None:
        table.add("a", "b")
        client, other = caller(), caller()
        stream, others = table.broker.subscribe(client, ["a"]), table.broker.subscribe(other, ["b"])
        task = table.asking(Phase.QUIESCE)
        await hears(stream, "subscribed", "quiesce")
        table.broker.ready(client, UPDATE, "quiesce", quiet_for=100)
        table.broker.ready(other, UPDATE, "quiesce")
        assert await task == {}
        task = table.asking(Phase.COMMIT)
        await hears(others, "subscribed", "quiesce", "commit")
        table.broker.failed(caller(), UPDATE, "commit", ["a"], "no more")
        with pytest.raises(Refused, match="vm-a"):
            table.broker.ready(client, UPDATE, "commit", ["a"])
        table.broker.ready(other, UPDATE, "commit")
        assert "no more" in (await task)["a"].message

    run(scenario)


def test_leases_are_of_one_update() -> None:
    async def scenario(table: Table) -> None:
        table.add("a")
        client = caller()
        stream = table.broker.subscribe(client, ["a"])
        await hears(stream, "subscribed")
        await quiesced(table, client, stream, quiet_for=1000)
        table.broker.aborted(UPDATE, "for a test")
        failures = await table.ask(Phase.COMMIT)
        assert "no lease" in failures["a"].message

    run(scenario)


def test_the_jump_begins_within_the_first_half_of_what_clients_promised_or_not_at_all() -> None:
    async def scenario(table: Table) -> None:
        table.add("a")
        client = caller()
        table.now += 10**6 * S
        table.broker.check_promise()  # nobody promised anything
        stream = table.broker.subscribe(client, ["a"])
        await hears(stream, "subscribed")
        await quiesced(table, client, stream)
        task = table.asking(Phase.COMMIT, 7)
        assert (await hears(stream, "commit")).deadline > 13
        table.broker.ready(client, UPDATE, "commit")
        assert await task == {}
        table.now += 7 * S - 1
        table.broker.check_promise()
        table.now += 1
        with pytest.raises(DeadlinePassed, match="too late"):
            table.broker.check_promise()
        table.broker.aborted(UPDATE, "too late")
        table.broker.check_promise()

    run(scenario)


def test_what_is_only_for_who_is_being_asked() -> None:
    async def scenario(table: Table) -> None:
        a, b = table.add("a", "b")
        client = caller()
        stream = table.broker.subscribe(client, ["a"])

        def refused(thing: Thing, phase: Phase) -> bool:
            try:
                table.broker.check_asked(thing, phase)
            except Refused:
                return True
            return False

        assert refused(a, Phase.QUIESCE)
        task = table.asking(Phase.QUIESCE)
        await hears(stream, "subscribed", "quiesce")
        assert [refused(a, p) for p in ANSWERED] == [True, False, True]
        assert refused(b, Phase.QUIESCE)
        table.broker.ready(client, UPDATE, "quiesce")
        assert refused(a, Phase.QUIESCE)
        await task

    run(scenario)
