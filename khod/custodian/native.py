# SPDX-License-Identifier: LGPL-2.1-or-later
"""C functions by the half of ctypes that is written in C: the other half imports sysconfig and threading (Python 3.14), which
takes longer than all that is called by it here."""

from __future__ import annotations

import os
from _ctypes import CFuncPtr, _SimpleCData, dlopen, dlsym, get_errno

_CDECL, _PYTHONAPI, _USE_ERRNO = 1, 4, 8
"""Modules/_ctypes/ctypes.h."""

TYPE_CHECKING = False  # typing takes longer to import than all that is done here
if TYPE_CHECKING:
    from collections.abc import Callable


class Long(_SimpleCData):  # type: ignore[type-arg]
    """A long of C: what a parameter that is a number or an address must be given as."""

    _type_ = "l"


class _Function(CFuncPtr):
    _flags_ = _CDECL | _USE_ERRNO
    _restype_ = Long


class _Held(CFuncPtr):
    _flags_ = _CDECL | _USE_ERRNO | _PYTHONAPI
    _restype_ = Long


_program = dlopen(None, 0)  # type: ignore[arg-type]  # which means the program itself


def function(name: str, *, held: bool = False) -> Callable[..., int]:
    """A C function of the program or of its libraries, that returns a long. Arguments are `Long`, bytes or None. `held`: it is
    called with the interpreter's lock, as what is the interpreter's own must be."""
    kind: Callable[[int], Callable[..., int]] = _Held if held else _Function
    return kind(dlsym(_program, name))


def error(what: str) -> OSError:
    """What the last call failed with."""
    number = get_errno()
    return OSError(number, f"{what}: {os.strerror(number)}")
