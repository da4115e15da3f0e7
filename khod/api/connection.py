# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection: calls one after another, their answers, and what becomes of the descriptors that come and go.

asyncvarlink knows the protocol's types: what a call is, whether its parameters are what a method takes. The wire is
`khod.api.stream`'s, what a user's connections may cost together `khod.api.crowd`'s.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import msgspec
from asyncvarlink import (
    AnnotatedResult,
    FileDescriptor,
    FileDescriptorArray,
    VarlinkErrorReply,
    VarlinkInterfaceRegistry,
    VarlinkMethodCall,
    VarlinkMethodSignature,
)
from asyncvarlink.conversion import ConversionError, FileDescriptorVarlinkType
from asyncvarlink.serviceinterface import InvalidParameter

from khod.api.audit import Audit, shortened
from khod.api.crowd import DESCRIPTORS, Crowd
from khod.api.faults import fault, internal
from khod.api.peers import Presence, ProcessPresence
from khod.api.policy import RIGHTS, require
from khod.api.porters import KHOD_TAKES, Porters, let_go
from khod.api.stream import HangUps, Stream
from khod.api.wire import INTERFACE
from khod.config import Limits
from khod.core.callers import Caller, Right
from khod.errors import InvalidRequest, KhodError, Lost, NotPermitted

logger = logging.getLogger(__name__)

FAREWELL = 0.5
"""Seconds that a peer has to take the last answer when khod ends."""
MAX_VALUES = 8192
"""Values in one message: what a call is made of is looked at one by one, in the event loop."""

_ENDED = Lost("khod ended before it had answered", hint="its log says why")


class Calls:
    """The calls under way, of all connections: they outlive those."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self.ended = False

    def start(self, answer: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start one. Not after `aclose`: look at `ended`."""
        task = asyncio.create_task(answer)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def aclose(self) -> None:
        """Take no more, cancel those there are, and wait for them."""
        self.ended = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Shared:
    """What the connections of one server have in common."""

    limits: Limits
    calls: Calls
    hang_ups: HangUps
    audit: Audit
    porters: Porters


@dataclass(frozen=True, slots=True)
class _Call:
    """A call that makes sense."""

    name: str
    """Of the method; with its interface where that is not ours."""
    method: Callable[..., Any]
    signature: VarlinkMethodSignature
    parameters: dict[str, Any]
    oneway: bool


