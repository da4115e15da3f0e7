# SPDX-License-Identifier: LGPL-2.1-or-later
"""A participant whose khod dies, hangs, comes back, or closes a line: who goes on, and when."""

from __future__ import annotations

import os
import queue
import time

import pytest

from khod.client import Notice, Participant
from khod.errors import InvalidRequest, Lost
from tests.integration.client.attended import Guest, attending, memory, ready, up_to
from tests.integration.client.scripted import DEADLINE, ScriptedKhod


@pytest.mark.parametrize("phase", ["preparing", "quiesce"])
def test_whoever_has_not_committed_goes_on_when_khod_dies_and_comes_back_by_handle(
    khod: ScriptedKhod, guest: Guest, phase: str
) -> None:
    with attending(khod, guest) as news:
        up_to(phase, khod, guest, news)
        khod.down()
        assert "hung up" in guest.expect("aborted").reason
        khod.up()
        again = khod.next("Subscribe")
        assert again.parameters == {"handles": ["h1"]}
        again.line.tell("preparing", "u1", handles=["h1"], deadline=5.0)
        guest.expect("preparing")
        ready(khod, "preparing")


def test_the_lease_ends_before_the_workload_goes_on(khod: ScriptedKhod, guest: Guest) -> None:
    """The subscription breaks, and the connection that READY was said on does not: khod must not jump on it."""
    with attending(khod, guest) as news:
        up_to("preparing", khod, guest, news)
        news.tell("quiesce", "u1", handles=["h1"], deadline=5.0)
        guest.expect("quiesce")
        leased = ready(khod, "quiesce").line
        guest.raises["aborted"] = ValueError("noted: this one is logged")
        news.hang_up()
        guest.expect("aborted")
        assert leased.ended.wait(DEADLINE)
        khod.next("Subscribe")


def test_whoever_has_committed_stands_still_until_a_khod_says_otherwise(khod: ScriptedKhod, guest: Guest) -> None:
    with attending(khod, guest) as news:
        up_to("commit", khod, guest, news)
        khod.state = "executing"
        khod.down()
        khod.up()
        khod.next("Subscribe")
        assert guest.calls.empty()  # that khod may still jump
        khod.state = "idle"
        khod.down()
        khod.up()
        khod.next("Subscribe")
        assert guest.expect("aborted").reason == "khod came back and is idle"


@pytest.mark.parametrize("dies", [True, False], ids=["khod dies", "khod hangs"])
def test_whoever_has_committed_goes_on_when_the_deadline_has_passed(khod: ScriptedKhod, guest: Guest, dies: bool) -> None:
    with attending(khod, guest) as news:
        up_to("quiesce", khod, guest, news)
        khod.state = "executing"
        news.tell("commit", "u1", handles=["h1"], deadline=0.4)
        due = guest.expect("commit").until
        leased = ready(khod, "commit").line
        if dies:
            khod.down()
        notice = guest.expect("aborted")
        assert "deadline of commit" in notice.reason
        assert time.monotonic() >= due
        assert leased.ended.wait(DEADLINE)


def test_after_executing_no_deadline_lets_it_go_on(khod: ScriptedKhod, guest: Guest) -> None:
    """A service manager may take its time to stop everything: going on then would ruin what travels."""
    with attending(khod, guest, patience=0.1) as news:
        up_to("commit", khod, guest, news, deadline=0.3)
        news.tell("executing", "u1", handles=["h1"])
        guest.expect("executing")
        khod.down()
        assert isinstance(guest.given_up.get(timeout=DEADLINE), Lost)
        assert guest.calls.empty()
        khod.up()


def test_executing_that_did_not_happen(khod: ScriptedKhod, guest: Guest) -> None:
    with attending(khod, guest) as news:
        up_to("commit", khod, guest, news)
        news.tell("executing", "u1", handles=["h1"])
        guest.expect("executing")
        news.tell("aborted", "u1", reason="reboot(2) came back")
        guest.expect("aborted")


def test_a_khod_that_does_not_know_it_ends_it(khod: ScriptedKhod, guest: Guest) -> None:
    with attending(khod, guest) as news:
        up_to("commit", khod, guest, news)
        news.tell("executing", "u1", handles=["h1"])
        guest.expect("executing")
        khod.refuse("Subscribe", "InvalidRequest", "no such handle")
        khod.down()
        khod.up()
        assert guest.expect("aborted").reason == "no such handle"
        assert isinstance(guest.given_up.get(timeout=DEADLINE), InvalidRequest)
        khod.next("Subscribe")


def test_a_khod_that_has_not_noticed_yet_is_asked_again(khod: ScriptedKhod, guest: Guest) -> None:
    with attending(khod, guest) as news:
        for _ in range(3):
            khod.refuse("Subscribe", "Refused", "vm1 has a subscriber")
        news.hang_up()
        for _ in range(3):
            khod.next("Subscribe")
        khod.next("Subscribe").line.tell("restored", "u1")
        guest.expect("restored")


def test_patience_ends(khod: ScriptedKhod, guest: Guest) -> None:
    with attending(khod, guest, patience=0.2):
        khod.down()
        assert isinstance(guest.given_up.get(timeout=DEADLINE), Lost)
        khod.up()
        assert len(khod.lines) == 2  # nobody tries any more


def test_a_call_while_khod_is_away_says_so(khod: ScriptedKhod, guest: Guest) -> None:
    fd = memory()
    with Participant(guest, path=khod.path) as participant:
        participant.register("vm1", {"ram": fd})
        participant.start()
        khod.down()
        with pytest.raises(Lost):
            participant.finished("vm1")
        khod.up()
    os.close(fd)


def test_an_idle_line_that_khod_closed_is_no_loss(khod: ScriptedKhod, guest: Guest) -> None:
    with attending(khod, guest) as news:
        khod.lines[0].hang_up()
        assert khod.lines[0].ended.wait(DEADLINE)
        news.tell("preparing", "u1", handles=["h1"], deadline=5.0)
        guest.expect("preparing")
        ready(khod, "preparing")
        assert not news.ended.is_set()


def test_unregistering_everything_ends_it_without_a_word(khod: ScriptedKhod, guest: Guest) -> None:
    with Participant(guest, path=khod.path) as participant:
        participant.register("vm1", {})
        participant.start()
        khod.next("Register")
        news = khod.next("Subscribe").line
        participant.unregister("vm1")
        assert khod.next("Unregister").parameters["handle"] == "h1"
        news.hang_up()
        assert participant._thread is not None
        participant._thread.join(DEADLINE)
        assert not participant._thread.is_alive()
    assert guest.given_up.empty()


def test_closing_within_a_call_to_the_workload(khod: ScriptedKhod) -> None:
    closed: queue.Queue[bool] = queue.Queue()

    class Closing(Guest):
        def preparing(self, notice: Notice) -> None:
            participant.close()
            closed.put(True)

    participant = Participant(Closing(), path=khod.path)
    participant.register("vm1", {})
    participant.start()
    khod.next("Register")
    khod.next("Subscribe").line.tell("preparing", "u1", deadline=5.0)
    assert closed.get(timeout=DEADLINE)
    participant.close()
