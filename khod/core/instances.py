# SPDX-License-Identifier: LGPL-2.1-or-later
"""Taking an instance in, and showing it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from khod.core.blocking import blocking
from khod.core.driver import Drivers, Request
from khod.core.ports import Machine
from khod.core.registry import Entry, Registry
from khod.core.views import InstanceView
from khod.errors import InvalidRequest, KhodError, Refused


@dataclass(frozen=True, slots=True)
class Registration:
    """What was asked for. The descriptors are borrowed until there is an entry, which owns them."""

    name: str
    driver: str
    fds: Sequence[tuple[str, int]]
    owner: str
    required: bool
    requires: tuple[str, ...]
    options: Mapping[str, str]


async def new_entry(machine: Machine, registry: Registry, drivers: Drivers, asked: Registration) -> Entry:
    """The entry for a registration, not yet in the registry. Raises InvalidRequest, Refused."""
    name = asked.name
    registry.check_new(name, asked.requires)
    driver = drivers.get(asked.driver)
    fds = dict(asked.fds)
    if len(fds) < len(asked.fds):
        raise InvalidRequest(f"{name}: two descriptors of one name among {[n for n, _ in asked.fds]}")
    if bad := [n for n in fds if not n or not n.isprintable() or ":" in n]:
        raise InvalidRequest(f"{name}: descriptor name {bad[0]!r} is empty, or has a colon or control characters in it")
    await blocking(_refuse_twice, machine, registry, name, fds)
    declaration = await driver.declare(machine, Request(name, fds, dict(asked.options)))
    requires = tuple(dict.fromkeys((*asked.requires, *declaration.requires)))
    registry.check_new(name, requires)
    return Entry(name, driver, asked.driver, asked.owner, asked.required, requires, dict(asked.options), declaration, fds)


def _refuse_twice(machine: Machine, registry: Registry, name: str, fds: Mapping[str, int]) -> None:
    """The same file twice would be two claims to one memory."""
    stat = machine.files.stat
    holders = {stat(fd).inode: e.name for e in registry for fd in e.fds.values()}
    for fd_name, fd in fds.items():
        inode = stat(fd).inode
        if inode in holders:
            raise Refused(f"{name}: descriptor {fd_name!r} is the same file as one of {holders[inode]}")
        holders[inode] = name


async def instance_view(machine: Machine, entry: Entry) -> InstanceView:
    """An entry as people see it, with what its driver has to say."""
    detail: Mapping[str, str] = {}
    if entry.driver is not None and entry.state.sound:
        try:
            detail = await entry.driver.describe(entry.view(machine))
        except KhodError as error:
            detail = {"describe": f"failed: {error}"}
    return InstanceView(
        name=entry.name,
        driver=entry.driver_name,
        compatible=entry.declaration.compatible,
        owner=entry.owner,
        required=entry.required,
        requires=entry.requires,
        state=entry.state,
        size=entry.declaration.size,
        fds=list(entry.fds),
        detail=dict(detail),
        problem=entry.problem,
    )
