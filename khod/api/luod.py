# SPDX-License-Identifier: LGPL-2.1-or-later
"""A listener for clients of luo-agent, as far as its protocol is published (README of luo-agent, "Client Integration").

JSON objects, one a line. The client says ``{"cmd": "SUBSCRIBE", "id": ID}``, hears ``{"event": "START_PRESERVATION"}`` with a
kernel session beside it, preserves what it wants in that, stands still and says ``{"cmd": "READY"}``; in the new kernel it says
``{"cmd": "CLAIM", "id": ID}``, gets its session back, retrieves, and finishes it. Its instance is of the opaque grade
(decision 4).

What is not published, and is so here: a claim is answered by ``{"event": "CLAIMED", "id": ID}``; whatever cannot be done by
``{"event": "ERROR", "error": TEXT}`` (and ``"answer": "cold"`` or ``"hold"`` for a claim, decision 24); and whoever was told
to start hears ``{"event": "ABORT_PRESERVATION", "reason": TEXT}`` when the update was undone. READY is said once and counts for
preparing, quiesce and commit: it is a lease while the connection is open (decision 13).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from khod.api.audit import Audit
from khod.api.crowd import Crowd
from khod.api.descriptors import Bridge
from khod.api.door import Door
from khod.api.lines import Lines
from khod.api.listening import listen, pass_descriptors
from khod.api.meeting import meet
from khod.api.peers import Presence, Processes
from khod.api.porters import Porters
from khod.config import Limits, Rule
from khod.core.blocking import blocking
from khod.core.callers import Caller, Lifetime, Right
from khod.core.instances import NOBODY_YET
from khod.core.service import Service
from khod.core.views import InstanceView, LifecycleView
from khod.errors import InvalidRequest, KhodError, NotPermitted, Refused

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 1024
MAX_CONNECTIONS_PER_USER = 256


@contextlib.asynccontextmanager
async def serve(
    service: Service,
    files: Bridge,
    path: Path,
    listener: socket.socket | None = None,
    *,
    rules: Sequence[Rule] = (),
    limits: Limits | None = None,
    processes: Processes | None = None,
) -> AsyncIterator[Listener]:
    """Serve `service` to clients of luo-agent on the unix socket `path` for the length of the context; `listener` is what
    `khod.api.listening.listen` made there before, and is owned from here on; `processes` are those that are watched already."""
    server = Listener(service, files, listener or listen(path, everybody=bool(rules)), rules, limits or Limits(), processes)
    try:
        yield server
    finally:
        await server.aclose()
        path.unlink(missing_ok=True)  # noqa: ASYNC240 - of a file system in memory


class Listener:
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
        self._service, self._files, self._rules, self._limits = service, files, rules, limits
        self._loop = asyncio.get_running_loop()
        self._audit = Audit()
        self._processes = processes or Processes(self._loop)
        self._watched_by_others = processes is not None
        self._databases = ThreadPoolExecutor(max_workers=1, thread_name_prefix="khod-luod-peers")
        self._connections: set[asyncio.Task[None]] = set()
        # Nobody has a descriptor to send here, and whoever let go of one that came might wait for its sender.
        pass_descriptors(sock, False)
        self._porters = Porters()
        self._door = Door(
            sock, most=MAX_CONNECTIONS, most_per_user=MAX_CONNECTIONS_PER_USER, came=self._came, porters=self._porters
        )

    @property
    def connections(self) -> int:
        """How many are open."""
        return self._door.connections

    async def aclose(self) -> None:
        """Accept no more, and hang up on everybody. What hangs on connections and processes is not told: they have not
        ended."""
        self._door.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._porters.aclose()
        if not self._watched_by_others:
            self._processes.close()
        self._databases.shutdown(wait=False, cancel_futures=True)

    def _came(self, sock: socket.socket, crowd: Crowd) -> None:
        task = self._loop.create_task(self._serve(sock, crowd))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, sock: socket.socket, crowd: Crowd) -> None:
        try:
            lines = await Lines.over(sock)
            try:
                await self._meet(sock, lines, crowd)
            finally:
                await lines.aclose()
        except Exception:
            logger.exception("a client of luo-agent's protocol cannot be served")
        finally:
            self._door.leave(crowd)

    async def _meet(self, sock: socket.socket, lines: Lines, crowd: Crowd) -> None:
        """Find out who it is, and talk to him."""
        try:
            found = await meet(self._databases, sock, self._rules)
        except OSError as error:
            logger.info("a peer cannot be identified: %s", error)
            return
        process = self._processes.enter(found.peer)
        connection = Presence(self._loop)
        ended = True
        try:
            if found.refusal is not None:
                lines.send(_error(found.refusal))
                return
            caller = Caller(owner=found.owner, rights=found.granted, pid=found.peer.pid, connection=connection, process=process)
            talk = Conversation(self._service, self._files, caller, lines, self._audit, crowd)
            await talk.run(self._limits.idle)
        except asyncio.CancelledError:
            ended = False  # khod ends, which is not the client's end
            raise
        finally:
            if ended:
                connection.end()
            self._processes.leave(process)


_LEFT = ("opaque", "registered", Lifetime.CONNECTION, NOBODY_YET)
"""Grade, state, lifetime and keeper of an instance whose client has not come back yet."""


class Conversation:
    """One client, on one connection."""

    def __init__(self, service: Service, files: Bridge, caller: Caller, lines: Lines, audit: Audit, crowd: Crowd) -> None:
        self._service, self._files, self._caller, self._lines, self._audit = service, files, caller, lines, audit
        self._crowd = crowd
        self._name, self._handle = "", ""
        """What this connection subscribed to."""
        self._claimed: dict[str, str] = {}
        """Handles of what it claimed, by name."""
        self._finished: set[str] = set()
        """Those of them that khod was told to be done with."""
        self._asked = ""
        """The update that START_PRESERVATION was said for and READY not yet."""
        self._started = ""
        """The update that START_PRESERVATION was said for."""
        self._following: asyncio.Task[None] | None = None

    async def run(self, idle: float) -> None:
        """Until the client hangs up, says what makes no sense, or nothing for `idle` seconds while it has nothing here."""
        try:
            while (line := await self._next(idle)) is not None:
                try:
                    await self._command(_parsed(line))
                except KhodError as error:
                    self._lines.send(_error(error))
                    if isinstance(error, _Nonsense):
                        return
                    await self._crowd.refuse()
        finally:
            if self._following is not None:
                self._following.cancel()
                await asyncio.gather(self._following, return_exceptions=True)

    async def _next(self, idle: float) -> bytes | None:
        try:
            async with asyncio.timeout(None if self._handle or self._claimed else idle):
                return await anext(self._lines, None)
        except TimeoutError:
            return None

    async def _command(self, said: dict[str, Any]) -> None:
        command, name = said.get("cmd"), said.get("id")
        if command in ("SUBSCRIBE", "CLAIM") and not isinstance(name, str):
            raise InvalidRequest(f"{command} takes an id, a string")
        match command:
            case "SUBSCRIBE":
                await self._noted("SUBSCRIBE", str(name), self._subscribe(str(name)))
            case "READY":
                await self._noted("READY", self._name, self._ready())
            case "CLAIM":
                await self._noted("CLAIM", str(name), self._claim(str(name)))
            case _:
                raise InvalidRequest("there is no such cmd", hint="SUBSCRIBE, READY, CLAIM")

    async def _noted(self, command: str, name: str, doing: Coroutine[Any, Any, None]) -> None:
        """Do it, if this client may, and leave a line in the audit."""
        problem = "it was cut short"
        try:
            if not self._caller.may(Right.OPAQUE):
                doing.close()
                raise NotPermitted(f"{self._caller.owner} may not ask for kernel sessions")
            await doing
            problem = ""
        except KhodError as error:
            problem = error.message
            raise
        finally:
            self._audit.note(str(self._caller.owner), self._caller.pid, f"luod {command}", name, problem)

    async def _subscribe(self, name: str) -> None:
        if self._handle:
            raise Refused(f"this connection is subscribed as {self._name}", hint="one id a connection")
        if (handle := self._claimed.get(name, "")) != "":
            if handle not in self._finished:  # who is ready for the next jump is done with the last one
                await self._service.finished(self._caller, handle)
                self._finished.add(handle)
            views = await self._service.subscribe(self._caller, [handle])
        else:
            handle = await self._register(name)
            try:
                views = await self._service.subscribe(self._caller, [handle])
            except KhodError:
                await self._service.unregister(self._caller, handle=handle)
                raise
        self._name, self._handle = name, handle
        self._following = asyncio.create_task(self._follow(views))

    async def _register(self, name: str) -> str:
        """The handle of a new instance. One of that name that lost its client with an earlier khod makes room: he is here."""
        mine = await self._mine(name)
        if mine is not None and (mine.grade, mine.state, mine.lifetime, mine.keeper) == _LEFT:
            await self._service.unregister(self._caller, name)
        return (await self._service.register_opaque(self._caller, name, Lifetime.CONNECTION)).handle

    async def _mine(self, name: str) -> InstanceView | None:
        async with self._crowd.looking():
            instances = await self._service.instances()
        return next((i for i in instances if i.name == name and i.owner == str(self._caller.owner)), None)

    async def _follow(self, views: AsyncIterator[LifecycleView]) -> None:
        """What khod says, until it says no more; then the connection is of no use."""
        try:
            async for view in views:
                with contextlib.suppress(Refused):  # an answer that comes too late: the update is being undone
                    await self._hear(view)
        except KhodError as error:
            self._lines.send(_error(error))
        except Exception:
            logger.exception("a client of luo-agent's protocol cannot be served")
        finally:
            await views.aclose()  # type: ignore[attr-defined]
            self._lines.close()

    async def _hear(self, view: LifecycleView) -> None:
        match view.phase:
            case "preparing":
                await self._start(view.update)
            case "quiesce" | "commit":
                if self._started == view.update and not self._asked:
                    await self._service.ready(self._caller, view.update, view.phase, [self._handle])
            case "aborted":
                if self._started:
                    self._lines.send({"event": "ABORT_PRESERVATION", "reason": view.reason})
                self._started = self._asked = ""
            case _:
                return

    async def _start(self, update: str) -> None:
        session = await self._exported(await self._service.open_session(self._caller, self._handle))
        self._started = self._asked = update
        self._lines.send({"event": "START_PRESERVATION"}, session)

    async def _ready(self) -> None:
        if not self._asked:
            raise Refused("READY answers START_PRESERVATION, once")
        update, self._asked = self._asked, ""
        await self._service.ready(self._caller, update, "preparing", [self._handle])

    async def _claim(self, name: str) -> None:
        mine = await self._mine(name)
        if mine is not None and mine.grade != "opaque":
            # Before it is claimed: what is handed out and cannot be sent would be gone.
            raise Refused(f"{name} is no session that its client filled", hint="claim it over khod's own interface")
        view = await self._service.claim(self._caller, name, lifetime=Lifetime.CONNECTION)
        if view.answer != "fds":
            self._lines.send({"event": "ERROR", "id": name, "answer": view.answer, "error": view.reason})
            return
        (session,) = view.fds
        self._claimed[name] = view.handle
        self._lines.send({"event": "CLAIMED", "id": name}, await self._exported(session))

    async def _exported(self, session: int) -> int:
        """A descriptor of this process for one of the machine, which is consumed."""
        try:
            return await blocking(self._files.export, session)
        finally:
            await blocking(self._files.close, session)


class _Nonsense(InvalidRequest):
    """What was said is not even a command: nothing after it can be trusted to be one."""


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        raise _Nonsense("a line that is no JSON")
    if not isinstance(said, dict):
        raise _Nonsense("a line that is no JSON object")
    return said


def _error(error: KhodError) -> dict[str, Any]:
    return {"event": "ERROR", "error": str(error)}
