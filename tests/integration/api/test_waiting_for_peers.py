# SPDX-License-Identifier: LGPL-2.1-or-later
"""Descriptors whose closing waits for whoever sent them: khod does not."""

from __future__ import annotations

import json
import os
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from khod.api import porters
from khod.api.client import connect
from khod.api.listening import listen, pass_descriptors
from khod.config import Limits
from khod.errors import InvalidRequest, Lost
from khod.kernel.processes import KernelProcesses
from tests.integration.api import silent_server
from tests.integration.api.served import Served, served
from tests.integration.api.silent_server import FLUSH
from tests.integration.api.test_hostile_peers import hung_up

REGISTER = '{"method":"org.khod.Host.Register","parameters":{"name":"a","fds":[{"name":"ram","fd":0}]}}'
SLOW = 1.0
LINGER = 30
"""Seconds that closing waits for; far more than anybody here waits for khod."""


@pytest.fixture
def khod(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path / "khod.sock", limits=Limits(slow=SLOW)) as here:
        yield here


@contextmanager
def silent(khod: Served, tmp_path: Path, message: str = REGISTER) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Somebody who serves files himself, and has sent one of them; and its number there."""
    (tmp_path / "theirs").mkdir()
    argv = [sys.executable, silent_server.__file__, str(tmp_path / "theirs"), str(khod.path), message]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            (opened,) = said(process, 1)
            if not opened:
                pytest.skip("it takes root, /dev/fuse and a mount to have a file system of a user's")
            yield process, int(opened.removeprefix("open "))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def said(process: subprocess.Popen[str], count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline() for _ in range(count)]


def answers(khod: Served) -> bool:
    with connect(khod.path, timeout=5) as client:
        return client.status().state == "idle"


def register(khod: Served, name: str) -> None:
    with connect(khod.path, timeout=10) as client:
        fd = os.memfd_create(name)
        try:
            client.register(name, "guestmemfd", [(name, fd)])
        finally:
            os.close(fd)


def test_a_file_whose_server_is_silent_is_refused_and_nobody_else_waits(khod: Served, tmp_path: Path) -> None:
    with silent(khod, tmp_path) as (process, _):
        lines = said(process, 2)
        (flush,) = [line for line in lines if not line.startswith("answer")]
        (answer,) = [json.loads(line.removeprefix("answer ")) for line in lines if line.startswith("answer")]
        assert int(flush) == FLUSH, "it was closed, its server asked, and nothing else was asked of it"
        assert answer["error"] == "org.khod.Host.InvalidRequest"
        assert "theirs/guest', which khod cannot keep" in answer["parameters"]["message"]
        for _ in range(3):
            assert answers(khod)
            with pytest.raises(Lost):  # of the same user: his porter waits, and is not given company
                register(khod, "b")
        assert len(khod.server.porters) == 1
    register(khod, "c")  # the kernel has ended the wait


def test_khod_ends_while_a_file_is_being_closed(khod: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(porters, "FAREWELL", 0.1)
    with silent(khod, tmp_path) as (process, _):
        said(process, 2)
        waiting = khod.call(lambda: khod.server.porters.of(os.geteuid()).pid)
        khod.run(khod.server.aclose())
        assert len(khod.server.porters) == 1, "it is left behind"
        assert os.waitpid(waiting, os.WNOHANG) == (0, 0)
    assert os.waitpid(waiting, 0) == (waiting, 0), "it ends when it need not wait any longer"


def test_a_file_is_not_taken_from_a_process_either(khod: Served, tmp_path: Path) -> None:
    """By an administrator, whom it would make wait as well."""
    with silent(khod, tmp_path, "") as (process, number):
        with pytest.raises(InvalidRequest, match=f"descriptor {number} of process {process.pid} is '.*theirs/guest'"):
            KernelProcesses().descriptor(process.pid, number)
        assert int(said(process, 1)[0]) == FLUSH, "it was taken, and somebody waits"


@contextmanager
def lingering() -> Iterator[int]:
    """A descriptor whose last close waits for somebody who does not read: of TCP, so that no privilege is needed."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        theirs = stack.enter_context(socket.create_connection(listener.getsockname()))
        peer = stack.enter_context(listener.accept()[0])
        theirs.setblocking(False)
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, LINGER))
        try:
            while True:
                theirs.send(bytes(1 << 16))
        except BlockingIOError:
            pass
        yield theirs.detach()
        peer.close()


