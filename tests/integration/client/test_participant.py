# SPDX-License-Identifier: LGPL-2.1-or-later
"""A participant against a khod that follows a script: what it asks, what it calls, what it answers, and how it comes back."""

from __future__ import annotations

import fcntl
import os
import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from khod.client import Claimed, Cold, Hold, Notice, Participant, Workload
from khod.errors import FormatError, InvalidRequest, KhodError, Lost, NotPermitted, Refused
from tests.integration.client.scripted import DEADLINE, Answer, Heard, Line, ScriptedKhod


class Guest(Workload):
    """Says what it was called with, and raises what it is told to."""

    def __init__(self) -> None:
        self.calls: queue.Queue[tuple[str, Notice]] = queue.Queue()
        self.raises: dict[str, Exception] = {}
        self.state = b""
        self.given_up: queue.Queue[KhodError] = queue.Queue()

    def _note(self, call: str, notice: Notice) -> None:
        self.calls.put((call, notice))
        if call in self.raises:
            raise self.raises[call]

    def preparing(self, notice: Notice) -> None:
        self._note("preparing", notice)

    def quiesce(self, notice: Notice) -> None:
        for states in notice.states.values():
            states["vcpus"].write(self.state)
        self._note("quiesce", notice)

    def commit(self, notice: Notice) -> None:
        self._note("commit", notice)

    def executing(self, notice: Notice) -> None:
        self._note("executing", notice)

    def aborted(self, notice: Notice) -> None:
        self._note("aborted", notice)

    def restored(self, notice: Notice) -> None:
        self._note("restored", notice)

    def lost(self, error: KhodError) -> None:
        self.given_up.put(error)

    def next(self) -> tuple[str, Notice]:
        return self.calls.get(timeout=DEADLINE)

    def expect(self, call: str) -> Notice:
        name, notice = self.next()
        assert name == call
        return notice


@pytest.fixture
def guest() -> Guest:
    return Guest()


def memory() -> int:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 8192)
    return fd


def closes_on_exec(fd: int) -> bool:
    return bool(fcntl.fcntl(fd, fcntl.F_GETFD) & fcntl.FD_CLOEXEC)


@contextmanager
def attending(khod: ScriptedKhod, guest: Guest, *, states: dict[str, int] | None = None, **options: Any) -> Iterator[Line]:
    """A participant with one instance, started: the line of its subscription."""
    fd = memory()
    with Participant(guest, path=khod.path, **options) as participant:
        participant.register("vm1", {"ram": fd}, states=states)
        os.close(fd)
        participant.start()
        khod.next("Register")
        yield khod.next("Subscribe").line


def ready(khod: ScriptedKhod, phase: str) -> Heard:
    heard = khod.next("Ready")
    assert heard.parameters == {"update": "u1", "phase": phase, "handles": ["h1"]}
    return heard


def up_to(phase: str, khod: ScriptedKhod, guest: Guest, news: Line, deadline: float = 60.0) -> None:
    """An update, up to READY to that phase."""
    for each in ("preparing", "quiesce", "commit"):
        news.tell(each, "u1", handles=["h1"], deadline=deadline)
        guest.expect(each)
        ready(khod, each)
        if each == phase:
            return


def open_descriptors() -> set[Path]:
    return {fd for fd in Path("/proc/self/fd").iterdir() if fd.exists()}


# --- before


def test_registering_says_everything_and_keeps_the_callers_descriptors(khod: ScriptedKhod, guest: Guest) -> None:
    fd = memory()
    with Participant(guest, path=khod.path) as participant:
        participant.register(
            "vm1", {"ram": fd}, states={"vcpus": 100}, driver="special", required=False, requires=("net",),
            options={"a": "b"}, lifetime="process", shareable=True,
        )  # fmt: skip
        heard = khod.next("Register")
    assert heard.parameters == {
        "name": "vm1", "driver": "special", "required": False, "requires": ["net"], "options": {"a": "b"},
        "lifetime": "process", "shareable": True, "states": [{"name": "vcpus", "size": 100}], "fds": [{"name": "ram", "fd": 0}],
    }  # fmt: skip
    assert os.path.sameopenfile(fd, heard.fds[0])
    os.close(fd)


