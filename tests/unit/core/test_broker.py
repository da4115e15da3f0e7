# SPDX-License-Identifier: LGPL-2.1-or-later
"""Clients that answer well, badly and not at all. Whole updates with clients: tests/orchestration/test_clients.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

import pytest

from khod.core.broker import QUIET_AT_MOST, Broker
from khod.core.callers import Caller, Kind, Owner, Right
from khod.core.ports import Stamp
from khod.core.question import ANSWERED, Phase
from khod.core.registry import InstanceState
from khod.core.state import State
from khod.core.subscription import BACKLOG, Subscription
from khod.core.views import LifecycleView
from khod.errors import DeadlinePassed, InvalidRequest, KhodError, Lost, Refused

S = 10**9
UPDATE = "0123456789abcdef"


@dataclass(eq=False)
class Link:
    """A connection, or a process."""

    there: bool = True
    told: list[Callable[[], None]] = field(default_factory=list)

    def on_end(self, told: Callable[[], None]) -> None:
        self.told.append(told)

    def end(self) -> None:
        self.there = False
        for told in self.told:
            told()


@dataclass(eq=False)
class Thing:
    """An instance."""

    handle: str
    owner: Owner
    state: InstanceState = InstanceState.REGISTERED
    attended: bool = False

    @property
    def label(self) -> str:
        return f"vm-{self.handle}"


def caller(user: str = "alice", pid: int = 0, rights: Iterable[Right] = (Right.INSTANCES,)) -> Caller:
    return Caller(owner=Owner(Kind.USER, user), rights=frozenset(rights), pid=pid, connection=Link(), process=Link())


def hang_up(client: Caller) -> None:
    assert isinstance(client.connection, Link)
    client.connection.end()


class Table:
    """What the broker needs of khod: instances, a clock that is set by hand, and a state."""

    def __init__(self) -> None:
        self.things: dict[str, Thing] = {}
        self.now = 1000 * S
        self.state, self.update = State.IDLE, ""
        self.broker = Broker(self, self, lambda: (self.state, self.update))

    def stamp(self) -> Stamp:
        return Stamp(realtime=0, monotonic=self.now)

    def by_handle(self, caller: Caller, handle: str) -> Thing:
        thing = self.things.get(handle)
        if thing is None or (thing.owner != caller.owner and not caller.may(Right.ADMINISTER)):
            raise InvalidRequest("no instance has this handle")
        return thing

    def add(self, *handles: str, user: str = "alice") -> list[Thing]:
        added = [Thing(h, Owner(Kind.USER, user)) for h in handles]
        self.things.update({t.handle: t for t in added})
        return added

    async def ask(self, phase: Phase, limit: float = 5.0) -> dict[str, KhodError]:
        self.update = UPDATE
        return await self.broker.ask(phase, UPDATE, list(self.things.values()), limit)

    def asking(self, phase: Phase, limit: float = 5.0) -> asyncio.Task[dict[str, KhodError]]:
        return asyncio.create_task(self.ask(phase, limit))


async def hears(stream: Subscription, *phases: str) -> LifecycleView:
    """The next messages; returns the last."""
    heard = [await asyncio.wait_for(anext(stream), 5) for _ in phases]
    assert [v.phase for v in heard] == list(phases)
    return heard[-1]


def run(scenario: Callable[[Table], Awaitable[None]]) -> None:
    async def main() -> None:
        await scenario(Table())

    asyncio.run(main())


async def quiesced(table: Table, client: Caller, stream: Subscription, quiet_for: float = 0.0) -> None:
    """Up to a lease."""
    task = table.asking(Phase.QUIESCE)
    await hears(stream, "quiesce")
    table.broker.ready(client, UPDATE, "quiesce", list(stream.handles), quiet_for=quiet_for)
    assert await task == {}


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


# Leases


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
        _, b, c = table.add("a", "b", "c")
        b.state, c.state = InstanceState.RESTORED, InstanceState.DAMAGED
        table.state, table.update = State.RESTORED, UPDATE
        stream = table.broker.subscribe(caller(), ["a", "b", "c"])
        view = await hears(stream, "subscribed", "restored")
        assert (view.handles, view.update) == (("b",), UPDATE)

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
