# SPDX-License-Identifier: LGPL-2.1-or-later
"""The listening side: a unix socket, who may connect, and an accept loop that outlives a full table of descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

from asyncvarlink import VarlinkInterfaceRegistry, VarlinkTransport
from asyncvarlink.serviceinterface import VarlinkServiceInterface

import khod
from khod.api.connection import Calls, Connection, boundaries
from khod.api.descriptors import Bridge
from khod.api.host import HostInterface
from khod.api.listening import listen
from khod.core.service import Service
from khod.errors import NotPermitted

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
ACCEPT_PAUSE = 0.25
"""Seconds until the next try when the system had no descriptor or memory for a connection; it waits in the backlog."""

_SHORT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
_ucred = struct.Struct("3i")  # struct ucred, linux/socket.h: pid, uid, gid


@contextlib.asynccontextmanager
async def serve(service: Service, files: Bridge, path: Path, listener: socket.socket | None = None) -> AsyncIterator[Server]:
    """Serve `service` on the unix socket `path` for the length of the context; `listener` is what `listen` made there before,
    and is owned from here on.

    On the way out calls that are under way are cancelled, connections closed, and the socket removed.
    Raises Refused when somebody else answers there, InvalidRequest and MachineError when it cannot be made.
    """
    server = Server(service, files, listener or listen(path))
    try:
        yield server
    finally:
        await server.aclose()
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - of a file system in memory


class Server:
    """Accepts connections on `sock`, which it owns, until `aclose`. Make it inside a running loop."""

    def __init__(self, service: Service, files: Bridge, sock: socket.socket) -> None:
        self._service = service
        self._files = files
        self._sock = sock
        self._loop = asyncio.get_running_loop()
        self._connections: set[VarlinkTransport] = set()
        self._calls = Calls()
        self._pause: asyncio.TimerHandle | None = None
        self._resume()

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    async def aclose(self) -> None:
        """Accept no more, cancel the calls under way and wait for their end, close every connection. Again: no effect."""
        if self._sock.fileno() < 0:
            return
        self._suspend()
        self._sock.close()
        await self._calls.aclose()
        transports = list(self._connections)
        for transport in transports:
            transport.abort()
        await asyncio.gather(*(transport.closed_future for transport in transports))

    def _resume(self) -> None:
        self._pause = None
        self._loop.add_reader(self._sock, self._accept)

    def _suspend(self) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        else:
            self._loop.remove_reader(self._sock)

    def _accept(self) -> None:
        try:
            peer, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in _SHORT_OF:
                logger.exception("accept failed")
            else:
                logger.warning("no connection can be accepted for want of descriptors or memory: %s", error)
            # The connection stays in the backlog and the socket readable: without a pause this would be a busy loop.
            self._suspend()
            self._pause = self._loop.call_later(ACCEPT_PAUSE, self._resume)
            return
        if len(self._connections) >= MAX_CONNECTIONS:
            logger.warning("connection refused: %d are open", len(self._connections))
            peer.close()
            return
        self._connect(peer)

    def _connect(self, peer: socket.socket) -> None:
        pid, uid, _ = _ucred.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _ucred.size))
        refusal = None
        if uid not in (0, os.geteuid()):
            logger.warning("process %d of user %d may not talk to khod", pid, uid)
            refusal = NotPermitted(f"khod does not talk to user {uid}", hint="only root may: try again with sudo")
        registry = VarlinkInterfaceRegistry()
        registry.register_interface(HostInterface(self._service, self._files, f"uid:{uid}"))
        registry.register_interface(service_interface(registry))
        connection = Connection(registry, peer, refusal, self._calls)
        transport = VarlinkTransport(self._loop, peer, peer, connection, boundary_predictor=boundaries)
        self._connections.add(transport)
        transport.closed_future.add_done_callback(lambda _: self._connections.discard(transport))


def service_interface(registry: VarlinkInterfaceRegistry) -> VarlinkServiceInterface:
    """org.varlink.service: who answers, and what can be asked."""
    return VarlinkServiceInterface(vendor="khod", product="khod", version=khod.__version__, url="", registry=registry)