def test_nobody_there(tmp_path: Path, guest: Guest) -> None:
    with pytest.raises(Lost, match="does not answer"):
        Participant(guest, path=tmp_path / "none.sock")


def test_what_cannot_be_asked_now(khod: ScriptedKhod, guest: Guest) -> None:
    with Participant(guest, path=khod.path) as empty, pytest.raises(InvalidRequest, match="nothing to answer for"):
        empty.start()
    with Participant(guest, path=khod.path) as participant:
        with pytest.raises(InvalidRequest, match="neither registered nor claimed"):
            participant.finished("vm1")
        participant.register("vm1", {})
        participant.start()
        for late in (lambda: participant.register("vm2", {}), lambda: participant.claim("vm2"), participant.start):
            with pytest.raises(Refused, match="has started"):
                late()


def test_refusals_arrive_as_what_they_are(khod: ScriptedKhod, guest: Guest) -> None:
    khod.refuse("Register", "NotPermitted", "not yours")
    with Participant(guest, path=khod.path) as participant, pytest.raises(NotPermitted, match="not yours"):
        participant.register("vm1", {})


# --- claiming


def claims(khod: ScriptedKhod, answer: str, names: dict[str, bytes], states: list[str], reason: str = "") -> None:
    """The next claim is answered so; `names` are descriptors with their contents."""

    def answered(_: Heard) -> Answer:
        fds = []
        for contents in names.values():
            fds.append(os.memfd_create("claimed", 0))
            os.write(fds[-1], contents)
        sent = [{"name": name, "fd": index} for index, name in enumerate(names)]
        claim = {"answer": answer, "reason": reason, "fds": sent, "states": states, "handle": "h9"}
        return {"parameters": {"claim": claim}}, fds

    khod.plan("Claim", answered)


def state_file(data: bytes, length: int | None = None) -> bytes:
    return (len(data) if length is None else length).to_bytes(8, "little") + data + bytes(100)


def test_a_claim_gives_descriptors_and_states_and_answers_for_them(khod: ScriptedKhod, guest: Guest) -> None:
    claims(khod, "fds", {"ram": b"guest", "disk": b"", "vcpus": state_file(b"registers")}, ["vcpus"])
    with Participant(guest, path=khod.path) as participant:
        participant.register("vm0", {})
        khod.next("Register")
        before = open_descriptors()
        claimed = participant.claim("vm1", lifetime="process")
        assert isinstance(claimed, Claimed)
        assert khod.next("Claim").parameters == {"name": "vm1", "owner": "", "lifetime": "process", "unverified": False}
        assert claimed.states == {"vcpus": b"registers"}
        assert list(claimed.fds) == ["ram", "disk"] and all(closes_on_exec(fd) for fd in claimed.fds.values())
        with claimed:
            ram = claimed.take("ram")
            with pytest.raises(InvalidRequest, match="no descriptor 'ram'"):
                claimed.take("ram")
        assert os.pread(ram, 9, 0) == b"guest"
        os.close(ram)
        assert open_descriptors() == before
        participant.start()
        assert khod.next("Subscribe").parameters == {"handles": ["h1", "h9"]}
        participant.finished("vm1")
        assert khod.next("Finished").parameters == {"handle": "h9"}


@pytest.mark.parametrize(("answer", "kind"), [("cold", Cold), ("hold", Hold)])
def test_cold_and_hold_are_types_and_nothing_to_answer_for(
    khod: ScriptedKhod, guest: Guest, answer: str, kind: type[Cold | Hold]
) -> None:
    claims(khod, answer, {}, [], reason="because")
    with Participant(guest, path=khod.path) as participant:
        assert participant.claim("vm1") == kind("because")
        with pytest.raises(InvalidRequest):
            participant.start()


