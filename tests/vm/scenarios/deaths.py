# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod and its custodian's processes are killed between calls of ports, khod is started again, and nothing is lost.

While restoring: before the first call of a port, after the first, after the second, and so on until one khod gets through.
Each starts where the one before it has died, so each call is the last of somebody. Who dies takes turns: khod, khod and the
one that serves, khod and the one that waits; the parameter `turn` says who begins. With "twins" khod lives, and before each of
its calls one of the twins dies.

Before the jump it happens three times: in preparing, in freezing, and right before the system call. A guest which stands
still for that must be told to go on, and must not before.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from khod.client import Notice, Participant, Workload
from khod.kernel.custody import PROGRAM
from khod.rehearsal.inside import CONFIG, NOTIFY, SOCKET
from tests.vm.content import fill, filled
from tests.vm.guest import Guest

KHOD, SERVES, WAITS = "khod", "serves", "waits"
TURNS: dict[object, tuple[tuple[str, ...], ...]] = {
    **{turn: ((KHOD,), (SERVES, KHOD), (WAITS, KHOD), (KHOD,), (SERVES, KHOD))[turn : turn + 3] for turn in range(3)},
    "twins": ((SERVES,), (WAITS,)),
}
BEFORE = {"preserve_fd": 3, "sync": 2, "execute": 1}
"""Calls in preparing, in freezing and in executing, and which of its kind; khod dies before it."""
SIZES = {"one": (1 << 20, 4096), "two": (4 << 20,)}
STATE = b"what the guest's processors know"


def start_custodian() -> None:
    """As its unit would, before khod, whose death then is none of a parent's."""
    argv = [sys.executable, "-I", "-S", PROGRAM, "--say-ready"]
    custodian = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, start_new_session=True)
    assert custodian.stdout
    assert custodian.stdout.readline() == b"ready\n"


