# SPDX-License-Identifier: LGPL-2.1-or-later
"""A participant and khod itself, which is killed under it: on a simulated machine, over the real socket."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.api.client import connect
from khod.client import Claimed, Notice, Participant, Workload
from khod.errors import KhodError
from khod.simulated import image
from tests.unit.daemons import Daemon, powered

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


class Guest(Workload):
    """Notes what it is called with; writes how often it stood still."""

    def __init__(self) -> None:
        self.calls: queue.Queue[str] = queue.Queue()
        self.stood = 0
        self.given_up: queue.Queue[KhodError] = queue.Queue()

    def preparing(self, notice: Notice) -> None:
        self.calls.put("preparing")

    def quiesce(self, notice: Notice) -> None:
        self.stood += 1
        for states in notice.states.values():
            states["vcpu"].write(b"stood still %d times" % self.stood)
        self.calls.put("quiesce")

    def aborted(self, notice: Notice) -> None:
        self.calls.put("aborted")

    def lost(self, error: KhodError) -> None:
        self.given_up.put(error)

    def expect(self, *calls: str) -> None:
        for call in calls:
            assert self.calls.get(timeout=20) == call


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "bzImage").write_bytes(image.build())
    with powered(tmp_path):
        config = f"socket: {tmp_path}/khod.sock\nmachine: simulated:{tmp_path}/machine\nreserve: 1M\n"
        (tmp_path / "khod.yaml").write_text(config)
        yield tmp_path


def hold_at_frozen(khod: Daemon) -> None:
    """An update up to there, once somebody answers for the guest."""
    deadline = time.monotonic() + 20
    with connect(khod.socket, timeout=20) as client:
        client.load(str(khod.directory / "bzImage"))
        while [reason for reason in client.plan().blockers if "its client has to answer" in reason]:
            assert time.monotonic() < deadline
        for event in client.update("frozen"):
            if event.kind == "held":
                return
    raise AssertionError("it is not held")


@pytest.mark.parametrize("lifetime", ["connection", "process"])
def test_a_khod_that_dies_with_everything_frozen_costs_an_update_and_nothing_else(place: Path, lifetime: str) -> None:
    guest, memory = Guest(), os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.truncate(memory, 1 << 20)
    with Daemon(place) as first:
        first.hear("READY=1")
        participant = Participant(guest, path=first.socket)
        participant.register("vm1", {"ram": memory}, states={"vcpu": 100}, lifetime=lifetime)
        participant.start()
        hold_at_frozen(first)
        guest.expect("preparing", "quiesce")
        assert guest.calls.empty()
        first.process.kill()
        first.process.wait()
        guest.expect("aborted")
    with Daemon(place) as second:
        second.hear("READY=1")
        with connect(second.socket, timeout=20) as client:
            assert [view.name for view in client.instances()] == ["vm1"]
        hold_at_frozen(second)
        guest.expect("preparing", "quiesce")
        with connect(second.socket, timeout=20) as client:
            assert client.abort() == "aborted"
        guest.expect("aborted")
        os.truncate(memory, 2 << 20)  # it is the guest's again
        participant.close()
        assert second.end()[0] == 0
    assert guest.given_up.empty()
    os.close(memory)


def test_what_is_claimed_before_a_jump_is_what_was_registered(place: Path) -> None:
    """A VMM that was restarted: its instance lives on with an operator's lifetime."""
    memory = os.memfd_create("memory", os.MFD_ALLOW_SEALING)
    os.write(memory, b"guest" * 1000)
    with Daemon(place) as khod:
        khod.hear("READY=1")
        with Participant(Guest(), path=khod.socket) as before:
            before.register("vm1", {"ram": memory}, lifetime="persistent")
        with Participant(Guest(), path=khod.socket) as after:
            answer = after.claim("vm1")
            assert isinstance(answer, Claimed)
            assert os.pread(answer.fds["ram"], 5000, 0) == b"guest" * 1000
            answer.close()
            after.start()
            after.unregister("vm1")
    os.close(memory)