@pytest.mark.parametrize(
    ("names", "states", "answer", "what"),
    [
        (
            {"vcpus": state_file(b"", length=1 << 40)},
            ["vcpus"],
            "fds",
            "length 1099511627776 in a file with room for 100",
        ),
        ({"vcpus": b"abc"}, ["vcpus"], "fds", "room for 0 bytes"),
        ({"ram": b""}, ["vcpus"], "fds", "not what it must be"),
        ({"ram": b""}, [], "perhaps", "not what it must be"),
    ],
    ids=["length", "short", "no such state", "answer"],
)
def test_a_claim_that_makes_no_sense_leaves_nothing_open(
    khod: ScriptedKhod, guest: Guest, names: dict[str, bytes], states: list[str], answer: str, what: str
) -> None:
    claims(khod, answer, names, states)
    with Participant(guest, path=khod.path) as participant:
        participant.register("vm0", {})
        khod.next("Register")
        before = open_descriptors()
        with pytest.raises(FormatError, match=what):
            participant.claim("vm1")
        khod.next("Claim")
        assert open_descriptors() == before


# --- an update


def test_an_update_from_preparing_to_executing(khod: ScriptedKhod, guest: Guest) -> None:
    guest.state = b"registers"
    with attending(khod, guest, states={"vcpus": 100}) as news:
        news.tell("preparing", "u1", handles=["h1"], deadline=30.0)
        notice = guest.expect("preparing")
        assert (notice.update, notice.instances) == ("u1", ("vm1",)) and 0 < notice.left <= 30
        leased = ready(khod, "preparing").line
        before = open_descriptors()
        news.tell("quiesce", "u1", handles=["h1"], deadline=10.0)
        assert khod.next("GetStates").parameters == {"handle": "h1"}
        assert guest.expect("quiesce").states["vm1"]["vcpus"].room == khod.state_size - 8
        assert ready(khod, "quiesce").line is leased
        assert len(open_descriptors()) == len(before) + 1  # what this khod keeps of it
        assert os.pread(khod.state_files["vcpus"], 17, 0) == (9).to_bytes(8, "little") + b"registers"
        news.tell("commit", "u1", handles=["h1"], deadline=5.0)
        guest.expect("commit")
        assert ready(khod, "commit").line is leased
        news.tell("executing", "u1", handles=["h1"])
        guest.expect("executing")
        assert not leased.ended.is_set()
    assert guest.calls.empty()


def test_one_instance_that_stays_behind_does_not_let_the_others_go_on(khod: ScriptedKhod, guest: Guest) -> None:
    """The update goes on with them: a guest that ran now would run while its frozen state travels."""
    with attending(khod, guest) as news:
        for each in ("preparing", "quiesce"):
            news.tell(each, "u1", handles=["h1", "h2"], deadline=30.0)
            guest.expect(each)
            assert khod.next("Ready").parameters["handles"] == ["h1", "h2"]
        news.tell("aborted", "u1", handles=["h2"], reason="h2 stays behind")
        assert "vm1" not in guest.expect("aborted").instances
        news.tell("aborted", "u1", handles=["h1"], reason="it was undone")
        assert guest.expect("aborted").reason == "it was undone", "until then vm1 stood still"


@pytest.mark.parametrize("phase", ["preparing", "quiesce", "commit"])
def test_an_exception_is_failed_with_its_text_and_the_workload_goes_on(khod: ScriptedKhod, guest: Guest, phase: str) -> None:
    guest.raises[phase] = ValueError("vCPU 3 will not stop")
    with attending(khod, guest) as news:
        for each in ("preparing", "quiesce", "commit"):
            news.tell(each, "u1", handles=["h1"], deadline=30.0)
            guest.expect(each)
            if each == phase:
                break
            ready(khod, each)
        expected = {"update": "u1", "phase": phase, "handles": ["h1"], "reason": "vCPU 3 will not stop"}
        assert khod.next("Failed").parameters == expected
        news.tell("aborted", "u1", reason="vm1 failed")
        assert guest.expect("aborted").reason == "vm1 failed"
        news.tell("aborted", "u1", reason="again")
        news.tell("restored", "u1")
        guest.expect("restored")  # and no second aborted before it


