# SPDX-License-Identifier: LGPL-2.1-or-later
"""The views of `khod.core.views` as types of a varlink interface.

A view may hold any sequence and spells its types as strings; an interface description is made of lists and of types that
are there. So each view gets a twin, made once, of the same name and fields. Values go out as they are: msgspec writes them.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Sequence
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

INTERFACE = "org.khod.Host"


@functools.cache
def wire_type(view: type) -> type:
    """The twin of a view."""
    hints = get_type_hints(view)
    rows = [(row.name, _twin(hints[row.name])) for row in dataclasses.fields(view)]
    return dataclasses.make_dataclass(view.__name__, rows, kw_only=True, frozen=True)


def list_of(view: type) -> type:
    """A list of twins."""
    return cast(type, types.GenericAlias(list, (wire_type(view),)))


def optional(view: type) -> type:
    """A twin, or nothing."""
    return cast(type, wire_type(view) | None)


def _twin(hint: Any) -> Any:
    origin, arguments = get_origin(hint), get_args(hint)
    if dataclasses.is_dataclass(hint):
        return wire_type(cast(type, hint))
    if origin is Sequence:
        return types.GenericAlias(list, (_twin(arguments[0]),))
    if origin is Union or origin is types.UnionType:
        return functools.reduce(lambda one, other: one | other, (_twin(argument) for argument in arguments))
    return hint