class Connection:
    """The connection on `sock`, which is owned. It reads nothing until `begin`; `ended` is called once, when it has ended."""

    def __init__(self, sock: socket.socket, shared: Shared, crowd: Crowd, ended: Callable[[Connection], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._shared, self._crowd, self._told = shared, crowd, ended
        self._stream = Stream(
            self._loop,
            sock,
            longest=shared.limits.message,
            slow=shared.limits.slow,
            porters=shared.porters,
            uid=crowd.uid,
            hang_ups=shared.hang_ups,
            received=self._received,
            ended=self._stream_ended,
        )
        shared.hang_ups.watch(sock, self._hung_up)
        self.presence = Presence(self._loop)
        self.process: ProcessPresence | None = None
        """The peer's, once it is known: whoever has set it lets it go."""
        self._registry = VarlinkInterfaceRegistry()
        self._caller: Caller | None = None
        self._refusal: KhodError | None = None
        self._call: asyncio.Task[None] | None = None
        self._following = False
        self._over = False
        self._said_all = False
        self._idle: asyncio.TimerHandle | None = None

    def begin(self, registry: VarlinkInterfaceRegistry, caller: Caller | None, refusal: KhodError | None = None) -> None:
        """Take calls: of `caller`, or else to answer each with `refusal`."""
        self._registry, self._caller, self._refusal = registry, caller, refusal
        self._next()

    @property
    def over(self) -> bool:
        """Whether it has ended."""
        return self._over

    # --- its life

    def _next(self) -> None:
        """Wait for the next call."""
        if self._over:
            return
        self._stream.resume()
        if self._idle is None:
            self._idle = self._loop.call_later(self._shared.limits.idle, self._is_idle)

    def _busy(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _is_idle(self) -> None:
        self._idle = None
        if self.presence.kept:  # to be there is what it is for
            self._next()
        else:
            self.close("nothing was asked for long")

    def _stream_ended(self, why: str) -> None:
        if why:
            self.close(why)
            return
        self._said_all = True
        if self._call is None:
            self.close()

    def _hung_up(self) -> None:
        """The peer is gone: a stream ends with it, another call under way goes on, for what it does is not the connection's."""
        if self._following and self._call is not None:
            self._call.cancel()
        elif self._call is None and not self._said_all:
            return  # it may have said something first: reading finds out
        self.close()

    def close(self, why: str = "") -> None:
        """End it, for a reason of khod's if there is one. What hangs on its presence is told, unless khod ends: who hears of
        that and hangs up has not ended, and has time to come back."""
        if self._over:
            return
        if why:
            who = self._caller.owner if self._caller else "a peer"
            logger.warning("the connection of %s was ended: %s", who, why)
        self.abandon()
        if not self._shared.calls.ended:
            self.presence.end()

    def abandon(self) -> None:
        """End it and tell nobody: khod ends, not the peer."""
        if self._over:
            return
        self._over = True
        self._busy()
        self._stream.close()
        self._told(self)

    # --- calls

    def _received(self, message: bytes, fds: list[int], refused: str) -> None:
        self._busy()
        array = FileDescriptorArray(self, fds)
        if self._shared.calls.ended:
            array.release(self)
            return
        if self._crowd.descriptors + len(fds) > DESCRIPTORS:
            array.release(self)
            self.close(f"more than {DESCRIPTORS} descriptors in calls that are not answered yet")
            return
        self._crowd.descriptors += len(fds)
        self._call = self._shared.calls.start(self._answer(message, array, refused))
        # Not in the task itself: of one that is cancelled before its first step nothing runs.
        self._call.add_done_callback(lambda _: self._answered(array))

    def _answered(self, fds: FileDescriptorArray) -> None:
        """Let go of what nobody took, and only then wait for the next call."""
        count, rest = len(fds), [descriptor.take() for descriptor in fds if descriptor]
        fds.release(self)

        def closed() -> None:
            self._crowd.descriptors -= count
            self._call = None
            if self._said_all:
                self.close()
            else:
                self._next()

        let_go(self._loop, [real for real in rest if isinstance(real, int)], closed)

    async def _answer(self, message: bytes, fds: FileDescriptorArray, refused: str) -> None:
        asked: dict[str, Any] | None = None
        call: _Call | None = None
        oneway = False
        try:
            async with self._crowd.turn():
                asked = _object(message)
                if asked is None:
                    self.close("a message that is no JSON object of a call's size")
                    return
                oneway = asked.get("oneway") is True
                if not oneway and self._stream.hung_up():
                    self.close()  # nobody is there to take the answer: a claim would be handed out to nobody
                    return
                call = self._understand(asked, fds, refused)
            await self._perform(call)
            if not call.signature.more:
                self._audit(call.name, call.parameters, "")
        except VarlinkErrorReply as error:
            await self._send_fault(error, oneway)
        except KhodError as error:
            await self._refuse(error, call, asked or {})
            await self._send_fault(fault(error), oneway)
        except asyncio.CancelledError:
            if call is not None and not self._over:
                self._audit(call.name, call.parameters, "khod ended first")
            if not self._over and not self._stream.torn:  # khod ends, and says so while somebody listens
                await asyncio.wait([asyncio.ensure_future(self._send_fault(fault(_ENDED), oneway))], timeout=FAREWELL)
        except Exception as error:
            name = call.name if call else "a call"
            logger.exception("%s failed", name)
            self._audit(name, call.parameters if call else {}, f"failed inside: {type(error).__name__}")
            await self._send_fault(internal(error), oneway)

    def _understand(self, asked: dict[str, Any], fds: FileDescriptorArray, refused: str) -> _Call:
        """Raises VarlinkErrorReply for what is no call, NotPermitted, and InvalidRequest for what came beside it."""
        try:
            call = VarlinkMethodCall.fromjson(asked)
        except (TypeError, ValueError):
            raise InvalidParameter(parameter="method")
        if call.upgrade:
            raise InvalidParameter(parameter="upgrade")
        if self._refusal is not None:
            raise self._refusal
        assert self._caller is not None
        name = call.method_name if call.method_interface == INTERFACE else call.method
        if name in RIGHTS:  # before anything of the call is looked at
            require(self._caller.owner, self._caller.rights, name)
        method, signature = self._registry.lookup_method(call)
        if name == call.method_name:
            require(self._caller.owner, self._caller.rights, name)
        if refused:
            raise InvalidRequest(refused, hint=f"khod takes {KHOD_TAKES}")
        try:
            parameters = signature.parameter_type.fromjson(call.parameters, {FileDescriptorVarlinkType: fds})
        except ConversionError as error:
            raise InvalidParameter(parameter=str(error.location[0]) if error.location else error.message)
        return _Call(name, method, signature, parameters, call.oneway)

    async def _perform(self, call: _Call) -> None:
        if RIGHTS.get(call.name) is Right.OBSERVE:
            async with self._crowd.answer():
                async with self._crowd.looking():
                    result = await call.method(**call.parameters)
                await self._send(result, call.oneway)
            return
        result = call.method(**call.parameters)
        if call.signature.more:
            await self._follow(call, result)
            return
        if inspect.isawaitable(result):
            result = await result
        self._learn(result.parameters)
        await self._send(result, call.oneway)

    async def _follow(self, call: _Call, results: AsyncGenerator[AnnotatedResult, None]) -> None:
        try:
            async for result in results:
                if not self._following:  # it is begun, and may well end by a jump
                    self._audit(call.name, call.parameters, "")
                # From here on a peer that is gone ends it.
                self._following = True
                if self._over or not await self._send(result):
                    return
        finally:
            self._following = False
            await results.aclose()

    async def _send(self, result: AnnotatedResult, oneway: bool = False) -> bool:
        """Whether the answer went out; its descriptors are closed in any case."""
        with FileDescriptorArray.new_managed() as fds:
            reply: dict[str, Any] = {"continues": True} if result.continues else {}
            if result.parameters:
                reply["parameters"] = result.parameters
            data = msgspec.json.encode(reply, enc_hook=lambda value: _index(fds, value))
            return not oneway and await self._put(data, [descriptor.fileno() for descriptor in fds])

    async def _send_fault(self, error: VarlinkErrorReply, oneway: bool) -> None:
        if not oneway:
            await self._put(msgspec.json.encode(error.tojson()), [])

    async def _put(self, data: bytes, fds: list[int]) -> bool:
        try:
            await self._stream.send(data + b"\0", fds)
        except TimeoutError:
            self.close("an answer was not read")
        except OSError:
            self.close()
        return not self._over

    # --- the log

    async def _refuse(self, error: KhodError, call: _Call | None, asked: dict[str, Any]) -> None:
        name = call.name if call else str(asked.get("method")).removeprefix(f"{INTERFACE}.")
        parameters = call.parameters if call else asked.get("parameters") or {}
        self._audit(shortened(name), parameters, f"{type(error).__name__}: {error.message}")
        if isinstance(error, NotPermitted):
            await self._crowd.refuse()

    def _audit(self, method: str, parameters: dict[str, Any], problem: str) -> None:
        if "." in method:  # of the interface that describes the others: nothing is changed by it
            return
        owner, pid = (str(self._caller.owner), self._caller.pid) if self._caller else ("nobody", 0)
        self._shared.audit.note(owner, pid, method, self._shared.audit.instances(parameters), shortened(problem))

    def _learn(self, answer: Any) -> None:
        for value in (answer, answer.get("claim")):
            handle, name = _field(value, "handle"), _field(_field(value, "instance"), "name")
            if handle and name:
                self._shared.audit.learn(handle, name)


def _field(value: Any, name: str) -> Any:
    return value.get(name) if isinstance(value, dict) else getattr(value, name, None)


def _index(fds: FileDescriptorArray, value: Any) -> int:
    """How a descriptor is written: as its place beside the message."""
    if not isinstance(value, FileDescriptor):
        raise NotImplementedError(type(value).__name__)  # what msgspec wants of a hook that does not know a type
    return fds.add(value)


def _object(message: bytes) -> dict[str, Any] | None:
    """The object that a message is; None when it is none, or of too many values to be a call of ours."""
    if message.count(b",") > MAX_VALUES:
        return None
    try:
        return msgspec.json.decode(message, type=dict[str, Any])
    except (ValueError, RecursionError):
        return None
