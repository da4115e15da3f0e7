# SPDX-License-Identifier: LGPL-2.1-or-later
"""The custodian's socket, and whoever comes to it with something else than a request."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from khod.custodian import protocol
from khod.custodian.server import CLIENTS
from khod.kernel.custody import KernelCustody
from tests.unit.custodian.conftest import Memfd
from tests.unit.custodian.pid1 import kill_both, links


@pytest.fixture
def held(custody: KernelCustody, memfd: Memfd) -> Iterator[KernelCustody]:
    """A custodian that holds something, and still does in the end."""
    custody.keep("ram", memfd(b"ram"))
    yield custody
    assert list(custody.kept()) == ["ram"]


def connect(path: Path) -> socket.socket:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    channel.settimeout(20)
    channel.connect(str(path))
    return channel


GARBAGE = [
    b"\0",
    b"GET / HTTP/1.1\r\n\r\n",
    b"khc1",
    b"khc0" + bytes(20),
    protocol.request(protocol.ROOM)[:-1],
    protocol.request(99),
    protocol.request(0),
    struct.pack("=4sHHQQ", b"khc1", protocol.ROOM, 1, 0, 0),
    protocol.request(protocol.KEEP, b"a"),  # without its descriptor
    protocol.request(protocol.RETRIEVE_FD),
    bytes(protocol.MAX_PACKET + 1),
    protocol.request(protocol.ROOM) + bytes(100_000),
]


@pytest.mark.parametrize("packet", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_is_answered_once_and_the_connection_closed(held: KernelCustody, socket_path: Path, packet: bytes) -> None:
    with connect(socket_path) as channel:
        channel.send(packet)
        status, _, words = protocol.read_answer(channel.recv(4096))
        assert status == protocol.INVALID
        assert words
        with suppress(ConnectionResetError):
            assert channel.recv(4096) == b""


@pytest.mark.parametrize("operation", range(1, 14))
def test_descriptors_where_none_is_meant_are_closed(
    held: KernelCustody, socket_path: Path, memfd: Memfd, operation: int
) -> None:
    before = links(socket_path)
    with connect(socket_path) as channel:
        socket.send_fds(channel, [protocol.request(operation, b"x")], [memfd(b"1"), memfd(b"2")])
        status, _, _ = protocol.read_answer(channel.recv(4096))
        assert status < 0
    assert links(socket_path) == before


def test_more_descriptors_than_a_request_may_have(held: KernelCustody, socket_path: Path, memfd: Memfd) -> None:
    before = links(socket_path)
    fd = memfd(b"")
    with connect(socket_path) as channel:
        socket.send_fds(channel, [protocol.request(protocol.OFFER)], [fd] * 253)
        status, _, words = protocol.read_answer(channel.recv(4096))
    assert (status, b"128" in words) == (protocol.FULL, True)
    assert links(socket_path) == before


def test_one_who_does_not_read_is_dropped_and_keeps_nobody_waiting(held: KernelCustody, socket_path: Path) -> None:
    with connect(socket_path) as channel:
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            while True:
                channel.send(protocol.request(protocol.KEPT))
        held.room()


def test_one_who_says_nothing_and_one_who_says_half(held: KernelCustody, socket_path: Path) -> None:
    with connect(socket_path), connect(socket_path):
        held.room()


def test_too_many_connections(held: KernelCustody, socket_path: Path) -> None:
    with ExitStack() as stack:
        channels = [stack.enter_context(connect(socket_path)) for _ in range(CLIENTS)]
        for channel in channels:
            channel.send(protocol.request(protocol.ROOM))
            assert protocol.read_answer(channel.recv(64))[0] == protocol.DONE
        with connect(socket_path) as one_more, suppress(ConnectionResetError, BrokenPipeError):
            one_more.send(protocol.request(protocol.ROOM))
            assert one_more.recv(64) == b""
        channels[0].send(protocol.request(protocol.ROOM))
        assert protocol.read_answer(channels[0].recv(64))[0] == protocol.DONE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be somebody else")
def test_another_user_is_not_served() -> None:
    code = """
import os, socket, sys
os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
channel = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    channel.connect(sys.argv[1])
    channel.send(bytes.fromhex(sys.argv[2]))
    print(channel.recv(64))
except OSError as error:
    print(type(error).__name__)
"""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory).chmod(0o755)
        path = Path(directory) / "custodian.sock"
        custody = KernelCustody(str(path), start=True)
        command = [sys.executable, "-I", "-S", "-c", code, str(path), protocol.request(protocol.ROOM).hex()]
        custody.room()
        try:
            assert path.stat().st_mode & 0o777 == 0o600
            assert _said(command) == "PermissionError"
            path.chmod(0o666)
            assert _said(command) in ("b''", "ConnectionResetError", "BrokenPipeError")
        finally:
            kill_both(path)
            os.waitpid(custody._child, 0)


def _said(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
