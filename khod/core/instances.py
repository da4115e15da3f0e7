# SPDX-License-Identifier: LGPL-2.1-or-later
"""Taking an instance in, taking it up again from the book, and showing it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

from khod.core.blocking import blocking
from khod.core.book import Book, Page
from khod.core.callers import ENDED, Caller, Lifetime, Owner, Right
from khod.core.driver import Declaration, Drivers, Request
from khod.core.ports import F_SEAL_GROW, F_SEAL_SHRINK, Machine
from khod.core.registry import (
    OPAQUE_COMPATIBLE,
    OPAQUE_DRIVER,
    Entry,
    Grade,
    InstanceState,
    Key,
    Registry,
)
from khod.core.service import Registration
from khod.core.settings import Settings
from khod.core.views import InstanceView
from khod.errors import InvalidRequest, KhodError, NotPermitted, Refused

_FIXED = F_SEAL_GROW | F_SEAL_SHRINK


def new_handle() -> str:
    """Unguessable."""
    return secrets.token_hex(16)


def check_lifetime(caller: Caller, lifetime: Lifetime) -> None:
    """Raises NotPermitted: what outlives everybody who could let go of it is an operator's to register (decision 5)."""
    if lifetime is Lifetime.PERSISTENT and not caller.may(Right.OPERATE):
        raise NotPermitted(
            f"{caller.owner} may not register what nothing but an operator ends",
            hint="choose the lifetime 'connection' or 'process'",
        )


async def new_entry(
    machine: Machine,
    registry: Registry,
    drivers: Drivers,
    settings: Settings,
    caller: Caller,
    asked: Registration,
    given: Sequence[tuple[str, int]],
) -> Entry:
    """The entry for a registration, not yet in the registry. The descriptors are borrowed until there is one, which owns them.

    Raises InvalidRequest, Refused, NotPermitted.
    """
    name = asked.name
    registry.check_new(caller.owner, name, asked.requires)
    check_lifetime(caller, asked.lifetime)
    driver = drivers.get(asked.driver)
    fds = dict(given)
    if len(fds) < len(given):
        raise InvalidRequest(f"{name}: two descriptors of one name among {[n for n, _ in given]}")
    if bad := [n for n in fds if not n or not n.isprintable() or ":" in n]:
        raise InvalidRequest(f"{name}: descriptor name {bad[0]!r} is empty, or has a colon or control characters in it")
    shares = await blocking(_shared, machine, registry, name, asked.shareable, fds)
    if not caller.may(Right.ADMINISTER):
        await blocking(_check_sealed, machine, name, fds)
    declaration = await driver.declare(machine, Request(name, fds, dict(asked.options)))
    _check_states(name, declaration, asked)
    requires = tuple(dict.fromkeys((*asked.requires, *declaration.requires)))
    registry.check_new(caller.owner, name, requires)
    check_quota(registry, settings, caller.owner, len(fds) + len(asked.states), declaration.size)
    return Entry(
        name=name,
        driver=driver,
        driver_name=asked.driver,
        owner=caller.owner,
        required=asked.required,
        requires=requires,
        options=dict(asked.options),
        declaration=declaration,
        fds=fds,
        handle=new_handle(),
        lifetime=asked.lifetime,
        client_states=tuple(asked.states),
        shareable=asked.shareable,
        shares=shares,
        attended=bool(asked.states),
        since=machine.clock.stamp().realtime,
    )


def new_opaque(
    machine: Machine, registry: Registry, settings: Settings, caller: Caller, name: str, lifetime: Lifetime
) -> Entry:
    """The entry for an instance whose session its client fills by himself. Raises as `new_entry` does."""
    registry.check_new(caller.owner, name, ())
    check_lifetime(caller, lifetime)
    check_quota(registry, settings, caller.owner, 1, 0)
    return Entry(
        name=name,
        driver=None,
        driver_name=OPAQUE_DRIVER,
        owner=caller.owner,
        required=True,
        requires=(),
        options={},
        declaration=Declaration(OPAQUE_COMPATIBLE, ()),
        fds={},
        grade=Grade.OPAQUE,
        handle=new_handle(),
        lifetime=lifetime,
        attended=True,
        since=machine.clock.stamp().realtime,
    )