def twins() -> dict[str, int]:
    """The custodian's processes: the one that waits is a child of the one that serves."""
    parents = {}
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            line = (directory / "cmdline").read_bytes()
            parent = int((directory / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        if b"khod/custodian/__main__.py" in line:
            parents[int(directory.name)] = parent
    return {WAITS if parent in parents else SERVES: pid for pid, parent in parents.items()}


def kill(victims: Sequence[str]) -> None:
    """At least one of the twins lives on, which is what decision 18 promises; both are there before the next is killed."""
    while {*victims} != {KHOD} and len(there := twins()) != 2:
        os.sched_yield()
    for name in victims:
        if name != KHOD:
            os.kill(there[name], signal.SIGKILL)
    if KHOD in victims:
        os.kill(os.getpid(), signal.SIGKILL)


class Calls:
    """Every port of a machine, and a function that is told before each call of one: its name, and how many were before."""

    def __init__(self, before: Callable[[int, str], None]) -> None:
        self._before = before
        self._count = 0
        self._lock = threading.Lock()

    def around(self, machine: Any) -> Any:
        ports = {row.name: getattr(machine, row.name) for row in dataclasses.fields(machine)}
        return dataclasses.replace(machine, **{name: _Port(port, self._called) for name, port in ports.items()})

    def notifier(self, kind: type[Any]) -> type[Any]:
        """One of this kind, which lets nobody be told any more from READY=1 on."""

        class Last(kind):  # type: ignore[misc]
            def tell(notifier, text: str) -> None:
                if "READY=1" in text:
                    self._before = lambda count, name: None
                super().tell(text)

        return Last

    def _called(self, name: str) -> None:
        with self._lock:
            self._before(self._count, name)
            self._count += 1


class _Port:
    def __init__(self, port: Any, called: Callable[[str], None]) -> None:
        self._port, self._called = port, called

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._port, name)
        if not callable(found) or name.startswith("_"):
            return found

        def call(*arguments: Any, **named: Any) -> Any:
            self._called(name)
            return found(*arguments, **named)

        return call


def run(vm: Guest, before: Callable[[int, str], None], *, until_ready: bool = False) -> tuple[int, bool]:
    """A khod in a process of its own, forked: what it imports has been imported. `before` is told of its calls, or with
    `until_ready` of those before it is ready. Returns its pidfd, when it is ready or dead, and whether it is ready."""
    daemon: Any = importlib.import_module("khod.daemon")

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        NOTIFY.unlink(missing_ok=True)
        notified.bind(str(NOTIFY))
        child = os.fork()
        if child == 0:
            os.environ["NOTIFY_SOCKET"] = str(NOTIFY)
            log = os.open(vm.shared / f"khod-{vm.stage}.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.dup2(log, 1)
            os.dup2(log, 2)
            made, calls = daemon.open_machine, Calls(before)
            if until_ready:
                daemon.Notifier = calls.notifier(daemon.Notifier)
            daemon.open_machine = lambda configuration: calls.around(made(configuration))
            status = 1
            try:
                status = daemon.main(["--config", str(CONFIG)])
            finally:
                sys.stderr.flush()
                os._exit(status)
        pidfd = os.pidfd_open(child)
        while True:
            ready, _, _ = select.select([notified.fileno(), pidfd], [], [], 60)
            assert ready, "khod neither got ready nor died"
            if notified.fileno() in ready:
                if b"READY=1" in notified.recv(4096):
                    return pidfd, True
            else:
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                assert status == -signal.SIGKILL, f"khod ended by itself: {status}"
                return pidfd, False


class Runs(Workload):
    """A guest: whether it runs, and what it was told."""

    def __init__(self) -> None:
        self.goes_on = threading.Event()
        self.stood_still = 0

    def quiesce(self, notice: Notice) -> None:
        self.goes_on.clear()
        self.stood_still += 1
        for states in notice.states.values():
            states["processors"].write(STATE)

    def aborted(self, notice: Notice) -> None:
        self.goes_on.set()


def victims(vm: Guest, nth: int) -> tuple[str, ...]:
    """Whose turn it is."""
    turns = TURNS[vm.parameters["turn"]]
    return turns[nth % len(turns)]


def dies_at(name: str, nth: int, victims: Sequence[str]) -> Callable[[int, str], None]:
    """Die before the nth call of that name."""
    left = [nth]

    def before(_: int, called: str) -> None:
        left[0] -= called == name
        if not left[0]:
            kill(victims)

    return before


def update(vm: Guest) -> None:
    """Until it ends, by the death of who does it."""
    from khod.api.client import connect
    from khod.errors import Lost

    with connect(SOCKET) as client:
        client.load(str(vm.kernel))
        try:
            for _ in client.update():
                pass
        except Lost:
            pass


def before(vm: Guest) -> None:
    CONFIG.write_text(f"state_directory: {vm.state}/khod\nreserve: 16M\n")
    start_custodian()
    deaths = list(BEFORE.items())
    pidfd, _ = run(vm, dies_at(*deaths[0], (*victims(vm, 0), KHOD)))
    memory = {name: {f"ram{index}": os.memfd_create(name, 0x10) for index in range(len(s))} for name, s in SIZES.items()}
    guest = Runs()
    participant = Participant(guest, path=SOCKET)
    for name, fds in memory.items():
        for fd, size in zip(fds.values(), SIZES[name], strict=True):
            os.ftruncate(fd, size)
            fill(fd, size)
        participant.register(name, fds, states={"processors": 4096})
    participant.start()
    seen = []
    for index, (name, _) in enumerate(deaths):
        still = guest.stood_still
        guest.goes_on.clear()
        update(vm)
        assert select.select([pidfd], [], [], 60)[0], f"khod does not die at {name}"
        asked = guest.stood_still > still
        went_on = guest.goes_on.is_set()
        more = deaths[index + 1 :]
        pidfd, ready = run(vm, dies_at(*more[0], (*victims(vm, index + 1), KHOD)) if more else lambda count, name: None)
        assert ready
        assert guest.goes_on.wait(60), f"the guest was not told to go on after a death at {name}"
        seen.append({"at": name, "stood_still": asked, "went_on_by_itself": went_on})
        for instance, fds in memory.items():
            assert all(filled(fd, size) for fd, size in zip(fds.values(), SIZES[instance], strict=True))
    vm.record("before", deaths=seen)
    update(vm)
    raise AssertionError("the jump came back")


def after(vm: Guest) -> None:
    from khod.api.client import connect

    CONFIG.write_text(f"state_directory: {vm.state}/khod\nreserve: 16M\n")
    start_custodian()
    died_before: list[str] = []
    inward, outward = os.pipe()
    while True:
        nth = len(died_before)

        def dies(count: int, name: str, nth: int = nth) -> None:
            if count == nth or vm.parameters["turn"] == "twins":
                os.write(outward, name.encode() + b"\n")
                kill(victims(vm, count))

        if run(vm, dies, until_ready=True)[1]:
            break
        died_before += os.read(inward, 1 << 16).decode().split()
    os.set_blocking(inward, False)
    died_before += (os.read(inward, 1 << 16) if select.select([inward], [], [], 0)[0] else b"").decode().split()
    vm.record("after", deaths=len(died_before), calls=sorted(set(died_before)))
    with connect(SOCKET) as client:
        status = client.status()
        claims = {name: client.claim(name) for name in SIZES}
        states = {name: bytes(os.pread(claim.fds[claim.names.index("processors")], 100, 0)) for name, claim in claims.items()}
        intact = {
            name: all(filled(claim.fds[claim.names.index(f"ram{index}")], size) for index, size in enumerate(SIZES[name]))
            for name, claim in claims.items()
        }
        for claim in claims.values():
            client.finished(claim.handle)
        vm.record(
            "claimed",
            state=str(status.state),
            problems=list(status.problems),
            intact=intact,
            states=all(STATE in state for state in states.values()),
            end=str(client.status().state),
            outcomes=[str(u.outcome) for u in client.history()],
        )
