# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the restore stage's custodian holds comes to the host's own, whole, and only then does the other end."""

from __future__ import annotations

import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from khod.custodian import protocol
from khod.custodian.keeper import Keeper
from khod.custodian.store import Store
from khod.custodian.table import Table
from khod.custodian.takeover import take_over

ROOT = Path(__file__).parents[3]


@pytest.fixture
def keeper() -> Keeper:
    return Keeper(Table(resource.getrlimit(resource.RLIMIT_NOFILE)[0]), Store("", 0), "/nowhere", "")


class Early:
    """A running one."""

    def __init__(self, address: str) -> None:
        self.address = b"\0" + address.encode()
        argv = [sys.executable, "-m", "tests.unit.custodian.early", address]
        self.process = subprocess.Popen(argv, stdout=subprocess.PIPE, cwd=ROOT)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"

    def ended(self) -> bool:
        """Whether nobody serves at its address any more; with the last of both it is free again."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            return probe.connect_ex(self.address) != 0


@pytest.fixture
def early(tmp_path: Path) -> Iterator[Early]:
    running = Early(f"khod-test-{os.getpid()}-{tmp_path.name}")
    yield running
    # One that has just ended may still have been asked.
    with suppress(ConnectionError), socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as left:
        if left.connect_ex(running.address) == 0:
            left.send(protocol.request(protocol.YIELD))
            left.recv(100)
    running.process.kill()
    running.process.wait()
    assert running.process.stdout is not None
    running.process.stdout.close()


def text(fd: int) -> str:
    return os.pread(fd, 100, 0).decode()


def held(keeper: Keeper) -> dict[str, str]:
    found = {f"deposit {name.decode()}": text(fd) for name, fd in keeper.deposits.items()}
    for name, fd in keeper.sessions.items():
        found[f"session {name.decode()}"] = text(fd)
        found |= {f"{name.decode()} {token}": text(file) for token, file in keeper.files.get(fd, {}).items()}
    return found


WHOLE = {
    "deposit early": "the record",
    "session khod": "khod",
    "session khod.u.1": "khod.u.1",
    "khod 0": "tree",
    "khod.u.1 3": "a file that has a lower number than its session",
}


def close(keeper: Keeper) -> None:
    for fd in [*keeper.deposits.values(), *keeper.sessions.values(), *(f for m in keeper.files.values() for f in m.values())]:
        os.close(fd)


def test_all_of_it_comes_over_and_the_other_ends(keeper: Keeper, early: Early) -> None:
    assert take_over(keeper, early.address) == len(WHOLE)
    assert held(keeper) == WHOLE
    assert early.process.wait(10) == 0
    assert early.ended()
    assert take_over(keeper, early.address) == 0
    assert held(keeper) == WHOLE
    close(keeper)


def test_a_takeover_that_was_interrupted_is_done_again(keeper: Keeper, early: Early, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each answer but the last: whoever took over dies, and who comes after him takes everything."""
    for answers in range(len(WHOLE) + 1):
        left = answers

        def dies(self: Keeper, fd: int, *words: object, real: object = Keeper.inherit) -> int:
            nonlocal left
            if not left:
                raise OSError("the end")
            left -= 1
            return real(self, fd, *words)  # type: ignore[operator,no-any-return]

        with monkeypatch.context() as patch:
            patch.setattr(Keeper, "inherit", dies)
            if answers < len(WHOLE):
                assert take_over(keeper, early.address) == 0
                assert not early.ended()
        if answers == 2:  # meanwhile the process that served is killed, and its twin serves on
            early.process.send_signal(signal.SIGKILL)
            early.process.wait()
    assert take_over(keeper, early.address) == len(WHOLE)
    assert held(keeper) == WHOLE
    close(keeper)


def test_nobody_there_is_nothing_to_take(keeper: Keeper) -> None:
    assert take_over(keeper, b"\0khod-test-nobody") == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes a second user")
def test_another_user_at_the_address_is_not_listened_to(keeper: Keeper, capfd: pytest.CaptureFixture[str]) -> None:
    name = f"khod-test-other-{os.getpid()}"
    code = (
        f"import os, socket; os.setuid(65534); s = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET);"
        f"s.bind('\\0{name}'); s.listen(); print('ready', flush=True); c, _ = s.accept(); print(c.recv(10))"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        assert take_over(keeper, f"\0{name}".encode()) == 0
        assert other.stdout.read() == "b''\n", "it was told nothing"
    assert "user 65534" in capfd.readouterr().err
    assert not held(keeper)


def test_a_custodian_with_a_path_does_not_give_up_what_it_holds(tmp_path: Path) -> None:
    from khod.kernel.custody import KernelCustody
    from tests.unit.custodian.pid1 import kill_both

    path = tmp_path / "custodian.sock"
    custody = KernelCustody(str(path), start=True)
    fd = os.memfd_create("kept")
    custody.keep("kept", fd)
    os.close(fd)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.connect(str(path))
        channel.send(protocol.request(protocol.YIELD))
        assert protocol.read_answer(channel.recv(1000))[0] == protocol.REFUSED
    assert list(custody.kept()) == ["kept"]
    kill_both(path)
    os.waitpid(custody._child, 0)
