# SPDX-License-Identifier: LGPL-2.1-or-later
"""A participant against a khod that follows a script: what it asks, what it calls, what it answers, and how it comes back."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from khod.client import Claimed, Cold, Hold, Participant
from khod.client import participant as participants
from khod.errors import FormatError, InvalidRequest, Lost, NotPermitted, Refused
from tests.integration.client.attended import Guest, attending, closes_on_exec, memory, open_descriptors, ready
from tests.integration.client.scripted import Answer, Heard, ScriptedKhod

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


def test_finishing_takes_as_long_as_khod_compares(khod: ScriptedKhod, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hanging up would be the end of an instance that hangs on the connection."""
    monkeypatch.setattr(participants, "ANSWER", 0.1)
    compared = threading.Event()

    def when_compared(_: Heard) -> Answer:
        assert compared.wait(20)
        return {"parameters": {}}, []

    khod.plan("Finished", when_compared)
    with Participant(guest, path=khod.path) as participant:
        participant.register("vm1", {})
        threading.Timer(5 * participants.ANSWER, compared.set).start()
        participant.finished("vm1")
        khod.plan("Unregister", lambda _: None)
        with pytest.raises(Lost, match="in time"):  # others do not
            participant.unregister("vm1")


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


# --- weight


def test_importing_it_imports_nothing_heavy() -> None:
    code = (
        "import sys, khod.client;"
        "print(sorted({'numpy', 'rich', 'typer', 'asyncvarlink', 'asyncio', 'pluggy', 'yaml'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
