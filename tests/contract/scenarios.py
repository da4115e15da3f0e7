# SPDX-License-Identifier: LGPL-2.1-or-later
"""What both machines do across a jump, as pairs: one half in the old kernel, one in the new.

`before` prepares and returns what `after` needs to know, as JSON; nothing that `before` opened is closed until the jump.
`before_all` and `after_all` play every pair around one jump: whoever makes the jump (``play`` on a simulated machine, the
lab around a real kexec) calls the first, loads, executes, and calls the second in the new kernel.
"""

from __future__ import annotations

import hashlib
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from khod import errors
from khod.core.ports import F_SEAL_GROW, F_SEAL_SEAL, F_SEAL_SHRINK, Machine
from khod.folio.units import PAGE_SHIFT
from tests.contract.rig import PAGE, Rig

Remembered = dict[str, Any]
SIZE = 2 << 20
HELD = 64 << 20
"""Freed at once, this much is told from what else goes on in a machine: some 8 MiB, in the lab's."""


@dataclass(frozen=True)
class Scenario:
    """One pair."""

    name: str
    before: Callable[[Machine, Rig], Remembered]
    after: Callable[[Machine, Rig, Remembered], None]
    simulated_only: bool = False
    """Linux does not promise it: freed memory may keep its old bytes by luck."""


def before_all(machine: Machine, rig: Rig, *, simulated: bool) -> dict[str, Remembered]:
    """Play the first halves; what they remember, by name."""
    return {s.name: s.before(machine, rig) for s in SCENARIOS if simulated or not s.simulated_only}


def after_all(machine: Machine, rig: Rig, remembered: dict[str, Remembered]) -> dict[str, str]:
    """Play the second halves, each whatever becomes of the others; '' or the traceback of each, by name."""
    outcome = {}
    for scenario in SCENARIOS:
        if scenario.name in remembered:
            try:
                scenario.after(machine, rig, remembered[scenario.name])
                outcome[scenario.name] = ""
            except BaseException:
                outcome[scenario.name] = traceback.format_exc()
    return outcome


