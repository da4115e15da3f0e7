# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod, across real kexecs of Linux 7.3, driven as a user drives it."""

from __future__ import annotations

import pytest

from tests.vm.conftest import Play
from tests.vm.gdbstub import FailCall

pytestmark = [pytest.mark.vm, pytest.mark.timeout(600)]


def test_memory_of_every_kind_comes_through_twice(vm: Play) -> None:
    result = vm("memory", memory="4G", stage_deadline=200, deadline=500).require()
    for stage in (0, 1):
        seen = result.facts(f"map-{stage}")
        assert seen["equal"], seen
        assert seen["totals_agree"], seen
        assert seen["huge"] >= 1, "no order-9 folio was in the map"
        assert seen["source"] == ("outgoing", "incoming")[stage]
    memory = result.facts("memory")
    for what in ("bytes", "frames", "orders"):
        assert all(memory[what].values()), (what, memory[what])
    assert memory["seals"] == 0x6
    assert memory["sizes"]["large"] == 1 << 30
    assert memory["claim"] == ["1", "ram", "True", "0" * 16, "4096"]
    ledger = result.facts("ledger")
    assert ledger["outcome"] == "restored"
    assert not ledger["problems"]
    assert "folios" in ledger["checked"]
    assert ledger["spans"]["blackout"][1] == 0.010, "the TSC was not used"
    again = result.facts("again")
    assert again["page"] == "second"
    assert again["ram"]
    assert set(again["states"].values()) == {"claimed"}
    assert again["outcomes"] == ["restored", "restored"]


def test_what_must_not_happen_is_refused_or_undone_and_the_workload_never_notices(vm: Play) -> None:
    result = vm("undone", stage_deadline=200, deadline=400).require()
    kind, said = result.facts("no kernel")["said"]
    assert kind == "Refused"
    assert "khoctl load" in said
    assert "/run/junk" in result.facts("junk")["said"]
    kind, said = result.facts("hugetlb required")["said"]
    assert kind == "UpdateFailed"
    assert "huge" in said
    assert "everything was undone" in said
    assert "hugetlb" in result.facts("hugetlb by guestmemfd")["said"]
    for state in ("preparing", "prepared", "freezing", "frozen"):
        assert result.facts(f"abort {state}")["held"] == [state, True]
    assert all(record.facts["goes_on"] for record in result.records if "goes_on" in record.facts)
    assert result.facts("exited client") == {"answer": "fds", "bytes": "orphan"}
    through = result.facts("went through")
    assert through["count"] > 0
    assert through["outcome"] == "restored"
    assert len(through["left_behind"]) == 1
    assert "huge" in through["left_behind"][0]
    assert set(through["others"]) == {"aborted"}
    assert result.facts("end")["status"] == 0


@pytest.mark.parametrize(
    ("symbol", "nth"), [("kernel_kexec", 1), ("memfd_luo_freeze", 2)], ids=["before serialization", "in the middle of it"]
)
def test_a_jump_that_comes_back_is_undone_and_a_second_one_succeeds(vm: Play, symbol: str, nth: int) -> None:
    with FailCall(symbol, nth=nth, errno=5) as fail:
        result = vm("comes_back", qemu=fail.qemu, answers={"arm": fail.arm}, stage_deadline=150, deadline=300).require()
    assert fail.hits == nth
    back = result.facts("came back")
    assert back["ended"] == "aborted"
    assert "EIO" in back["reason"]
    assert "everything was undone" in back["said"]
    assert not back["problems"]
    assert back["intact"]
    assert result.facts("second") == {"intact": {"vm-1": True, "vm-2": True}, "outcomes": ["restored", "aborted"]}


