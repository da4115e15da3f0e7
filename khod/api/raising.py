# SPDX-License-Identifier: LGPL-2.1-or-later
"""Varlink errors become khod's errors again: the client's half, which needs nothing of a varlink library.

Every class of `khod.errors` is an error of the interface by the same name; `khod.api.faults` is the way out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from khod import errors
from khod.api.wire import INTERFACE
from khod.errors import FormatError, InvalidRequest, KhodError, MachineError, NotPermitted

KINDS: Mapping[str, type[KhodError]] = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, KhodError)
}


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
