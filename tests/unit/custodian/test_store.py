# SPDX-License-Identifier: LGPL-2.1-or-later
"""The custodian with PID 1's store behind it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from khod.custodian.luo import same
from khod.custodian.store import NAMES
from khod.errors import CustodianGone, CustodyFull, InvalidRequest
from khod.kernel.custody import KernelCustody
from tests.unit.custodian.conftest import Memfd, contents
from tests.unit.custodian.pid1 import DEADLINE, Pid1, kill, links, wait


def stored_contents(pid1: Pid1) -> dict[str, bytes]:
    """What PID 1 has, by the names that khod gave."""
    found: dict[str, bytes] = {}
    for mark, fd in pid1.store:
        name = mark.rstrip("AB")
        found[name if name not in found else f"{name}, twice"] = os.pread(fd, 100, 0)
    return found


def kept_contents(custody: KernelCustody) -> dict[str, bytes]:
    """What the custodian says it has."""
    return {name: contents(custody.take(name)) for name in custody.kept()}


def test_what_is_kept_is_in_the_store_before_the_answer(pid1: Pid1, stored: KernelCustody, memfd: Memfd) -> None:
    fd = memfd(b"ram")
    stored.keep("ram", fd)
    ((name, held),) = pid1.store
    assert name == "ram"
    assert same(held, fd)
    stored.drop(["ram"])
    assert not pid1.store


def test_a_name_in_the_store_changes_with_its_file_and_not_without(pid1: Pid1, stored: KernelCustody, memfd: Memfd) -> None:
    seen = []
    for i in range(5):
        fd = memfd(str(i).encode())
        for _ in range(2):
            stored.keep("book", fd)
            stored.room()  # what was said without waiting has been heard
            pid1.until(lambda: len(pid1.store) == 1)
        seen += pid1.names()
        assert stored_contents(pid1) == {"book": str(i).encode()}
    assert seen == ["book", "bookA", "bookB", "book", "bookA"]


def test_one_file_under_two_names_is_two_in_the_store(pid1: Pid1, stored: KernelCustody, memfd: Memfd) -> None:
    fd = memfd(b"shared")
    stored.keep("a", fd)
    stored.keep("b", fd)
    assert pid1.names() == ["a", "b"]
    stored.drop(["a"])
    assert stored_contents(pid1) == {"b": b"shared"}
    reading, writing = os.pipe()
    try:
        stored.keep("pipe", reading)
        with pytest.raises(InvalidRequest, match="pipe"):
            stored.keep("again", reading)
        assert pid1.names() == ["b", "pipe"]
    finally:
        os.close(reading)
        os.close(writing)


def test_both_killed_and_all_is_back(pid1: Pid1, stored: KernelCustody, memfd: Memfd) -> None:
    fds = {name: memfd(name.encode()) for name in ("ram0", "ram1", "book")}
    for name, fd in fds.items():
        stored.keep(name, fd)
    stored.keep("book", new := memfd(b"book2"))
    pid1.kill_both()
    with pytest.raises(CustodianGone):
        stored.kept()
    pid1.start()
    assert list(stored.kept()) == ["book", "ram0", "ram1"]
    taken = stored.take("book")
    assert same(taken, new)
    assert contents(taken) == b"book2"
    stored.keep("ram0", fds["ram0"])  # the same as PID 1 has: no effect
    pid1.until(lambda: pid1.names() == ["bookA", "ram0", "ram1"])


def test_sigterm_ends_it_at_once(pid1: Pid1, stored: KernelCustody, memfd: Memfd) -> None:
    stored.keep("a", memfd(b"a"))
    pids = pid1.twins()
    ends = [os.pidfd_open(pid) for pid in pids]
    os.kill(pids[0], signal.SIGTERM)
    for fd in ends:
        wait(fd)
        os.close(fd)
    pid1.until(lambda: "STOPPING=1" in pid1.said)
    pid1.start()
    assert kept_contents(stored) == {"a": b"a"}


def test_the_twin_tells_pid_1_who_it_is(pid1: Pid1, stored: KernelCustody) -> None:
    for _ in range(3):
        serving, sleeping = pid1.twins()
        assert pid1.main_pid == serving
        kill(serving)
        stored.room()
        pid1.until(lambda pid=sleeping: pid1.main_pid == pid)  # type: ignore[misc]
    assert pid1.said.count("READY=1") == 1


def test_descriptors_that_are_for_another_process_are_not_ours(pid1: Pid1, memfd: Memfd) -> None:
    pid1.store.append(("a", os.dup(memfd(b"a"))))
    pid1.start(LISTEN_PID="1")
    assert list(KernelCustody(str(pid1.socket_path)).kept()) == []
    assert not [link for link in links(pid1.socket_path) if "memfd" in link]


def test_what_no_custodian_gave_stays_in_the_store(pid1: Pid1, memfd: Memfd) -> None:
    names = ["stored", "Upper", "with-dash", "S12", "elevenchars0"]
    for name in names:
        pid1.store.append((name, os.dup(memfd(name.encode()))))
    pid1.start()
    custody = KernelCustody(str(pid1.socket_path))
    assert custody.kept() == ["stored"]  # one that khod might have chosen
    assert custody.room() == pid1.room - len(names)
    kill(pid1.twins()[0])
    assert custody.room() == pid1.room - len(names)
    assert pid1.names() == sorted(names)


def test_both_of_a_change_that_was_not_ended_come_back_as_the_newer(pid1: Pid1, memfd: Memfd) -> None:
    for marks in (("x", "xA"), ("yA", "yB"), ("zB", "z")):
        for age, mark in enumerate(marks):
            pid1.store.append((mark, os.dup(memfd(b"new" if age else b"old"))))
    pid1.store.reverse()
    pid1.start()
    custody = KernelCustody(str(pid1.socket_path))
    custody.drop([])
    assert kept_contents(custody) == {"x": b"new", "y": b"new", "z": b"new"}
    pid1.until(lambda: pid1.names() == ["xA", "yB", "z"])


def test_more_than_the_store_takes_is_refused_and_not_lost(pid1: Pid1, memfd: Memfd) -> None:
    pid1.room = 3
    pid1.start()
    custody = KernelCustody(str(pid1.socket_path))
    for i in range(3):
        assert custody.room() == 3 - i
        custody.keep(f"n{i}", memfd(b"old"))
    for name in ("n0", "more"):  # another file needs a place of its own until the old one has gone
        with pytest.raises(CustodyFull, match="FileDescriptorStoreMax="):
            custody.keep(name, memfd(b"new"))
    custody.drop(["n1"])
    custody.keep("n0", memfd(b"new"))
    assert kept_contents(custody) == {"n0": b"new", "n2": b"old"}
    assert pid1.dropped == 0


@pytest.mark.timeout(120)
def test_ten_thousand_descriptors(pid1: Pid1) -> None:
    pid1.room = 16384
    for i in range(10_000):
        fd = os.memfd_create("unit")
        os.write(fd, b"%d" % i)
        pid1.store.append((f"d{i:09}", fd))
    began = time.monotonic()
    pid1.start()
    custody = KernelCustody(str(pid1.socket_path))
    assert len(custody.kept()) == 10_000
    assert time.monotonic() - began < 5
    assert custody.room() == (NAMES - 11 * 10_000) // 12  # what is left of LISTEN_FDNAMES, and not of the store
    kill(pid1.twins()[0])
    assert len(custody.kept()) == 10_000
    assert contents(custody.take("d000009999")) == b"9999"
    custody.drop(custody.kept()[100:200])
    assert len(pid1.store) == 9_900


# What khod does, with as many words to PID 1 as `WORDS`; after each of them somebody dies.
WORDS = 15


def script(custody: KernelCustody, memfd: Memfd) -> list[tuple[str, Callable[[], None], dict[str, bytes]]]:
    """Steps, each with what is kept after it."""
    first, second, other = memfd(b"first"), memfd(b"second"), memfd(b"other")
    return [
        ("keep", lambda: custody.keep("a", first), {"a": b"first"}),
        ("replace", lambda: custody.keep("a", second), {"a": b"second"}),
        ("another", lambda: custody.keep("b", other), {"a": b"second", "b": b"other"}),
        ("offer", lambda: custody.offer([]), {"a": b"second", "b": b"other"}),
        ("withdraw", lambda: custody.withdraw(), {"a": b"second", "b": b"other"}),
        ("drop", lambda: custody.drop(["a"]), {"b": b"other"}),
    ]


class Client(threading.Thread):
    """Takes the steps until one fails."""

    def __init__(self, steps: list[tuple[str, Callable[[], None], dict[str, bytes]]]) -> None:
        super().__init__()
        self.steps = steps
        self.done = 0
        self.error: BaseException | None = None

    def run(self) -> None:
        for _, step, _ in self.steps:
            try:
                step()
            except BaseException as error:
                self.error = error
                return
            self.done += 1


def test_the_script_has_as_many_words_as_deaths_are_tried(pid1: Pid1, stored: KernelCustody, memfd: Memfd) -> None:
    for name, step, after in script(stored, memfd):
        step()
        assert kept_contents(stored) == after, name
        there = {} if name == "offer" else after
        # The old one of a replacement is taken out without waiting for it.
        pid1.until(lambda there=there: len(pid1.store) == len(there) and stored_contents(pid1) == there)  # type: ignore[misc]
    assert pid1.heard == WORDS


@pytest.mark.parametrize("victims", ["one", "one after the other"])
@pytest.mark.parametrize("word", range(1, WORDS + 1))
def test_a_death_at_every_word_to_pid_1(pid1: Pid1, stored: KernelCustody, memfd: Memfd, word: int, victims: str) -> None:
    steps = script(stored, memfd)
    client = Client(steps)
    pid1.stop_at = word
    client.start()
    pid1.until(lambda: not pid1.running.is_set())
    kill(pid1.twins()[0])
    if victims != "one":
        # The survivor is at its own work, or at the client's: as soon as it is not alone, it dies too.
        pid1.until_there_are_two()
        kill(pid1.twins()[0])
    pid1.running.set()
    client.join(DEADLINE)
    assert (client.error, client.done) == (None, len(steps))
    assert kept_contents(stored) == steps[-1][2]
    stored.drop([])  # and whatever was left over
    pid1.until(lambda: stored_contents(pid1) == steps[-1][2])
    assert links(pid1.socket_path).count("/memfd:unit (deleted)") == len(steps[-1][2]), (
        "nothing is held that nobody can ask for"
    )


@pytest.mark.parametrize("word", range(1, WORDS + 1))
def test_the_death_of_both_at_every_word(pid1: Pid1, stored: KernelCustody, memfd: Memfd, word: int) -> None:
    steps = script(stored, memfd)
    client = Client(steps)
    pid1.stop_at = word
    client.start()
    pid1.until(lambda: not pid1.running.is_set())
    pid1.kill_both()
    pid1.running.set()
    client.join(DEADLINE)
    pid1.settle()
    assert client.error is None or isinstance(client.error, CustodianGone)
    before = steps[client.done - 1][2] if client.done else {}
    after = steps[min(client.done, len(steps) - 1)][2]
    offering = "offer" in [name for name, *_ in steps[max(client.done - 1, 0) : client.done + 1]]
    pid1.start()
    found = kept_contents(stored)
    if not offering:  # then PID 1 was told to let go, and khod has its own
        assert found in (before, after)
    pid1.until(lambda: stored_contents(pid1) == found)
    # khod says again what it was saying.
    for _, step, _ in steps[max(client.done - 1, 0) :]:
        step()
    assert kept_contents(stored).items() >= steps[-1][2].items() - ({} if not offering else before).items()


def test_what_is_kept_while_sessions_are_offered_goes_into_the_store_with_the_rest(
    pid1: Pid1, stored: KernelCustody, memfd: Memfd
) -> None:
    stored.keep("a", memfd(b"a"))
    stored.offer([])
    assert not pid1.store
    stored.keep("b", memfd(b"b"))
    stored.keep("a", memfd(b"a2"))
    assert not pid1.store
    kill(pid1.twins()[0])
    assert kept_contents(stored) == {"a": b"a2", "b": b"b"}
    assert not pid1.store
    for _ in range(2):
        stored.withdraw()
        assert stored_contents(pid1) == {"a": b"a2", "b": b"b"}
    stored.keep("c", memfd(b"c"))
    assert "c" in stored_contents(pid1)
    stored.drop(["c"])
    with pytest.raises(InvalidRequest, match="not a live-update session"):
        stored.offer([memfd(b"no session")])
    assert stored_contents(pid1) == {"a": b"a2", "b": b"b"}
