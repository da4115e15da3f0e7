# SPDX-License-Identifier: LGPL-2.1-or-later
"""The profile of a fleet: the formats that its operators have agreed on, in a file that they keep. YAML::

    fleet: front-ends          # a name, for messages
    formats: [kho-v4, luo-v5, memfd-v2]

A kernel that understands them all can be jumped to from every kernel that writes no others.
"""

from __future__ import annotations

from dataclasses import dataclass

from khod.abi.formats import Format
from khod.abi.formats import parse as parse_format
from khod.errors import FormatError, InvalidRequest

MAX_SIZE = 64 << 10
"""Bytes of the file."""


@dataclass(frozen=True, slots=True)
class Fleet:
    """A profile."""

    name: str
    formats: tuple[Format, ...]


def parse(text: bytes, path: str) -> Fleet:
    """The profile that `text` spells; `path` stands for it in errors. Raises InvalidRequest."""
    import msgspec  # both are dear, and wanted only where there is a profile
    import yaml

    hint = "a profile is a mapping of `fleet`, a name, and `formats`, a list such as [kho-v4, luo-v5, memfd-v2]"
    if len(text) > MAX_SIZE:
        raise InvalidRequest(f"{path}: it is {len(text)} bytes long: a profile has at most {MAX_SIZE}", hint=hint)
    try:
        data = msgspec.convert(yaml.safe_load(text), dict[str, str | list[str]])
    except (yaml.YAMLError, msgspec.ValidationError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"{path}: {' '.join(str(error).split())}", hint=hint)
    name, names = data.pop("fleet", None), data.pop("formats", None)
    if not isinstance(name, str) or not isinstance(names, list) or not names:
        raise InvalidRequest(f"{path}: `fleet` or `formats` is missing", hint=hint)
    if data:
        raise InvalidRequest(f"{path}: there is no key {', '.join(sorted(data))}", hint=hint)
    try:
        return Fleet(name, tuple(sorted({parse_format(text) for text in names})))
    except FormatError as error:
        raise InvalidRequest(f"{path}: {error.message}", hint=hint)