def given(sock: socket.socket, data: bytes, fd: int, flags: int = 0) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", fd))], flags)


def left(sock: socket.socket, first: bytes, fd: int) -> None:
    """In the event loop, so that khod has read nothing when all of it is there."""
    sock.sendall(first)
    given(sock, REGISTER.encode() + b"\0", fd)
    os.close(fd)  # before khod closes its own, so that khod's is the last


@pytest.mark.parametrize("way", ["received", "left in the queue", "out of band"])
def test_a_socket_that_lingers_is_closed_by_another(khod: Served, way: str) -> None:
    with lingering() as fd, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(str(khod.path))
        if way == "out of band":
            given(sock, b" ", fd, socket.MSG_OOB)
            os.close(fd)
            sock.sendall(REGISTER.encode() + b"\0")
        else:
            first = b"[]\0" if way == "left in the queue" else b""  # at which khod hangs up
            khod.call(lambda: left(sock, first, fd))
        if way == "left in the queue":
            assert hung_up(sock)
        else:
            assert b"socket:[" in sock.recv(1 << 16)
        sock.close()
        for _ in range(3):
            assert answers(khod)
        khod.until(lambda: khod.server.connections == 0)
        assert khod.call(lambda: khod.server.porters.of(os.geteuid()).backlog), "it is closed there"
    khod.until(lambda: not khod.server.porters.of(os.geteuid()).backlog)


def test_who_has_a_full_queue_sends_nothing_before_he_is_let_in(khod: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(porters, "BACKLOG", 4)

    def at_once() -> bool:
        """In the event loop: nobody is let in meanwhile."""
        fd = os.memfd_create("x")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(str(khod.path))
            try:
                given(sock, b"{}\0", fd)
            except PermissionError:
                return False
            finally:
                os.close(fd)
            return True

    assert khod.call(at_once)
    with lingering() as fd:
        socks = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(4)]
        for sock in socks:
            sock.connect(str(khod.path))
            khod.call(lambda sock=sock: left(sock, b"[]\0", os.dup(fd)))  # type: ignore[misc]
        os.close(fd)
        khod.until(lambda: khod.server.porters.full(os.geteuid()))
        assert not khod.call(at_once)
        with connect(khod.path) as client:
            assert client.status().state == "idle", "root is let in"
        for sock in socks:
            sock.close()
    khod.until(lambda: not khod.server.porters.full(os.geteuid()))
    assert khod.call(at_once)


def test_a_socket_of_systemds_is_as_it_was_after_a_khod_that_ended_with_a_full_queue(tmp_path: Path) -> None:
    path = tmp_path / "khod.sock"
    theirs = listen(path)
    pass_descriptors(theirs, False)
    with served(path, listener=theirs) as khod:
        register(khod, "a")


def test_who_is_not_let_in_when_khod_ends_does_not_hold_it_up(khod: Served) -> None:
    with lingering() as fd, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:

        async def ends() -> None:
            sock.connect(str(khod.path))
            left(sock, b"", fd)
            await khod.server.aclose()

        khod.run(ends())
        assert len(khod.server.porters) == 1, "it is left behind, with what is not closed yet"


def test_a_user_has_one_porter_and_many_have_one_together(khod: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(porters, "MOST", 2)
    pids = [khod.call(lambda uid=uid: khod.server.porters.of(uid).pid) for uid in (1, 2, 3, 4, 1, os.geteuid())]  # type: ignore[misc]
    assert len(set(pids)) == 4
    assert pids[0] == pids[4]
    assert pids[2] == pids[3]
    assert len(khod.server.porters) == 4


def test_one_that_has_nothing_to_do_ends_and_another_comes(khod: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(porters, "IDLE", 0.01)
    register(khod, "a")
    khod.until(lambda: len(khod.server.porters) == 0)
    register(khod, "b")


def test_one_that_is_killed_costs_a_connection(khod: Served) -> None:
    register(khod, "a")
    pid = khod.call(lambda: khod.server.porters.of(os.geteuid()).pid)
    os.kill(pid, 9)
    khod.until(lambda: len(khod.server.porters) == 0)
    register(khod, "b")
