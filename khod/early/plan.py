# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the stage is to do: a line for each thing, words with a tab between them. Written where the initrd is built, and read
before there is anything that could be imported to read it."""

from __future__ import annotations

_HEAD = "khod-plan 1"


class Start:
    """One VMM to be started at once: with what its instance has, and with what those have that are named in `also`. Where
    there are any, it is started by `khod.driven`, after all others."""

    __slots__ = ("also", "command", "name", "owner")

    def __init__(self, owner: str, name: str, command: list[str], also: list[str] | None = None) -> None:
        self.owner, self.name, self.command, self.also = owner, name, command, also or []


class Plan:
    """`modules`: paths in the initrd, in the order of loading. For `khod.driven`: `plugins` are names and what implements
    them, as entry points say it; `restoring` the seconds for an instance, and the bytes that it may copy in one more."""

    __slots__ = ("modules", "plugins", "restoring", "starts")

    def __init__(
        self,
        modules: list[str],
        starts: list[Start],
        plugins: list[tuple[str, str]] | None = None,
        restoring: tuple[float, int] = (120.0, 0),
    ) -> None:
        self.modules, self.starts, self.plugins, self.restoring = modules, starts, plugins or [], restoring


def write(plan: Plan) -> bytes:
    """Raises ValueError for a word that has a tab or the end of a line in it."""
    lines = [[_HEAD], *(["module", path] for path in plan.modules), *(["plugin", *plugin] for plugin in plan.plugins)]
    lines.append(["restoring", *map(str, plan.restoring)])
    for start in plan.starts:
        lines.append(["start", start.owner, start.name, *start.command])
        lines += [["also", other] for other in start.also]
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
        elif kind == "plugin" and len(words) == 2:
            plan.plugins.append((words[0], words[1]))
        elif kind == "restoring" and len(words) == 2:
            plan.restoring = float(words[0]), int(words[1])
        elif kind == "start" and len(words) >= 3:
            plan.starts.append(Start(words[0], words[1], words[2:]))
        elif kind == "also" and len(words) == 1 and plan.starts:
            plan.starts[-1].also.append(words[0])
        else:
            raise ValueError(f"the plan has a line {line[:80]!r}")
    return plan