def test_a_corrupt_map_is_no_verdict_on_the_memory(vm: Play) -> None:
    result = vm("corrupt", stage_deadline=150, deadline=300).require()
    verdict = result.facts("verdict")
    assert "failed" in verdict["status"]
    assert any("folio map is not what was written" in problem for problem in verdict["problems"])
    assert verdict["answer"] == "hold"
    assert "vm-1" in verdict["finish"]
    ended = {"status": 0, "state": "failed", "answer": "hold"}
    assert result.facts("ended") == ended, "its memory is in custody, and the next khod comes to the same verdict"
    assert result.facts("claimed") == {"answer": "fds", "intact": True}
    assert result.facts("finished") == {"state": "idle"}


@pytest.mark.full
def test_memory_that_linux_does_not_preserve_is_carried_twice(vm: Play) -> None:
    result = vm("guest_memory", memory="3G", cpu="max", cmdline=("hugepages=4",), stage_deadline=250, deadline=600).require()
    refused = result.facts("refused")
    assert "nobody but the guest can read it" in refused["private"]
    assert "nobody but the guest can read it" in refused["unseen"]
    assert "takes 4194304 bytes of ordinary memory" in refused["huge"]
    assert "carry=yes" in refused["huge"]
    assert result.facts("taken") == {"ram": "", "huge": ""}
    for name in ("ram", "huge"):
        state, strategy, continuity, detail, problem = result.facts("frozen 0")["seen"][name]
        assert (state, strategy, continuity, problem) == ("frozen", "carried", "rebuilt", "")
        assert "MiB/s" in detail
    through = result.facts("came through")
    assert [through["states"][name][0] for name in ("ram", "huge")] == ["restored", "restored"]
    assert (through["carrier"], through["rebuilt"], through["huge"], through["page_size"]) == (True, True, True, 2 << 20)
    frozen = result.facts("frozen 1")["seen"]
    assert {name: seen[1] for name, seen in frozen.items()} == {"ram": "native", "huge": "carried", "rebuilt": "carried"}
    again = result.facts("again")
    assert (again["carrier"], again["rebuilt"], again["huge"]) == ("second", True, True)


@pytest.mark.full
@pytest.mark.parametrize("turn", [0, 1, 2, "twins"])
def test_whoever_is_killed_between_two_calls_nothing_is_lost(vm: Play, turn: object) -> None:
    result = vm("deaths", parameters={"turn": turn}, stage_deadline=300, deadline=500).require()
    for death in result.facts("before")["deaths"]:
        assert death["stood_still"] == (death["at"] != "preserve_fd"), death
        assert death["at"] != "execute" or not death["went_on_by_itself"], death
    after = result.facts("after")
    assert after["deaths"] >= 20
    assert {"retrieve_session", "retrieve_fd", "keep", "append"} <= {*after["calls"]}
    claimed = result.facts("claimed")
    assert claimed["state"] == "restored"
    assert not claimed["problems"]
    assert claimed["intact"] == {"one": True, "two": True}
    assert claimed["states"]
    assert claimed["end"] == "idle"
    assert claimed["outcomes"][0] == "restored"
    assert set(claimed["outcomes"][1:]) == {"aborted"}


@pytest.mark.full
@pytest.mark.timeout(900)
def test_two_hundred_clients_come_through_whatever_five_of_them_do(vm: Play) -> None:
    result = vm("crowd", memory="3G", stage_deadline=400, deadline=800).require()
    garbage = result.facts("garbage")
    assert garbage["sent"] < 8 << 20, "somebody read a message of a gibibyte"
    thief = result.facts("thief")
    assert set(thief) == {"claim", "unregister", "discard", "update", "grows"}
    assert not [what for what in thief.values() if what not in ("NotPermitted", "Refused", "InvalidRequest")], thief
    refused = result.facts("refused")
    assert "silent" in refused["said"]
    assert refused["aborted"] == 195
    assert not refused["still"], "somebody was made to stand still for an update that policy refuses"
    assert result.facts("twice")["second answers"][-2:] == ["Refused"] * 2
    assert result.facts("restored")["state"] == "restored"
    assert result.facts("thief after")["claim"] == "NotPermitted"
    assert result.facts("claimed")["whole"] == 195
