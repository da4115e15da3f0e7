# SPDX-License-Identifier: LGPL-2.1-or-later
"""One connection: what a peer may cost us, whom we answer, and what becomes of the descriptors it sent.

asyncvarlink 0.3.3 leaves to its user, and this module does:

* a bound on the size of a message, of how many wait, and an end for bytes that are no JSON object (it raises out of the
  event loop's callback for some of them, and keeps the descriptors);
* descriptors of a message that takes more than one read (it closes them with the first part), and their close-on-exec flag;
* the descriptors' and the stream's fate when the peer is gone in the middle of an answer.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import socket
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from asyncvarlink import (
    AnnotatedResult,
    FileDescriptorArray,
    VarlinkErrorReply,
    VarlinkInterfaceRegistry,
    VarlinkMethodCall,
    VarlinkMethodReply,
    VarlinkMethodSignature,
    VarlinkServerProtocol,
)
from asyncvarlink.conversion import ConversionError, FileDescriptorVarlinkType
from asyncvarlink.protocol import varlink_boundaries
from asyncvarlink.serviceinterface import InvalidParameter
from asyncvarlink.types import JSONObject

from khod.api.faults import fault, internal
from khod.errors import KhodError, Lost

logger = logging.getLogger(__name__)

MAX_MESSAGE = 1 << 20
"""Bytes of one message, its NUL included."""
MAX_WAITING = 32
"""Calls that a peer may have sent ahead of their answers."""
FAREWELL = 0.5
"""Seconds that a peer has to take the last answer when khod ends."""

_ENDED = Lost("khod ended before it had answered", hint="its log says why")


def boundaries(peeked: bytes) -> list[int]:
    """Lengths of the reads to make of what was peeked at: none covers bytes of two messages, or bytes not seen yet.

    Descriptors arrive with the first byte of their message, so a read that stays inside one message says whose they are.
    """
    found = varlink_boundaries(peeked)
    return found or ([len(peeked)] if peeked else [])


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


class Connection(VarlinkServerProtocol):
    """The protocol of one connection. `refusal` is the answer to every call of a peer who may not talk to khod."""

    def __init__(
        self,
        registry: VarlinkInterfaceRegistry,
        sock: socket.socket,
        refusal: KhodError | None,
        calls: Calls,
    ) -> None:
        super().__init__()
        self._registry = registry
        self._sock = sock
        self._refusal = refusal
        self._part = bytearray()
        self._part_fds: FileDescriptorArray | None = None
        self._waiting = 0
        self._dropped = False
        self._said_all = False
        self._lost = False
        self._calls = calls

    # --- what comes in

    def message_received(self, data: bytes, fds: FileDescriptorArray | None) -> None:
        """Part of a message, or the whole. `fds` are released by the caller unless referenced here."""
        for descriptor in fds or ():
            os.set_inheritable(descriptor.fileno(), False)
        if self._dropped:
            return
        if fds is not None and self._part_fds is not None:
            self._drop("descriptors in two parts of one message")
            return
        if fds is not None:
            fds.reference(self)
            self._part_fds = fds
        self._part += data
        if len(self._part) > MAX_MESSAGE:
            self._drop(f"a message of more than {MAX_MESSAGE} bytes")
        elif data.endswith(b"\0"):
            self._message_complete()

    def _message_complete(self) -> None:
        message, fds = bytes(self._part), self._part_fds
        self._part.clear()
        self._part_fds = None
        try:
            if not _is_object(message):
                self._drop("a message that is no JSON object")
            elif self._waiting == MAX_WAITING:
                self._drop(f"more than {MAX_WAITING} calls ahead of their answers")
            else:
                self._waiting += 1
                super().message_received(message, fds)
        finally:
            if fds is not None:
                fds.release(self)

    def request_received(self, obj: JSONObject, fds: FileDescriptorArray | None) -> asyncio.Future[None] | None:
        """The next call's turn. Those of a peer that is gone are not begun: a claim would be handed out to nobody."""
        self._waiting -= 1
        if self._lost:
            return None
        pending: asyncio.Future[None] | None = super().request_received(obj, fds)
        self._end_when_idle()
        return pending

    def _drop(self, why: str) -> None:
        """End the connection and read no more of it."""
        logger.warning("connection dropped: %s", why)
        self._dropped = True
        self._forget_part()
        try:
            # The transport reads until nothing is left before it looks up: let nothing be left soon.
            self._sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("the peer was gone already")
        if self._transport is not None:
            self._transport.abort()

    def _forget_part(self) -> None:
        self._part.clear()
        if self._part_fds is not None:
            self._part_fds.release(self)
            self._part_fds = None

    def eof_received(self) -> None:
        """The peer has said all; what it asked for is still answered."""
        self._forget_part()
        self._said_all = True
        self._end_when_idle()

    def _end_when_idle(self) -> None:
        # The base class looks at the calls that were begun alone, and would hang up on those that wait.
        if self._said_all and not self._waiting:
            super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        """Calls under way go on: what they do is not the connection's."""
        self._lost = True
        self._forget_part()
        super().connection_lost(exc)

    # --- what goes out

    def call_received(self, call: VarlinkMethodCall, fds: FileDescriptorArray | None) -> asyncio.Future[None]:
        """Start answering a call. `fds` stay open until that is done, except those that the call has taken."""
        if self._refusal is not None:
            raise fault(self._refusal)
        if self._calls.ended:
            raise fault(_ENDED)
        method, signature = self._registry.lookup_method(call)
        try:
            parameters = signature.parameter_type.fromjson(call.parameters, {FileDescriptorVarlinkType: fds})
        except ConversionError as error:
            raise InvalidParameter(parameter=str(error.location[0]) if error.location else error.message)
        task = self._calls.start(self._answer(call, method, signature, parameters))
        # Not the task itself: asking a cancelled one for its exception raises, inside the base class.
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task.add_done_callback(lambda _: answered.set_result(None))
        if fds is not None:
            fds.reference_until_done(answered)
        return answered

    async def _answer(
        self, call: VarlinkMethodCall, method: Callable[..., Any], signature: VarlinkMethodSignature, parameters: dict[str, Any]
    ) -> None:
        try:
            result = method(**parameters)
            if signature.more:
                await self._stream(signature, result)
                return
            if inspect.isawaitable(result):
                result = await result
            await self._send(signature, result, discard=call.oneway)
        except VarlinkErrorReply as error:
            self._send_fault(call, error)
        except KhodError as error:
            self._send_fault(call, fault(error))
        except asyncio.CancelledError:
            # khod ends, and says so while somebody listens.
            if (sent := self._send_fault(call, fault(_ENDED))) is not None:
                await asyncio.wait([sent], timeout=FAREWELL)
        except Exception as error:
            logger.exception("%s failed", call.method)
            self._send_fault(call, internal(error))

    async def _stream(self, signature: VarlinkMethodSignature, results: AsyncGenerator[AnnotatedResult, None]) -> None:
        try:
            async for result in results:
                if not await self._send(signature, result):
                    return
        finally:
            await results.aclose()

    async def _send(self, signature: VarlinkMethodSignature, result: AnnotatedResult, discard: bool = False) -> bool:
        """Whether the answer went out; its descriptors are closed in any case."""
        with FileDescriptorArray.new_managed() as fds:
            values = signature.return_type.tojson(result.parameters, {FileDescriptorVarlinkType: fds})
            if discard:
                return False
            reply = VarlinkMethodReply(values, continues=result.continues)
            sent = self.send_reply(reply, [descriptor.fileno() for descriptor in fds], autoclose=False)
            fds.reference_until_done(sent)
        try:
            await asyncio.shield(sent)  # the transport owns the future, and breaks when somebody else cancels it
        except OSError:
            logger.debug("the peer did not wait for its answer")
            self._lost = True
            return False
        return True

    def _send_fault(self, call: VarlinkMethodCall, error: VarlinkErrorReply) -> asyncio.Future[None] | None:
        return None if call.oneway else self.send_error(error)


def _is_object(message: bytes) -> bool:
    """Whether a message, its NUL included, is JSON and an object: what the parser below is given must not fail."""
    try:
        return isinstance(json.loads(message[:-1]), dict)
    except (ValueError, RecursionError):
        return False
