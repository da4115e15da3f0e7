# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place where khod's errors become varlink errors; `khod.api.raising` makes khod's errors of them again.

Every class of `khod.errors` is an error of the interface by the same name. What crosses is what a person needs (message,
hint) and what a program does (the exit status, and a machine's errno); the class itself crosses as its name. A subclass that
is declared elsewhere crosses as the nearest of its ancestors here.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from asyncvarlink import TypedVarlinkErrorReply

from khod.api.raising import KINDS
from khod.api.wire import INTERFACE
from khod.errors import KhodError, MachineError


def _declare(kind: type[KhodError]) -> type[TypedVarlinkErrorReply]:
    crossing: dict[str, type] = {"message": str, "hint": str, "exit_status": int}
    if issubclass(kind, MachineError):
        crossing["errno"] = int
    body = {"__doc__": kind.__doc__, "Parameters": type("Parameters", (), {"__annotations__": crossing})}
    return types.new_class(kind.__name__, (TypedVarlinkErrorReply,), {"interface": INTERFACE}, lambda names: names.update(body))


FAULTS: Mapping[type[KhodError], type[TypedVarlinkErrorReply]] = {kind: _declare(kind) for kind in KINDS.values()}


def fault(error: KhodError) -> TypedVarlinkErrorReply:
    """The varlink error for one of ours."""
    kind = next(ancestor for ancestor in type(error).__mro__ if ancestor in FAULTS)
    crossing: dict[str, Any] = {"message": error.message, "hint": error.hint, "exit_status": error.exit_status}
    if isinstance(error, MachineError):
        crossing["errno"] = error.errno
    return FAULTS[kind](crossing)


def internal(what: BaseException) -> TypedVarlinkErrorReply:
    """The answer when khod itself is wrong: its log knows more than a caller should."""
    return fault(KhodError(f"khod failed inside: {type(what).__name__}", hint="this is a bug; khod's log has the traceback"))
