# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where those come in who connect: so many in all and of one user, past a full table of descriptors."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket
from collections.abc import Callable

from khod.api import peers
from khod.api.crowd import Crowd
from khod.api.listening import pass_descriptors
from khod.api.porters import Porters

logger = logging.getLogger(__name__)

PAUSE = 0.25
"""Seconds until the next try when the system had no descriptor or memory for a connection; it waits in the backlog."""
SHORT_OF = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What accept(2) says then."""


class Door:
    """Accepts on `sock`, which does not block and is owned, until `close`. `came` is given each connection, as its own, and the
    crowd of its user; a `leave` belongs to it. Root and khod's own user are counted and not refused. `porters` close what is
    refused."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        most: int,
        most_per_user: int,
        came: Callable[[socket.socket, Crowd], None],
        porters: Porters,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._sock, self._most, self._most_per_user, self._came = sock, most, most_per_user, came
        self._porters = porters
        self._strict = False
        self._crowds: dict[int, Crowd] = {}
        self._pause: asyncio.TimerHandle | None = None
        self.connections = 0
        """How many are open."""
        self._resume()

    def leave(self, crowd: Crowd) -> None:
        """A connection of that user has ended."""
        self.connections -= 1
        crowd.connections -= 1
        if not crowd.connections:
            del self._crowds[crowd.uid]

    def strict(self, on: bool) -> None:
        """Whether descriptors can be sent only from the moment on that a connection is let in: then one that is refused has
        none in its queue, which somebody would have to close."""
        self._strict = on
        if self._sock.fileno() >= 0:
            pass_descriptors(self._sock, not on)

    def close(self) -> None:
        """Accept no more. Again: no effect."""
        if self._sock.fileno() >= 0:
            self._suspend()
            # Who has connected and was not let in may have sent something, and goes with the socket where that is ours alone.
            self._porters.close_listener(self._sock)

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
            sock, _ = self._sock.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            if error.errno not in SHORT_OF:
                logger.exception("accept failed")
            else:
                logger.warning("no connection can be accepted for want of descriptors or memory: %s", error)
            # The connection stays in the backlog and the socket readable: without a pause this would be a busy loop.
            self._suspend()
            self._pause = self._loop.call_later(PAUSE, self._resume)
            return
        # Else a byte out of band would be read past, and what came beside it let go of, without a word (net/unix/af_unix.c).
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_OOBINLINE, 1)
        uid = peers.credentials(sock).uid
        crowd = self._crowds.get(uid) or Crowd(uid)
        full = self.connections >= self._most or crowd.connections >= self._most_per_user or self._porters.full(uid)
        if full and uid not in (0, os.geteuid()):
            logger.warning(
                "a connection of user %d was refused: %d of its are open, %d in all", uid, crowd.connections, self.connections
            )
            self._porters.hang_up(uid, sock)
            return
        if self._strict:
            pass_descriptors(sock, True)
        self._crowds[uid] = crowd
        crowd.connections += 1
        self.connections += 1
        self._came(sock, crowd)
