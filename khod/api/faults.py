# SPDX-License-Identifier: LGPL-2.1-or-later
"""The one place where khod's errors become varlink errors, and become khod's errors again.

Every class of `khod.errors` is an error of the interface by the same name. What crosses is what a person needs (message,
hint) and what a program does (the exit status, and a machine's errno); the class itself crosses as its name. A subclass that
is declared elsewhere crosses as the nearest of its ancestors here.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

from asyncvarlink import TypedVarlinkErrorReply

from khod import errors
from khod.api.wire import INTERFACE
from khod.errors import FormatError, InvalidRequest, KhodError, MachineError, NotPermitted

KINDS: Mapping[str, type[KhodError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, KhodError)
}


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


def error_of(name: str, parameters: Mapping[str, Any]) -> KhodError:
    """The exception for a varlink error: of the class that was raised over there."""
    prefix, _, kind_name = name.rpartition(".")
    if prefix == "org.varlink.service":
        return _of_service(kind_name, parameters)
    kind = KINDS.get(kind_name)
    if prefix != INTERFACE or kind is None:
        return FormatError(
            f"khod answered with an error that is not known here: {name}", hint="khod and khoctl differ in version"
        )
    # Made without the class's own constructor: that would say the errno in words once more.
    error = kind.__new__(kind)
    KhodError.__init__(error, str(parameters.get("message", name)), hint=str(parameters.get("hint", "")))
    if isinstance(error, MachineError):
        error.errno = int(parameters.get("errno", 0))
    return error


def _of_service(name: str, parameters: Mapping[str, Any]) -> KhodError:
    about = ", ".join(str(value) for value in parameters.values())
    if name == "InvalidParameter":
        return InvalidRequest(f"khod cannot take the parameter {about}")
    if name == "PermissionDenied":
        return NotPermitted("khod does not talk to this caller")
    return InvalidRequest(f"khod does not do this: {name} {about}".rstrip(), hint="khod and khoctl differ in version")