def check_quota(registry: Registry, settings: Settings, owner: Owner, fds: int, size: int) -> None:
    """Whether an owner may have one instance more, of so many descriptors and bytes. Raises Refused naming the limit."""
    own = registry.of(owner)
    used = {
        "instances": (len(own) + 1, settings.quota_instances),
        "descriptors": (sum(len(e.fds) + len(e.client_states) for e in own) + fds, settings.quota_descriptors),
        "bytes": (sum(e.declaration.size for e in own) + size, settings.quota_bytes),
    }
    for what, (would, most) in used.items():
        if most and would > most:
            raise Refused(
                f"{owner} would have {would} {what} registered and may have {most}",
                hint=f"unregister some, or have the quota raised (quotas.{what} in khod's configuration)",
            )


def _shared(
    machine: Machine, registry: Registry, name: str, shareable: bool, fds: Mapping[str, int]
) -> dict[str, tuple[Key, str]]:
    """Which of the files another instance has registered already, and allows to share (decision 6)."""
    for entry in registry:
        for n in entry.fds.keys() - entry.inodes.keys():
            entry.inodes[n] = _identity(machine, entry.fds[n])
    holders = {e.inodes[n]: (e, n) for e in registry for n in e.fds if n not in e.shares}
    mine: dict[tuple[int, int], str] = {}
    shares: dict[str, tuple[Key, str]] = {}
    for fd_name, fd in fds.items():
        inode = _identity(machine, fd)
        if inode in mine:
            raise Refused(f"{name}: descriptors {mine[inode]!r} and {fd_name!r} are the same file")
        mine[inode] = fd_name
        if inode not in holders:
            continue
        holder, theirs = holders[inode]
        if not (holder.shareable and shareable):
            raise Refused(
                f"{name}: descriptor {fd_name!r} is the same file as {theirs!r} of {holder.label}",
                hint="both registrations must say that it may be shared",
            )
        shares[fd_name] = (holder.key, theirs)
    return shares


def _identity(machine: Machine, fd: int) -> tuple[int, int]:
    """What tells a file from others. All iommufds are opened by one device node, and each is another: none is shared."""
    stat = machine.files.stat(fd)
    return (-1, fd) if stat.kind == "iommufd" else stat.inode


def _check_sealed(machine: Machine, name: str, fds: Mapping[str, int]) -> None:
    """Decision 8: what grows between the sum and the preserve makes the sum worthless. Of huge pages the kernel fixes no size
    in preparing, and one that changes fails everybody's update."""
    for fd_name, fd in fds.items():
        stat = machine.files.stat(fd)
        if stat.kind == "hugetlb" and stat.seals & _FIXED != _FIXED:
            raise NotPermitted(
                f"{name}: {fd_name!r} can still change its size",
                hint="seal it (F_ADD_SEALS with F_SEAL_GROW and F_SEAL_SHRINK) before you register it",
            )
        if stat.kind == "memfd" and not stat.seals & F_SEAL_GROW:
            raise NotPermitted(
                f"{name}: {fd_name!r} can still grow", hint="seal it (F_ADD_SEALS with F_SEAL_GROW) before you register it"
            )


def _check_states(name: str, declaration: Declaration, asked: Registration) -> None:
    names = [bound.name for bound in (*declaration.states, *asked.states)]
    if len(set(names)) != len(names):
        raise InvalidRequest(f"{name}: two states of one name among {names}")
    for bound in asked.states:
        if not bound.name or not bound.name.isprintable() or ":" in bound.name:
            raise InvalidRequest(f"{name}: state name {bound.name!r} is empty, or has a colon or control characters in it")
        if bound.size < 0:
            raise InvalidRequest(f"{name}: state {bound.name!r} of {bound.size} bytes")