def test_an_exception_without_text_has_a_name(khod: ScriptedKhod, guest: Guest) -> None:
    guest.raises["preparing"] = RuntimeError()
    with attending(khod, guest) as news:
        news.tell("preparing", "u1", deadline=30.0)
        assert khod.next("Failed").parameters["reason"] == "RuntimeError"


def test_a_state_that_outgrows_its_bound_fails(khod: ScriptedKhod, guest: Guest) -> None:
    guest.state = bytes(khod.state_size)
    with attending(khod, guest, states={"vcpus": 100}) as news:
        news.tell("quiesce", "u1", deadline=30.0)
        khod.next("GetStates")
        assert "'vcpus' has 4096 bytes and room for 4088" in khod.next("Failed").parameters["reason"]


def test_states_that_khod_will_not_give_fail_the_instance(khod: ScriptedKhod, guest: Guest) -> None:
    khod.refuse("GetStates", "Refused", "not now")
    with attending(khod, guest, states={"vcpus": 100}) as news:
        news.tell("quiesce", "u1", deadline=30.0)
        khod.next("GetStates")
        assert khod.next("Failed").parameters["reason"] == "not now"
        assert guest.calls.empty()


def test_an_answer_that_comes_too_late_harms_nobody(khod: ScriptedKhod, guest: Guest) -> None:
    khod.refuse("Ready", "Refused", "too late")
    with attending(khod, guest) as news:
        news.tell("preparing", "u1", deadline=0.001)
        guest.expect("preparing")
        khod.next("Ready")
        news.tell("aborted", "u1", reason="vm1 did not answer")
        guest.expect("aborted")


def test_what_a_newer_khod_asks_is_not_answered_ready(khod: ScriptedKhod, guest: Guest) -> None:
    with attending(khod, guest) as news:
        news.tell("levitate", "u1", handles=["h1"], deadline=5.0)
        assert "does not know what 'levitate' asks for" in khod.next("Failed").parameters["reason"]


def test_an_opaque_instance_is_given_its_session_once(khod: ScriptedKhod, guest: Guest) -> None:
    with Participant(guest, path=khod.path) as participant:
        participant.register_opaque("vm1", lifetime="process")
        participant.start()
        assert khod.next("RegisterOpaque").parameters == {"name": "vm1", "lifetime": "process"}
        news = khod.next("Subscribe").line
        news.tell("preparing", "u1", handles=["h1"], deadline=5.0)
        assert khod.next("OpenSession").parameters == {"handle": "h1"}
        session = guest.expect("preparing").sessions["vm1"]
        ready(khod, "preparing")
        assert closes_on_exec(session)  # still open
        news.tell("aborted", "u1", reason="no")
        guest.expect("aborted")
        with pytest.raises(OSError):
            os.fstat(session)


def test_a_session_that_was_claimed_is_followed_by_another_in_the_next_update(khod: ScriptedKhod, guest: Guest) -> None:
    claims(khod, "fds", {"session": b"filled before the jump"}, [])
    with Participant(guest, path=khod.path) as participant:
        claimed = participant.claim("vm1", opaque=True)
        assert isinstance(claimed, Claimed)
        khod.next("Claim")
        with claimed:
            assert os.pread(claimed.fds["session"], 100, 0) == b"filled before the jump"
        participant.start()
        news = khod.next("Subscribe").line
        participant.finished("vm1")
        khod.next("Finished")
        news.tell("preparing", "u1", handles=["h9"], deadline=5.0)
        assert khod.next("OpenSession").parameters == {"handle": "h9"}
        assert list(guest.expect("preparing").sessions) == ["vm1"]
        assert khod.next("Ready").parameters["handles"] == ["h9"]


# --- connections end


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


# --- weight


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, khod.client;"
        "print(sorted({'numpy', 'rich', 'typer', 'asyncvarlink', 'asyncio', 'pluggy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
