# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to khod that another thread can end."""

from __future__ import annotations

import contextlib
import select
import socket
from pathlib import Path

from khod.api.client import Client, dial


def open_line(path: Path, timeout: float | None) -> Line:
    """A connection to the khod at `path`. Raises Lost when nobody answers there, NotPermitted when it may not be used."""
    return Line(dial(path, timeout))


class Line(Client):
    """Not for two threads at once, but for `hang_up` and `patience`."""

    def hang_up(self) -> None:
        """End the connection at once, from any thread: a read under way there raises Lost."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def there(self) -> bool:
        """Whether khod has not hung up yet, as far as can be seen without asking."""
        looking = select.poll()
        looking.register(self._sock, select.POLLIN | select.POLLRDHUP)
        return not looking.poll(0)  # between two calls khod has nothing to say

    def patience(self, seconds: float | None) -> None:
        """How long each read waits from now on."""
        self._sock.settimeout(seconds)
