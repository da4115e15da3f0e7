# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the stage is to do: a line for each thing, words with a tab between them. Written where the initrd is built, and read
before there is anything that could be imported to read it."""

from __future__ import annotations

_HEAD = "khod-plan 1"


class Start:
    """One instance to be started at once."""

    __slots__ = ("command", "name", "owner")

    def __init__(self, owner: str, name: str, command: list[str]) -> None:
        self.owner, self.name, self.command = owner, name, command


class Plan:
    """`modules`: paths in the initrd, in the order of loading."""

    __slots__ = ("modules", "starts")

    def __init__(self, modules: list[str], starts: list[Start]) -> None:
        self.modules, self.starts = modules, starts


def write(plan: Plan) -> bytes:
    """Raises ValueError for a word that has a tab or the end of a line in it."""
    lines = [[_HEAD], *(["module", path] for path in plan.modules)]
    lines += [["start", start.owner, start.name, *start.command] for start in plan.starts]
    for word in (word for line in lines for word in line):
        if "\t" in word or "\n" in word:
            raise ValueError(f"{word!r} has a tab or the end of a line in it")
    return "".join("\t".join(line) + "\n" for line in lines).encode("utf-8", "surrogateescape")


def read(data: bytes) -> Plan:
    """Raises ValueError."""
    head, *lines = data.decode("utf-8", "surrogateescape").split("\n")
    if head != _HEAD:
        raise ValueError(f"the plan begins with {head[:40]!r} and not with {_HEAD!r}")
    plan = Plan([], [])
    for line in filter(None, lines):
        kind, *words = line.split("\t")
        if kind == "module" and len(words) == 1:
            plan.modules.append(words[0])
        elif kind == "start" and len(words) >= 3:
            plan.starts.append(Start(words[0], words[1], words[2:]))
        else:
            raise ValueError(f"the plan has a line {line[:80]!r}")
    return plan
