# SPDX-License-Identifier: LGPL-2.1-or-later
"""A line in the log for every change that somebody asked for, done or refused: who, what, and what became of it.

Under systemd it has fields to search for: ``journalctl KHOD_OWNER=user:alice``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

from khod.api.policy import RIGHTS
from khod.core.callers import Right

logger = logging.getLogger("khod.audit")

KNOWN_HANDLES = 65536
_LONGEST = 128


class Audit:
    """The log of one server. It knows the names behind handles, which are secrets and are not written down."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}

    def learn(self, handle: str, name: str) -> None:
        """The handle of an instance. The oldest are forgotten."""
        self._names[handle] = name
        if len(self._names) > KNOWN_HANDLES:
            del self._names[next(iter(self._names))]

    def instances(self, parameters: Mapping[str, object]) -> str:
        """Which instances a call is about, as far as can be known."""
        handles = parameters.get("handles") or [parameters.get("handle")]
        named = [parameters.get("name"), *(self._names.get(str(h)) for h in (handles if isinstance(handles, Iterable) else ()))]
        return shortened(", ".join(name for name in named if isinstance(name, str)))

    def note(self, owner: str, pid: int, method: str, instances: str, problem: str) -> None:
        """One call and its end. `problem`: '' when it was done."""
        if RIGHTS.get(method) is Right.OBSERVE:
            return
        fields = {
            "KHOD_OWNER": owner,
            "KHOD_PID": str(pid),
            "KHOD_METHOD": method,
            "KHOD_RESULT": problem or "done",
            "KHOD_INSTANCE": instances,
        }
        level = logging.WARNING if problem else logging.INFO
        about = f" {instances}" if instances else ""
        logger.log(level, "%s [%d]: %s%s: %s", owner, pid, method, about, problem or "done", extra=fields)


def shortened(text: str) -> str:
    """Something that a peer made up, fit to be logged: printable, and of bounded length."""
    shown = text if text.isprintable() else ascii(text)
    return shown if len(shown) <= _LONGEST else shown[:_LONGEST] + "…"
