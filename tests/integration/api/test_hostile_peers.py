# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a peer may do to khod's socket, and what khod does to it."""

from __future__ import annotations

import array
import asyncio
import os
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from asyncvarlink import FileDescriptor

from khod.api import descriptors, door
from khod.api.client import Client, connect
from khod.api.connection import MAX_VALUES
from khod.config import Limits
from khod.errors import BadDescriptor, InvalidRequest, Lost, TooManyPreserved
from tests.integration.api.fake_service import FakeFiles
from tests.integration.api.served import Served

MAX_MESSAGE = Limits().message
STATUS = b'{"method":"org.khod.Host.GetStatus"}\0'


@contextmanager
def peer(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        yield sock


def pour(sock: socket.socket, data: bytes) -> None:
    """As much as the other side takes."""
    try:
        sock.sendall(data)
    except (BrokenPipeError, ConnectionResetError):
        return


def hung_up(sock: socket.socket) -> bool:
    try:
        return sock.recv(1 << 16) == b""
    except ConnectionResetError:
        return True


def khods_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.fixture(autouse=True)
def _porter(request: pytest.FixtureRequest) -> None:
    """The process that takes in what peers send is there before anything is counted: khod has a socket and a pidfd of it."""
    if "khod" in request.fixturenames:
        served = request.getfixturevalue("khod")
        served.call(lambda: served.server.porters.of(os.geteuid()))


def alive(khod: Served) -> bool:
    with connect(khod.path, timeout=10) as client:
        return client.status().state == "idle"


# --- bytes


@pytest.mark.parametrize(
    "message",
    [
        b"{" + b"x" * 100,
        b"[]",
        b'"text"',
        b"",
        b"\xff\xfe",
        b'{"a":' * 30_000,
        b'{"method":' + b"9" * 5000 + b"}",
        b'{"method":"\\ud800"}',
        b'{"method":NaN}',
        b'{"method":[' + b"0," * MAX_VALUES + b"0,0]}",
    ],
    ids=["torn", "array", "text", "empty", "not utf-8", "deep", "huge number", "half a surrogate", "nan", "many values"],
)
def test_what_is_no_object_ends_the_connection(khod: Served, message: bytes, caplog: pytest.LogCaptureFixture) -> None:
    fd = os.memfd_create("x")
    before = khods_fds()
    with peer(khod.path) as sock:
        socket.send_fds(sock, [message[:1] or b"\0"], [fd])
        pour(sock, message[1:] + b"\0")
        assert hung_up(sock)
    khod.until(lambda: khod.server.connections == 0)
    khod.until(lambda: khods_fds() == before)
    os.close(fd)
    assert "was ended: a message that is no JSON object" in caplog.text
    assert alive(khod)


@pytest.mark.parametrize("call", [b'{"method":5}\0', b'{"method":"x"}\0', b"{}\0"])
def test_an_object_that_is_no_call_is_answered(khod: Served, call: bytes) -> None:
    with peer(khod.path) as sock:
        sock.sendall(call + STATUS)
        answer = b""
        while b"idle" not in answer:
            answer += sock.recv(1 << 16)
    assert b"error" in answer.split(b"\0")[0]


def test_a_message_may_be_large_and_not_larger(khod: Served) -> None:
    space = MAX_MESSAGE - len(STATUS)
    with peer(khod.path) as sock:
        sock.sendall(STATUS[:-1] + b" " * space + b"\0")
        assert b"idle" in sock.recv(1 << 16)
    with peer(khod.path) as sock:
        pour(sock, STATUS[:-1] + b" " * (space + 1) + b"\0")
        assert hung_up(sock)


def test_a_message_without_end_costs_little(khod: Served) -> None:
    before = time.process_time()
    with peer(khod.path) as sock:
        pour(sock, b" " * (32 << 20))
        assert hung_up(sock)
    assert time.process_time() - before < 1.5
    assert alive(khod)


def test_calls_behind_one_that_takes_long_stay_in_the_socket(khod: Served) -> None:
    with connect(khod.path, timeout=10) as client:
        client.load("bzImage")
    with peer(khod.path) as sock:
        sock.sendall(b'{"method":"org.khod.Host.Update","more":true,"parameters":{"hold_at":"frozen"}}\0')
        khod.until(lambda: khod.service.waiting)
        sock.setblocking(False)
        sent = 0
        try:
            while sent < 16 << 20:
                sent += sock.send(STATUS * 1000)
        except BlockingIOError:
            pass
        assert sent < 16 << 20


# --- descriptors


def test_descriptors_of_half_a_message_are_closed(khod: Served) -> None:
    fd = os.memfd_create("x")
    before = khods_fds()
    with peer(khod.path) as sock:
        socket.send_fds(sock, [STATUS[:-5]], [fd] * 50)
        khod.until(lambda: khods_fds() >= before + 50)
    khod.until(lambda: khods_fds() == before)
    os.close(fd)


def test_descriptors_in_two_parts_of_a_message_end_the_connection(khod: Served) -> None:
    fd = os.memfd_create("x")
    before = khods_fds()
    with peer(khod.path) as sock:
        socket.send_fds(sock, [STATUS[:5]], [fd])
        khod.until(lambda: khods_fds() > before + 1)
        socket.send_fds(sock, [STATUS[5:]], [fd])
        assert hung_up(sock)
    khod.until(lambda: khods_fds() == before)
    os.close(fd)


def test_more_descriptors_than_the_kernel_passes(client: Client) -> None:
    fd = os.memfd_create("x")
    with pytest.raises(Lost, match="the connection to khod ended"):
        client.register("vm1", "guestmemfd", [(str(number), fd) for number in range(254)])
    os.close(fd)


def test_an_answer_that_nobody_takes_leaves_nothing_open(khod: Served, client: Client) -> None:
    fd = os.memfd_create("x")
    client.register("vm1", "guestmemfd", [("ram", fd)])
    os.close(fd)
    before = khods_fds()
    claims = b'{"method":"org.khod.Host.Claim","parameters":{"name":"vm1"}}\0' * 20
    for _ in range(5):
        with peer(khod.path) as sock:
            sock.sendall(claims)
    khod.until(lambda: khod.server.connections == 1)
    khod.until(lambda: khods_fds() == before)


def test_no_call_of_a_peer_that_is_gone_is_begun(khod: Served, client: Client) -> None:
    client.load("first.bzImage")
    with peer(khod.path) as sock:
        sock.sendall(
            b'{"method":"org.khod.Host.Update","more":true,"parameters":{"hold_at":"frozen"}}\0'
            b'{"method":"org.khod.Host.Load","parameters":{"kernel":"second.bzImage"}}\0'
        )
        khod.until(lambda: khod.service.waiting)
    client.proceed()
    khod.until(lambda: khod.server.connections == 1)
    image = client.status().image
    assert image is not None and image.kernel == "first.bzImage"


def test_descriptors_of_a_call_that_is_never_begun_are_closed(khod: Served, client: Client) -> None:
    fd = os.memfd_create("x")
    before = khods_fds()

    async def ends_at_once() -> None:
        (connection,) = khod.server._connections
        connection._received(STATUS[:-1], [os.dup(fd)], "")
        await khod.server.aclose()

    client.status()
    khod.run(ends_at_once())
    khod.until(lambda: khods_fds() < before)
    os.close(fd)


def test_descriptors_that_cannot_be_taken_are_closed() -> None:
    class Full(FakeFiles):
        def adopt(self, real: int) -> int:
            if len(self.table) == 1:
                os.close(real)
                raise TooManyPreserved("the table is full")
            return super().adopt(real)

    files = Full()
    before = khods_fds()
    received = [(str(number), FileDescriptor(os.memfd_create("x"), should_close=True)) for number in range(4)]
    with pytest.raises(TooManyPreserved):
        asyncio.run(descriptors.adopt(files, received))
    assert khods_fds() == before
    assert files.table == {}


def test_descriptors_that_cannot_be_sent_are_closed() -> None:
    class Full(FakeFiles):
        def export(self, fd: int) -> int:
            if len(self.table) == 2:
                raise BadDescriptor("the table is full")
            return super().export(fd)

    files = Full()
    before = khods_fds()
    given = [files.adopt(os.memfd_create("x")) for _ in range(4)]
    with pytest.raises(BadDescriptor):
        asyncio.run(descriptors.export(files, given))
    assert khods_fds() == before
    assert files.table == {}


def test_calls_sent_by_a_peer_that_hung_up_decently_are_all_done(khod: Served, client: Client) -> None:
    client.load("bzImage")
    with peer(khod.path) as sock:
        sock.sendall(b'{"method":"org.khod.Host.Load","parameters":{"kernel":"%d.bzImage"},"oneway":true}\0' % 1)
        sock.sendall(STATUS * 5 + b'{"method":"org.khod.Host.Load","parameters":{"kernel":"last.bzImage"}}\0')
        sock.shutdown(socket.SHUT_WR)
        answers = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    assert answers.count(b"\0") == 6
    assert client.status().image is not None
    assert khod.service.image is not None and khod.service.image.kernel == "last.bzImage"


# --- connections


def test_a_full_table_of_descriptors_passes(khod: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """accept(2) fails with EMFILE; whoever waits is let in when there is room again."""
    monkeypatch.setattr(door, "PAUSE", 0.01)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(10)
    complaints: list[str] = []
    monkeypatch.setattr(door.logger, "warning", lambda message, *_: complaints.append(message))
    khod.call(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (sock.fileno() + 1, hard)))
    filled: list[int] = []
    try:
        try:
            while True:
                filled.append(os.dup(sock.fileno()))
        except OSError:
            pass
        sock.connect(str(khod.path))
        khod.until(lambda: len(complaints) >= 3)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        for fd in filled:
            os.close(fd)
    sock.sendall(STATUS)
    assert b"idle" in sock.recv(1 << 16)
    sock.close()


def test_truncated_descriptors_are_noticed(khod: Served, client: Client) -> None:
    """An index beyond what arrived is the caller's error, not khod's."""
    fd = os.memfd_create("x")
    client._sock.sendmsg(
        [b'{"method":"org.khod.Host.Register","parameters":{"name":"a","driver":"guestmemfd","fds":[{"name":"x","fd":1}]}}\0'],
        [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))],
    )
    os.close(fd)
    with pytest.raises(InvalidRequest), client._answer():
        pass
