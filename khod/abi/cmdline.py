# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel's command line, as the kernel reads it: lib/cmdline.c (next_arg, memparse) and lib/kstrtox.c (kstrtobool)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_WORD = re.compile(r'(?:[^\s"]|"[^"]*(?:"|$))+')
_SIZE = re.compile(r"([0-9]+)([KMGTPE]?)", re.IGNORECASE)
_UNITS = {unit: 1 << 10 * power for power, unit in enumerate(("", "k", "m", "g", "t", "p", "e"))}


@dataclass(frozen=True, slots=True)
class CommandLine:
    """The options up to ``--``, in order: name and value; None for a bare word."""

    options: tuple[tuple[str, str | None], ...]

    def values(self, name: str) -> tuple[str, ...]:
        """Every value given to `name`, in order."""
        return tuple(value for key, value in self.options if key == name and value is not None)

    def flag(self, name: str, *, default: bool) -> bool:
        """A boolean option. The last one that makes sense counts; one that makes none changes nothing."""
        state = default
        for value in self.values(name):
            parsed = _boolean(value)
            state = state if parsed is None else parsed
        return state

    def huge_pages(self, default_size: int = 2 << 20) -> int:
        """Bytes of the hugetlb pools that it asks for: ``hugepages=`` after its ``hugepagesz=``, per node or not."""
        size = next((s for s in map(memparse, self.values("default_hugepagesz")[-1:]) if s), default_size)
        total = 0
        for name, value in self.options:
            if value is None:
                continue
            if name == "hugepagesz":
                size = memparse(value) or size
            elif name == "hugepages":
                total += size * sum(map(_count, value.split(",")))
        return total


def parse(text: str) -> CommandLine:
    """Take a command line apart; quotes keep blanks together, and are dropped."""
    return CommandLine(tuple(_options(text)))


def words(text: str) -> tuple[str, ...]:
    """The words of a command line as they stand, quotes included."""
    return tuple(_WORD.findall(text))


def memparse(text: str) -> int:
    """A number with K, M, G …; 0 for what is none."""
    match = _SIZE.match(text)
    return int(match[1]) * _UNITS[match[2].lower()] if match else 0


def _options(text: str) -> Iterator[tuple[str, str | None]]:
    for match in _WORD.finditer(text):
        word = match[0].replace('"', "")
        if word == "--":
            return  # what follows is init's
        name, equals, value = word.partition("=")
        # Parameters are compared with dashes and underscores taken for the same (kernel/params.c).
        yield name.replace("-", "_"), value if equals else None


def _boolean(value: str) -> bool | None:
    first, second = value[:1], value[1:2]
    if first in ("y", "Y", "t", "T", "1"):
        return True
    if first in ("n", "N", "f", "F", "0"):
        return False
    if first in ("o", "O"):
        return {"n": True, "N": True, "f": False, "F": False}.get(second)
    return None


def _count(text: str) -> int:
    """'512', or 'NODE:512'."""
    number = text.rpartition(":")[2]
    return int(number) if number.isdecimal() else 0