async def revive(machine: Machine, drivers: Drivers, page: Page) -> Entry:
    """The entry that the book has a page of, its descriptors taken from custody. Raises what its driver's declare raises; then
    they stay where they are."""
    driver = None if page.grade is Grade.OPAQUE else drivers.get(page.driver)
    fds: dict[str, int] = {}
    try:
        for name, deposit in page.deposits.items():
            fds[name] = await blocking(machine.custody.take, deposit)
        declaration = Declaration(OPAQUE_COMPATIBLE, ())
        if driver is not None:
            declaration = await driver.declare(machine, Request(page.name, fds, dict(page.options)))
    except BaseException:
        for fd in fds.values():
            machine.files.close(fd)
        raise
    entry = Entry(
        name=page.name,
        driver=driver,
        driver_name=page.driver,
        owner=page.owner,
        required=page.required,
        requires=page.requires,
        options=dict(page.options),
        declaration=declaration,
        fds=fds,
        grade=page.grade,
        client_states=page.client_states,
        shareable=page.shareable,
        state=page.state,
    )
    take_up(entry, page)
    return entry


def take_up(entry: Entry, page: Page) -> None:
    """What the book says of an instance beyond its descriptors: who speaks for it, and whether it was claimed."""
    entry.handle, entry.lifetime = page.handle, page.lifetime
    entry.keeper_pid, entry.keeper_since = page.keeper_pid, page.keeper_since
    entry.holder_pid, entry.holder_since, entry.holder_early = page.holder_pid, page.holder_since, page.holder_early
    entry.attended, entry.since = page.attended, page.since
    entry.deposits, entry.shares = dict(page.deposits), dict(page.shares)
    entry.keepsake = {name: bytes.fromhex(value) for name, value in page.keepsake.items()}
    # What is not whole is claimed as well: an administrator had it handed out as it is.
    claimed = page.state is InstanceState.CLAIMED and entry.state is not InstanceState.WAITING
    if claimed or (entry.state is InstanceState.RESTORED and page.state.sound):
        entry.state = page.state


async def enter(machine: Machine, book: Book, entry: Entry) -> None:
    """Have the book speak of an instance that was restored: for the first time, or once more. Raises CustodyFull,
    CustodianGone."""
    page = book.contents.pages.get(entry.key)
    if page is not None:
        take_up(entry, page)
    else:
        entry.handle = new_handle()
        entry.since = machine.clock.stamp().realtime
    if entry.declaration.made:  # nothing else has them, and they are not made twice
        await blocking(book.deposit, entry)
    await blocking(book.put, entry)


NOBODY_YET = "nobody yet: its client has to come back"
"""Who keeps an instance whose client was lost with an earlier khod."""


def kept_by(entry: Entry) -> str:
    """Who keeps an instance registered, in words; '' for nobody but an operator."""
    match entry.lifetime:
        case Lifetime.PERSISTENT:
            return ""
        case _ if entry.keeper is None:
            return NOBODY_YET
        case _ if entry.keeper is ENDED:
            return "nobody: its client did not come back in time"
        case Lifetime.CONNECTION:
            return f"a connection of process {entry.keeper_pid}"
        case Lifetime.PROCESS:
            return f"process {entry.keeper_pid}"


async def instance_view(machine: Machine, entry: Entry, *, orphan: bool = False) -> InstanceView:
    """An entry as people see it, with what its driver has to say."""
    detail: Mapping[str, str] = {}
    if entry.driver is not None and entry.state.sound:
        try:
            detail = await entry.driver.describe(entry.view(machine))
        except KhodError as error:
            detail = {"describe": f"failed: {error}"}
    elif entry.grade is Grade.OPAQUE:
        detail = {"contents": "unknown"}
    return InstanceView(
        name=entry.name,
        driver=entry.driver_name,
        compatible=entry.declaration.compatible,
        owner=str(entry.owner),
        required=entry.required,
        requires=entry.requires,
        state=entry.state,
        size=entry.declaration.size,
        fds=list(entry.fds),
        detail=dict(detail),
        problem=entry.problem,
        grade=entry.grade,
        lifetime=entry.lifetime,
        keeper=kept_by(entry),
        since=entry.since,
        orphan=orphan,
        attended=entry.attended,
        strategy=entry.declaration.strategy,
        continuity=entry.declaration.continuity,
    )
