# SPDX-License-Identifier: LGPL-2.1-or-later
"""The way from a process to a kernel in another one: messages over a unix socket in the machine's directory.

A message is two lengths, JSON, and one block of bytes; bytes and descriptors inside the JSON are references to the block and
to the descriptors that travel with the message. One connection is one process: when it breaks, that process is dead.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from khod.errors import Lost
from khod.simulated.faults import OpenFailed, ProcessDied
from khod.simulated.layout import SOCKET
from khod.simulated.process import Process, RealFd

_HEAD = struct.Struct("<IQ")
_MAX_FDS = 4
Message = dict[str, Any]


@contextmanager
def socket_address(directory: Path) -> Iterator[str]:
    """An address of the kernel's socket that is short enough for sun_path, however deep the directory lies."""
    fd = os.open(directory, os.O_PATH | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{fd}/{SOCKET}"
    finally:
        os.close(fd)


def send(sock: socket.socket, message: Message) -> None:
    """Send a message; the descriptors in it stay the caller's."""
    blocks: list[bytes] = []
    fds: list[int] = []
    text = json.dumps(_pack(message, blocks, fds)).encode()
    body = b"".join(blocks)
    head = _HEAD.pack(len(text), len(body)) + text
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sent = sock.sendmsg([head], rights)
    sock.sendall(head[sent:])
    sock.sendall(body)


def receive(sock: socket.socket) -> Message | None:
    """The next message, or None at the end; the descriptors in it are the caller's, as plain numbers."""
    head = bytearray(_HEAD.size)
    size, ancillary, _, _ = sock.recvmsg_into([head], socket.CMSG_SPACE(4 * _MAX_FDS), socket.MSG_CMSG_CLOEXEC)
    if size == 0:
        return None
    fds = [fd for _, _, raw in ancillary for fd in array.array("i", raw[: len(raw) // 4 * 4])]
    _fill(sock, memoryview(head)[size:])
    text_size, body_size = _HEAD.unpack(head)
    text, body = bytearray(text_size), bytearray(body_size)
    _fill(sock, memoryview(text))
    _fill(sock, memoryview(body))
    unpacked = _unpack(json.loads(text), bytes(body), fds)
    assert isinstance(unpacked, dict)
    return unpacked


def _fill(sock: socket.socket, view: memoryview) -> None:
    while view:
        size = sock.recv_into(view)
        if size == 0:
            raise EOFError("the peer is gone in the middle of a message")
        view = view[size:]


def _pack(value: Any, blocks: list[bytes], fds: list[int]) -> Any:
    match value:
        case bytes() | bytearray() | memoryview():
            start = sum(map(len, blocks))
            blocks.append(bytes(value))
            return {"bytes": [start, len(value)]}
        case RealFd(fd=fd):
            fds.append(fd)
            return {"fd": len(fds) - 1}
        case list() | tuple():
            return [_pack(item, blocks, fds) for item in value]
        case dict():
            return {"map": {key: _pack(item, blocks, fds) for key, item in value.items()}}
    return value


def _unpack(value: Any, body: bytes, fds: list[int]) -> Any:
    match value:
        case {"bytes": [start, length]}:
            return body[start : start + length]
        case {"fd": index}:
            return fds[index]
        case {"map": dict() as items}:
            return {key: _unpack(item, body, fds) for key, item in items.items()}
        case list():
            return [_unpack(item, body, fds) for item in value]
    return value


class Connection:
    """A `khod.simulated.process.Transport` over a socket."""

    def __init__(self, directory: Path, name: str, *, mortal: bool) -> None:
        self._mortal = mortal
        self._lock = threading.Lock()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with socket_address(directory) as address:
                self._socket.connect(address)
        except OSError as error:
            self._socket.close()
            raise Lost(f"no kernel runs in {directory}: {error}", hint=f"python -m khod.simulated {directory}")
        self.pid = int(self.call("hello", name))

    def call(self, name: str, *args: Any) -> Any:
        """Make a call, and wait for its answer."""
        with self._lock:
            try:
                send(self._socket, {"call": name, "args": list(args)})
                answer = receive(self._socket)
            except (OSError, EOFError):
                answer = None
        if answer is None:
            self._die("the kernel is gone")
        match answer:
            case {"died": text}:
                self._die(text)
            case {"errno": number, "text": text, "opening": opening}:
                raise (OpenFailed if opening else OSError)(number, text)
            case {"wrong": text}:
                raise ValueError(text)
        return answer["result"]

    def _die(self, why: str) -> NoReturn:
        """Do as a killed process does: nothing more, no ``finally:``, no farewell to other sockets."""
        if self._mortal:
            os.kill(os.getpid(), signal.SIGKILL)
        raise ProcessDied(why)

    def end(self) -> None:
        """Leave the machine."""
        self._socket.close()


def connect(directory: Path | str, name: str, *, mortal: bool = True) -> Process:
    """Become a process of the machine whose kernel runs in `directory`.

    `mortal`: when the process dies there, this one is killed with it; else `ProcessDied` is raised, for programs that play
    several processes. Raises Lost when no kernel runs there.
    """
    return Process(Connection(Path(directory), name, mortal=mortal), name)
