# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who asks khod for something: whose instances are whose, and what somebody may do.

The API finds out who a peer is and which rights the policy gives it, once a connection; the core compares owners.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, Self

from khod.errors import FormatError


class Right(StrEnum):
    """What the policy can let somebody do."""

    OBSERVE = "observe"
    """Look at everything, change nothing."""
    INSTANCES = "instances"
    """Register instances, answer for them, claim them: their own, and nobody else's."""
    OPAQUE = "opaque"
    """Ask for kernel sessions of their own, whose contents khod does not know."""
    OPERATE = "operate"
    """Load kernels, run updates, finish them, and register what outlives its process."""
    ADMINISTER = "administer"
    """Act on everybody's instances, hand out what is not verified, discard what came through."""


class Kind(StrEnum):
    """What an owner is."""

    USER = "user"
    UNIT = "unit"


@dataclass(frozen=True, slots=True, order=True)
class Owner:
    """To whom an instance belongs: recorded by kind and name, for numbers mean something else on the next kernel's disk."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """From what `str` made. Raises FormatError."""
        kind, _, name = text.partition(":")
        if kind not in [*Kind] or not name or not name.isprintable():
            raise FormatError(f"{text!r} is no owner", hint="user:NAME or unit:NAME")
        return cls(Kind(kind), name)


class Lifetime(StrEnum):
    """What keeps an instance registered (decision 5)."""

    CONNECTION = "connection"
    """The connection that registered or claimed it."""
    PROCESS = "process"
    """The process behind that connection."""
    PERSISTENT = "persistent"
    """Nothing but an operator ends it."""


class Presence(Protocol):
    """Something that is there until it is not: a connection, or a process."""

    @property
    def there(self) -> bool:
        """Whether it still is."""
        ...

    @property
    def since(self) -> int:
        """Of a process: when it began, in ticks of this boot, which tells it from a later one of its number; 0 otherwise."""
        ...

    def on_end(self, told: Callable[[], None]) -> None:
        """Call `told` in the event loop, once, when it ends; soon if it has ended already."""
        ...


class Always:
    """What has no end."""

    there = True
    since = 0

    def on_end(self, told: Callable[[], None]) -> None:
        """It never ends."""


class Ended:
    """What had an end that nobody saw: a client that did not come back."""

    there = False
    since = 0

    def on_end(self, told: Callable[[], None]) -> None:
        """It has ended already."""
        asyncio.get_running_loop().call_soon(told)


ALWAYS: Presence = Always()
ENDED: Presence = Ended()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Caller:
    """One peer, on one connection."""

    owner: Owner
    rights: frozenset[Right]
    pid: int
    """0 when it is not known."""
    connection: Presence
    process: Presence

    @classmethod
    def itself(cls) -> Self:
        """khod, where it acts by itself, or a program that is all there is on a machine."""
        root = Owner(Kind.USER, "root")
        return cls(owner=root, rights=frozenset(Right), pid=0, connection=ALWAYS, process=ALWAYS)

    def may(self, right: Right) -> bool:
        """Whether the policy lets it."""
        return right in self.rights

    def keeper(self, lifetime: Lifetime) -> Presence | None:
        """What an instance of that lifetime hangs on; None for nothing."""
        match lifetime:
            case Lifetime.CONNECTION:
                return self.connection
            case Lifetime.PROCESS:
                return self.process
            case Lifetime.PERSISTENT:
                return None
