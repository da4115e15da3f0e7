# SPDX-License-Identifier: LGPL-2.1-or-later
"""A workload that notes how it is called, and a participant that it attends with one instance."""

from __future__ import annotations

import fcntl
import os
import queue
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from khod.client import Notice, Participant, Workload
from khod.errors import KhodError
from tests.integration.client.scripted import DEADLINE, Heard, Line, ScriptedKhod


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
    stood = heard.parameters.pop("stood", 0.0)
    assert heard.parameters == {"update": "u1", "phase": phase, "handles": ["h1"]}
    assert (0 < stood < 5) == (phase == "quiesce"), "from when it was told to stand still"
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