def pattern(seed: str, size: int) -> bytes:
    """Bytes that no two pages share, the same in both kernels."""
    return b"".join(hashlib.sha256(f"{seed}/{i}".encode()).digest() for i in range(size // 32))


def outgoing(machine: Machine, name: str, *fds: int) -> None:
    """A session with files under the tokens 0, 1, …"""
    session = machine.liveupdate.create_session(name)
    for token, fd in enumerate(fds):
        machine.liveupdate.preserve_fd(session, fd, token)


def frames(machine: Machine, fd: int) -> list[list[list[int]]]:
    """Every folio of a file, as JSON."""
    return [[list(w.pfns), list(w.orders)] for w in machine.frames.windows(fd)]


def _same_before(machine: Machine, rig: Rig) -> Remembered:
    full = rig.memfd(SIZE, {0: pattern("full", SIZE)})
    sparse = rig.memfd(SIZE, {SIZE // 2 + 5: pattern("sparse", PAGE)})
    sealed = rig.memfd(PAGE, {0: pattern("sealed", PAGE)})
    machine.files.add_seals(sealed, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL)
    odd, empty = rig.memfd(PAGE + 1, {PAGE: b"!"}), rig.memfd(0)
    fds = (full, sparse, sealed, odd, empty)
    outgoing(machine, "contract.same", *fds)
    rig.seek(full, 4711)
    machine.files.write(full, 3 * PAGE, b"written after preserve")
    machine.files.add_seals(odd, F_SEAL_GROW)
    return {"frames": [frames(machine, fd) for fd in fds]}


def _same_after(machine: Machine, rig: Rig, known: Remembered) -> None:
    session = machine.liveupdate.retrieve_session("contract.same")
    assert machine.liveupdate.session_name(session) == "contract.same"
    full, sparse, sealed, odd, empty = fds = [machine.liveupdate.retrieve_fd(session, token) for token in range(5)]
    assert [frames(machine, fd) for fd in fds] == known["frames"]
    contents = bytearray(pattern("full", SIZE))
    contents[3 * PAGE : 3 * PAGE + 22] = b"written after preserve"
    assert machine.files.read(full, 0, SIZE) == contents
    assert rig.seek(full) == 4711
    assert machine.files.read(sparse, 0, SIZE // 2 + 5 + PAGE) == bytes(SIZE // 2 + 5) + pattern("sparse", PAGE)
    assert machine.files.read(odd, 0, 2 * PAGE) == bytes(PAGE) + b"!"
    stats = [machine.files.stat(fd) for fd in fds]
    assert [stat.size for stat in stats] == [SIZE, SIZE, PAGE, PAGE + 1, 0]
    assert stats[1].allocated == SIZE
    # A seal that was added after preserve is lost; those before are kept.
    assert [stat.seals for stat in stats] == [0, 0, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL, 0, 0]
    machine.files.truncate(empty, PAGE)
    machine.files.truncate(odd, 0)
    with pytest.raises(errors.FileFrozen):
        machine.files.truncate(sealed, 0)
    machine.liveupdate.finish(session)


def _once_before(machine: Machine, rig: Rig) -> Remembered:
    outgoing(machine, "contract.once", rig.memfd(PAGE, {0: b"x"}))
    return {}


def _once_after(machine: Machine, rig: Rig, known: Remembered) -> None:
    live = rig.raw
    session = live.retrieve_session("contract.once")
    with pytest.raises(errors.SessionTaken):
        live.retrieve_session("contract.once")
    with pytest.raises(errors.TokenUnknown):
        live.retrieve_fd(session, 7)
    with pytest.raises(errors.SessionDirection):
        live.preserve_fd(session, rig.memfd(PAGE), 9)
    first, second = live.retrieve_fd(session, 0), live.retrieve_fd(session, 0)
    rig.seek(first, 99)
    assert first != second and rig.seek(second) == 99
    live.finish(session)
    with pytest.raises(errors.SessionTaken):
        live.retrieve_session("contract.once")
    machine.files.close(session)
    with pytest.raises(errors.SessionUnknown):
        live.retrieve_session("contract.once")
    assert machine.files.read(first, 0, 1) == b"x"


def _finish_before(machine: Machine, rig: Rig) -> Remembered:
    for name in ("contract.finish", "contract.close"):
        outgoing(machine, name, rig.memfd(PAGE, {0: b"kept"}), rig.memfd(HELD))
    return {}


def _finish_after(machine: Machine, rig: Rig, known: Remembered) -> None:
    live = rig.raw
    for name in ("contract.finish", "contract.close"):
        session = live.retrieve_session(name)
        kept = live.retrieve_fd(session, 0)
        before = machine.memory.figures().available
        if name == "contract.close":
            machine.files.close(session)
        else:
            live.finish(session)
            live.finish(session)
            with pytest.raises(errors.TokenUnknown):
                live.retrieve_fd(session, 1)
        # What was not retrieved is free again, what was is as it was.
        assert machine.memory.figures().available - before > HELD // 2
        assert machine.files.read(kept, 0, 4) == b"kept"


def _again_before(machine: Machine, rig: Rig) -> Remembered:
    outgoing(machine, "contract.again", rig.memfd(PAGE))
    return {}


def _again_after(machine: Machine, rig: Rig, known: Remembered) -> None:
    live = machine.liveupdate
    incoming = live.retrieve_session("contract.again")
    fd = live.retrieve_fd(incoming, 0)
    session = live.create_session("contract.again")  # an incoming one of that name is no obstacle
    with pytest.raises(errors.AlreadyPreserved):
        live.preserve_fd(session, fd, 0)
    live.finish(incoming)
    live.preserve_fd(session, fd, 0)
    with pytest.raises(errors.FileFrozen):
        machine.files.truncate(fd, 0)


def _noexec_before(machine: Machine, rig: Rig) -> Remembered:
    outgoing(machine, "contract.noexec", rig.memfd(PAGE, {0: b"trap"}, noexec=True))
    return {}


def _noexec_after(machine: Machine, rig: Rig, known: Remembered) -> None:
    fd = machine.liveupdate.retrieve_fd(machine.liveupdate.retrieve_session("contract.noexec"), 0)
    assert machine.files.stat(fd).seals == 0x3E
    assert machine.files.read(fd, 0, 4) == b"trap"
    with pytest.raises(errors.FileFrozen):
        machine.files.write(fd, 0, b"x")
    with pytest.raises(errors.FileFrozen):
        machine.files.truncate(fd, 0)


def _read_only_before(machine: Machine, rig: Rig) -> Remembered:
    outgoing(machine, "contract.read-only", rig.read_only(rig.memfd(PAGE)))
    return {}


def _read_only_after(machine: Machine, rig: Rig, known: Remembered) -> None:
    fd = machine.liveupdate.retrieve_fd(machine.liveupdate.retrieve_session("contract.read-only"), 0)
    assert machine.files.stat(fd).writable
    machine.files.write(fd, 0, b"x")


def _closed_before(machine: Machine, rig: Rig) -> Remembered:
    session = machine.liveupdate.create_session("contract.closed")
    machine.liveupdate.preserve_fd(session, rig.memfd(PAGE), 0)
    machine.files.close(session)
    return {"boot": machine.boot.boot().boot_id, "count": machine.boot.boot().kexec_count, "tsc": machine.clock.stamp().tsc}


def _closed_after(machine: Machine, rig: Rig, known: Remembered) -> None:
    with pytest.raises(errors.SessionUnknown):
        machine.liveupdate.retrieve_session("contract.closed")
    boot = machine.boot.boot()
    assert boot.handover and boot.boot_id != known["boot"] and boot.kexec_count == known["count"] + 1
    assert machine.clock.stamp().tsc >= known["tsc"]
    assert not machine.kexec.loaded()


def _kept_before(machine: Machine, rig: Rig) -> Remembered:
    outgoing(machine, "contract.kept", rig.memfd(PAGE, {0: b"kept"}))
    outgoing(machine, "contract.taken", rig.memfd(PAGE))
    machine.custody.keep("crossed", rig.memfd(PAGE))
    return {}


def _kept_after(machine: Machine, rig: Rig, known: Remembered) -> None:
    """What somebody retrieved is in custody: whoever asks again gets the same, whatever became of the first."""
    live, custody = machine.liveupdate, machine.custody
    assert "crossed" not in custody.kept(), "a deposit does not outlive the kernel"
    rig.retrieve_and_die("contract.kept", 0)
    assert "contract.kept" in custody.sessions()
    sessions = [live.retrieve_session("contract.kept") for _ in range(2)]
    assert [live.session_name(session) for session in sessions] == ["contract.kept"] * 2
    first, second = (live.retrieve_fd(session, 0) for session in sessions)
    rig.seek(first, 99)
    assert first != second and rig.seek(second) == 99
    for fd in (first, second, *sessions):
        machine.files.close(fd)
    session = live.retrieve_session("contract.kept")
    fd = live.retrieve_fd(session, 0)
    assert rig.seek(fd) == 99
    assert machine.files.read(fd, 0, 4) == b"kept"
    with pytest.raises(errors.TokenUnknown):
        live.retrieve_fd(session, 7)
    # The kernel gives it once, and the custodian is not the kernel.
    session = rig.raw.retrieve_session("contract.taken")
    with pytest.raises(errors.SessionTaken):
        live.retrieve_session("contract.taken")
    live.retrieve_fd(session, 0)
    assert "contract.taken" not in custody.sessions()


def _release_before(machine: Machine, rig: Rig) -> Remembered:
    for name in ("contract.release", "contract.done"):
        outgoing(machine, name, rig.memfd(PAGE, {0: b"held"}), rig.memfd(HELD), rig.memfd(HELD, {5: b"too"}))
    return {}


def _release_after(machine: Machine, rig: Rig, known: Remembered) -> None:
    live, custody = machine.liveupdate, machine.custody
    for name, finished in (("contract.release", False), ("contract.done", True)):
        session = live.retrieve_session(name)
        held, third = live.retrieve_fd(session, 0), live.retrieve_fd(session, 2)
        if finished:
            live.finish(session)
            again = live.retrieve_fd(session, 0)  # the kernel has no such token any more, and custody keeps the file
            assert machine.files.read(again, 0, 4) == b"held"
        machine.files.close(session)
        before = machine.memory.figures().available
        custody.release(name)
        custody.release(name)
        assert name not in custody.sessions()
        # Of an unfinished session what was not retrieved is free now; what somebody holds stays in either case.
        freed = machine.memory.figures().available - before
        assert freed < HELD // 4 if finished else freed > HELD // 2
        with pytest.raises(errors.SessionUnknown):
            live.retrieve_session(name)
        assert machine.files.read(held, 0, 4) == b"held"
        assert machine.files.read(third, 5, 3) == b"too"
        before = machine.memory.figures().available
        machine.files.close(third)
        assert machine.memory.figures().available - before > HELD // 2, "the custodian held nothing any more"
        outgoing(machine, name, held)


def _listed_before(machine: Machine, rig: Rig) -> Remembered:
    """A file that is preserved lists the frames of one that is not: as a map does that khod wrote wrongly."""
    victim = rig.memfd(64 * PAGE, {0: pattern("victim", 64 * PAGE)})
    session = machine.liveupdate.create_session("contract.listed.victim")
    machine.liveupdate.preserve_fd(session, victim, 0)
    found = [pfn for pfn, _ in machine.frames.pages(victim, range(64))]
    machine.files.close(session)
    listing = b"".join((pfn << PAGE_SHIFT).to_bytes(8, "little") for pfn in found)
    outgoing(machine, "contract.listed", rig.memfd(PAGE, {0: listing}))
    return {}


def _listed_after(machine: Machine, rig: Rig, known: Remembered) -> None:
    fd = machine.liveupdate.retrieve_fd(machine.liveupdate.retrieve_session("contract.listed"), 0)
    listing, victim = machine.files.read(fd, 0, 64 * 8), pattern("victim", 64 * PAGE)
    for index in range(64):
        phys = int.from_bytes(listing[8 * index : 8 * index + 8], "little")
        found = machine.memory.read(phys, PAGE)
        assert found != victim[index * PAGE : (index + 1) * PAGE]
        assert found != bytes(PAGE), "destroyed must not look like empty"


SCENARIOS = (
    # First: what comes after it allocates, and may reuse the frames.
    Scenario("listed", _listed_before, _listed_after, simulated_only=True),
    Scenario("same", _same_before, _same_after),
    Scenario("once", _once_before, _once_after),
    Scenario("finish", _finish_before, _finish_after),
    Scenario("again", _again_before, _again_after),
    Scenario("noexec", _noexec_before, _noexec_after),
    Scenario("read-only", _read_only_before, _read_only_after),
    Scenario("kept", _kept_before, _kept_after),
    Scenario("release", _release_before, _release_after),
    Scenario("closed", _closed_before, _closed_after),
)
