# SPDX-License-Identifier: LGPL-2.1-or-later
"""The listening side: who has come in, who that is, and his calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from asyncvarlink import VarlinkInterfaceRegistry
from asyncvarlink.serviceinterface import VarlinkServiceInterface

import khod
from khod.api.audit import Audit
from khod.api.connection import Calls, Connection, Shared
from khod.api.crowd import Crowd
from khod.api.descriptors import Bridge
from khod.api.door import Door
from khod.api.host import HostInterface
from khod.api.listening import listen, pass_descriptors
from khod.api.meeting import meet
from khod.api.peers import Processes
from khod.api.porters import Porters
from khod.api.stream import HangUps
from khod.config import Limits, Rule
from khod.core.callers import Caller
from khod.core.service import Service

logger = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def serve(
    service: Service,
    files: Bridge,
    path: Path,
    listener: socket.socket | None = None,
    *,
    rules: Sequence[Rule] = (),
    limits: Limits | None = None,
    stays: bool = False,
    processes: Processes | None = None,
) -> AsyncIterator[Server]:
    """Serve `service` on the unix socket `path` for the length of the context; `listener` is what `listen` made there before,
    and is owned from here on. `rules` are the policy's; `processes` those that are watched already, if any are.

    On the way out calls that are under way are cancelled, connections closed, and the socket removed unless it `stays`,
    since somebody else listens with it as well.
    Raises Refused when somebody else answers there, InvalidRequest and MachineError when it cannot be made.
    """
    server = Server(service, files, listener or listen(path, everybody=bool(rules)), rules, limits or Limits(), processes)
    try:
        yield server
    finally:
        await server.aclose()
        if not stays:
            path.unlink(missing_ok=True)  # noqa: ASYNC240 - of a file system in memory


class Server:
    """Accepts connections on `sock`, which it owns, until `aclose`. Make it inside a running loop."""

    def __init__(
        self,
        service: Service,
        files: Bridge,
        sock: socket.socket,
        rules: Sequence[Rule],
        limits: Limits,
        processes: Processes | None,
    ) -> None:
        self._service, self._files, self._rules = service, files, rules
        self._loop = asyncio.get_running_loop()
        pass_descriptors(sock, True)  # systemd's may be as an earlier khod has left it
        self._shared = Shared(limits, Calls(), HangUps(self._loop), Audit(), Porters(lambda on: self._door.strict(on)))
        self._connections: set[Connection] = set()
        self._processes = processes or Processes(self._loop)
        # Of its own: a database of users that does not answer must hold up nobody but those who connect.
        self._databases = ThreadPoolExecutor(max_workers=1, thread_name_prefix="khod-peers")
        self._meeting: set[asyncio.Task[None]] = set()
        self._closed = False
        self._door = Door(
            sock,
            most=limits.connections,
            most_per_user=limits.connections_per_user,
            came=self._came,
            porters=self._shared.porters,
        )

    @property
    def connections(self) -> int:
        """How many are open."""
        return self._door.connections

    @property
    def porters(self) -> Porters:
        """Those who take in what peers send."""
        return self._shared.porters

    async def aclose(self) -> None:
        """Accept no more, cancel the calls under way and wait for their end, close every connection. Again: no effect.

        What hangs on connections and processes is not told: they have not ended.
        """
        if self._closed:
            return
        self._closed = True
        self._door.close()
        for meeting in self._meeting:
            meeting.cancel()
        await asyncio.gather(*self._meeting, return_exceptions=True)
        await self._shared.calls.aclose()
        for connection in list(self._connections):
            connection.abandon()
        await self._shared.porters.aclose()
        self._processes.close()
        self._shared.hang_ups.close()
        self._databases.shutdown(wait=False, cancel_futures=True)

    def _came(self, sock: socket.socket, crowd: Crowd) -> None:
        connection = Connection(sock, self._shared, crowd, lambda ended: self._ended(ended, crowd))
        self._connections.add(connection)
        meeting = self._loop.create_task(self._meet(connection, sock))
        self._meeting.add(meeting)
        meeting.add_done_callback(self._meeting.discard)

    def _ended(self, connection: Connection, crowd: Crowd) -> None:
        self._connections.discard(connection)
        self._door.leave(crowd)
        if connection.process is not None:
            self._processes.leave(connection.process)

    async def _meet(self, connection: Connection, sock: socket.socket) -> None:
        """Find out who it is, and take its calls."""
        try:
            found = await meet(self._databases, sock, self._rules)
        except Exception as error:
            if not isinstance(error, OSError):
                logger.exception("a peer cannot be identified")
            connection.close(f"its peer cannot be identified: {error}")
            return
        peer = found.peer
        process = self._processes.enter(peer)
        if connection.over:
            self._processes.leave(process)
            return
        connection.process = process
        if found.refusal is not None:
            logger.warning("process %d: %s", peer.pid, found.refusal.message)
            connection.begin(VarlinkInterfaceRegistry(), None, found.refusal)
            return
        caller = Caller(owner=found.owner, rights=found.granted, pid=peer.pid, connection=connection.presence, process=process)
        registry = VarlinkInterfaceRegistry()
        registry.register_interface(HostInterface(self._service, self._files, caller))
        registry.register_interface(service_interface(registry))
        connection.begin(registry, caller)


def service_interface(registry: VarlinkInterfaceRegistry) -> VarlinkServiceInterface:
    """org.varlink.service: who answers, and what can be asked."""
    return VarlinkServiceInterface(vendor="khod", product="khod", version=khod.__version__, url="", registry=registry)
