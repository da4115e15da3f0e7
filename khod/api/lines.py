# SPDX-License-Identifier: LGPL-2.1-or-later
"""A unix socket on which both sides say JSON objects, one a line, and we may send a descriptor beside one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
from collections.abc import Mapping
from typing import Self

logger = logging.getLogger(__name__)

MAX_LINE = 4096
"""Bytes of one line that is read."""


class Lines:
    """The lines that come in, as an asynchronous iterator; `send` for those that go out.

    It is read without room for control messages: a descriptor that a peer sends does not enter our table (unix(7)). He cannot
    send any on sockets that `khod.api.listening.pass_descriptors` keeps from it.
    """

    def __init__(self, sock: socket.socket, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._sock, self._reader, self._writer = sock, reader, writer

    @classmethod
    async def over(cls, sock: socket.socket) -> Self:
        """On a connected socket, which is consumed."""
        try:
            reader, writer = await asyncio.open_unix_connection(sock=sock, limit=MAX_LINE)
        except BaseException:
            sock.close()
            raise
        return cls(sock, reader, writer)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        """The next line, without its end. The iterator ends with the connection, and with a line that is too long."""
        try:
            return (await self._reader.readuntil(b"\n"))[:-1]
        except asyncio.LimitOverrunError:
            self.send({"event": "ERROR", "error": f"a line of more than {MAX_LINE} bytes"})
        except (asyncio.IncompleteReadError, OSError):
            pass
        raise StopAsyncIteration

    def send(self, message: Mapping[str, object], fd: int = -1) -> None:
        """Send a message, and a descriptor, which is consumed. A peer who does not read is hung up on: what is sent here is
        less than a socket holds by far."""
        data = json.dumps(message).encode() + b"\n"
        try:
            if self._writer.is_closing():
                return
            # Nothing else writes here: a message goes as a whole, or not at all.
            sent = socket.send_fds(self._sock, [data], [fd]) if fd >= 0 else self._sock.send(data)
            if sent < len(data):
                raise BlockingIOError
        except OSError as error:
            logger.info("a peer cannot be told %s: %s", message.get("event"), error)
            self.close()
        finally:
            if fd >= 0:
                os.close(fd)

    def close(self) -> None:
        """Begin to hang up. Again: no effect."""
        self._writer.close()

    async def aclose(self) -> None:
        """Hang up."""
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()
