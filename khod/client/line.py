# SPDX-License-Identifier: LGPL-2.1-or-later
"""A connection to khod, with the calls of those who answer for instances."""

from __future__ import annotations

import contextlib
import select
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from khod.api.client import Client, dial
from khod.errors import FormatError


class Sent(msgspec.Struct):
    """A descriptor beside a message: `fd` is its index there."""

    name: str
    fd: int


class Claim(msgspec.Struct):
    """The answer to a claim, its descriptors by index."""

    answer: str
    reason: str
    fds: list[Sent]
    states: list[str] = []
    handle: str = ""


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

    def enlist(self, parameters: Mapping[str, Any], fds: Sequence[tuple[str, int]]) -> str:
        """Register; `fds` are the caller's and stay so. The handle."""
        named = [{"name": name, "fd": index} for index, (name, _) in enumerate(fds)]
        answer = self._ask("Register", {**parameters, "fds": named}, [fd for _, fd in fds])
        return _text(answer, "handle")

    def enlist_opaque(self, name: str, lifetime: str) -> str:
        """Register an instance whose session the caller fills. The handle."""
        return _text(self._ask("RegisterOpaque", {"name": name, "lifetime": lifetime}), "handle")

    def leave(self, handle: str) -> None:
        """Unregister."""
        self._ask("Unregister", {"handle": handle})

    def claimed(self, name: str, owner: str, lifetime: str, unverified: bool) -> tuple[Claim, dict[str, int]]:
        """The answer to a claim, and its descriptors by name, owned by the caller."""
        parameters = {"name": name, "owner": owner, "lifetime": lifetime, "unverified": unverified}
        self._send("Claim", parameters)
        with self._answer() as (given, fds, _):
            claim = _converted(given.get("claim"), Claim)
            return claim, _named(claim.fds, fds)


def _named(sent: Sequence[Sent], fds: list[int]) -> dict[str, int]:
    """Descriptors by name, taken out of `fds`. Raises FormatError, and takes none, when names and descriptors do not match."""
    if sorted(entry.fd for entry in sent) != list(range(len(fds))) or len({entry.name for entry in sent}) != len(fds):
        raise FormatError(f"khod's answer names {len(sent)} descriptors and brings {len(fds)}")
    found = {entry.name: fds[entry.fd] for entry in sent}
    fds.clear()
    return found


def _converted(value: object, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise FormatError(f"khod's answer is not what it must be: {error}")


def _text(answer: Mapping[str, Any], name: str) -> str:
    return str(_converted(answer.get(name), str))
