# SPDX-License-Identifier: LGPL-2.1-or-later
"""Run in the initrd by its first process (khod.early.stage): VMMs of several instances, whose descriptors drivers make anew.

A device's descriptor cannot be had without its plugin, and a plugin not without the core. So this is khod's own restore, of
these instances alone, over the stage's custodian; it takes as long to start as khod does, and comes after those that need
nothing of it. What it has restored is in the book, as if a khod had done it and ended; the one that starts later goes on from
there. A group that does not come through whole is in no book: khod begins anew with it, on the root file system.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from khod.core import resumed
from khod.core.blocking import blocking
from khod.core.book import Book
from khod.core.callers import Owner
from khod.core.driver import Drivers
from khod.core.incoming import Incoming, open_incoming, read_tree
from khod.core.instances import enter
from khod.core.node import Carried
from khod.core.ports import Machine
from khod.core.registry import Entry, Grade, InstanceState, Key
from khod.core.restore import Restorer
from khod.core.settings import Settings
from khod.custodian import protocol
from khod.custodian.table import MOST
from khod.early import paths, plan, record, starting
from khod.early.plan import Plan, Start
from khod.early.stage import say
from khod.errors import FormatError, KhodError
from khod.kernel.machine import machine as running_machine
from khod.plugin.manager import PluginManager

logger = logging.getLogger(__name__)

NOBODY, SOMEBODY = 0, 1
"""Exit statuses: whether anybody may have been started."""


def main() -> int:
    """All of it. What fails is said in the kernel's log, and left to khod."""
    begun = _now()
    logging.basicConfig(level=logging.INFO, handlers=[KernelLog()])
    resource.setrlimit(resource.RLIMIT_NOFILE, (MOST, MOST))
    with open(paths.PLAN, "rb") as f:
        wanted = plan.read(f.read())
    machine = running_machine(Path("/nonexistent"), custodian=protocol.EARLY.decode())
    seconds, rate = wanted.restoring
    starter = Starter(machine, begun)
    asyncio.run(run(machine, Settings(restoring=seconds, carry_rate=rate), plugins(wanted), wanted, starter))
    return SOMEBODY if starter.began else NOBODY


class KernelLog(logging.Handler):
    """To the kernel's log, which the journal takes over."""

    def emit(self, entry: logging.LogRecord) -> None:
        """A line."""
        say(self.format(entry))


def plugins(wanted: Plan) -> PluginManager:
    """Those that the plan names: there is nothing here that could be searched for them."""
    manager = PluginManager()
    for name, where in wanted.plugins:
        try:
            module, _, attributes = where.partition(":")
            plugin: object = importlib.import_module(module)
            for attribute in filter(None, attributes.split(".")):
                plugin = getattr(plugin, attribute)
            manager.register(plugin, name)
        except Exception as error:
            logger.exception("plugin %s cannot be used: %s", name, error)
    return manager


async def run(machine: Machine, settings: Settings, drivers: Drivers, wanted: Plan, starter: Starter) -> None:
    """Restore and start one group after the other."""
    book = Book(machine)
    await blocking(book.open)
    incoming = await blocking(open_incoming, machine)
    await blocking(read_tree, machine, incoming)
    if incoming.verdict:
        raise FormatError(incoming.verdict)
    for start in wanted.starts:
        if not start.also:
            continue
        try:
            entries = await restore(machine, settings, drivers, book, incoming, start)
            starter.start(start, entries, incoming)
        except (KhodError, OSError) as error:
            say(f"{start.name} of {start.owner} is not started here: {error}")


async def restore(
    machine: Machine, settings: Settings, drivers: Drivers, book: Book, incoming: Incoming, start: Start
) -> list[Entry]:
    """The instances of one group, restored and in the book. Raises FormatError where they do not come through whole, or need
    others: then the book does not know them, and what was made of them anew ends with this process."""
    owner = Owner.parse(start.owner)
    group = [(owner, name) for name in (start.name, *start.also)]
    carried = {one.key: one for one in incoming.carried if one.key in group}
    for owner, name in group:
        if (owner, name) not in carried:
            raise FormatError(f"{name} did not come through")
        if why := _stays(carried[owner, name], group):
            raise FormatError(f"{name} {why}")
    restorer = Restorer(machine, settings, drivers, replace(incoming, carried=[carried[key] for key in group]), book)
    entries = await restorer.restore({})
    if unsound := [entry for entry in entries if entry.state is not InstanceState.RESTORED]:
        raise FormatError("; ".join(f"{entry.name} is {entry.state}: {entry.problem}" for entry in unsound))
    for entry in entries:
        await enter(machine, book, entry)
    return entries


def _stays(one: Carried, group: Sequence[Key]) -> str:
    """Why an instance is khod's alone; '' for none."""
    if one.grade is Grade.OPAQUE:
        return "has contents that are its owner's"
    needed = [*((one.owner, name) for name in one.requires), *(key for key, _ in one.shares.values())]
    others = sorted({name for owner, name in needed if (owner, name) not in group})
    return f"needs {', '.join(others)}, which is not started with it" if others else ""


class Starter:
    """Starts VMMs, and notes in the record what it does."""

    def __init__(self, machine: Machine, begun: int) -> None:
        """`begun`: when this process began, by CLOCK_MONOTONIC."""
        self.began = False
        """Whether anybody's VMM was begun to be started."""
        self._root = ""
        self._record = machine.custody.take(record.DEPOSIT)
        self._first = "resumed" not in resumed.read(machine).marks
        self._mark("drivers", begun)

    def start(self, start: Start, entries: Sequence[Entry], incoming: Incoming) -> None:
        """Start the VMM of a group that was restored. Raises OSError or FormatError where it does not run."""
        self._mark("verified", _now())
        if not self._root:
            self._root = starting.prepare(os.access(paths.HOST_INIT, os.X_OK), say)
        samples = {one.session: one.sample for one in incoming.carried}
        words = [[start.owner, entry.name, entry.incoming] for entry in entries]
        seen = [(len(samples[entry.incoming].frames), samples[entry.incoming].checked) for entry in entries]
        names, fds, states = passed(entries)
        self.began = True
        record.note_all(self._record, [["start", *one, *counts] for one, counts in zip(words, seen, strict=True)])
        if why := starting.start(self._root, start.command, names, fds, states, (self._record, words)):
            raise FormatError(why)
        self._mark("resumed", _now())
        self._first = False
        say(f"{entries[0].label} runs, with {', '.join(start.also)}")

    def _mark(self, name: str, when: int) -> None:
        """Of the first that is started at all: that is the blackout."""
        if self._first:
            record.note(self._record, "mark", name, when)


def passed(entries: Sequence[Entry]) -> tuple[list[str], list[int], list[str]]:
    """What a VMM is given of its instances, as of one by ``khoctl claim``: names of descriptors, these, borrowed, and which of
    them are its own states. Names of all but the first instance's begin with the instance's and a slash."""
    names: list[str] = []
    fds: list[int] = []
    states: list[str] = []
    for entry in entries:
        prefix = "" if entry is entries[0] else f"{entry.name}/"
        clients = {bound.name: entry.states[bound.name].fd for bound in entry.client_states}
        for name, fd in (*entry.fds.items(), *clients.items()):
            names.append(prefix + name)
            fds.append(fd)
        states += [prefix + name for name in clients]
    return names, fds, states


def _now() -> int:
    return time.clock_gettime_ns(time.CLOCK_MONOTONIC)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Exception as error:
        say(f"what drivers have to do with is left to khod: {error!r}")
        sys.exit(SOMEBODY)
