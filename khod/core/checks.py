# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why an update may not start: everything that can be known before anything is touched."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from khod.core.blocking import blocking
from khod.core.need import Need, reckon
from khod.core.ports import Image, Machine
from khod.core.registry import Entry, Grade
from khod.core.settings import Settings
from khod.errors import KhodError, MachineError


async def blockers(
    machine: Machine, settings: Settings, entries: Sequence[Entry], image: Image | None
) -> tuple[list[str], Need]:
    """Reasons, in sentences, and decision 8's sum. Touches nothing."""
    found: list[str] = []
    try:
        await blocking(machine.liveupdate.probe)
    except MachineError as error:
        found.append(str(error))
    if image is None:
        found.append("no kernel to jump to (`khoctl load KERNEL` names one)")
    if await blocking(machine.kexec.loaded):
        found.append(
            "a kernel image that khod did not load is in place: it may carry nothing across (`kexec --unload` drops it)"
        )
    found += _unsound(entries)
    for entry in entries:
        found += await _by_driver(machine, entry)
    need = await blocking(_need, machine, settings, entries)
    if not need.enough:
        found.append(f"{need.sentence()} (free memory, lower `reserve`, or register less)")
    return found, need


def _unsound(entries: Iterable[Entry]) -> list[str]:
    """Decision 7: what came through and cannot be registered again would be lost silently by the next jump."""
    return [
        f"{e.name} is {e.state}: {e.problem} (`khoctl claim --unverified {e.name}` hands it out,"
        f" `khoctl discard {e.name}` lets go of it)"
        for e in entries
        if not e.state.sound or (e.driver is None and e.grade is Grade.REGISTERED)
    ]


async def _by_driver(machine: Machine, entry: Entry) -> list[str]:
    if entry.driver is None:
        return []
    try:
        probe = await entry.driver.probe(machine)
        if not probe.supported:
            return [f"{entry.name}: driver {entry.driver.name} cannot work here: {probe.reason}"]
        return list(await entry.driver.check(entry.view(machine)))
    except KhodError as error:
        return [f"{entry.name}: {error}"]


def _need(machine: Machine, settings: Settings, entries: Sequence[Entry]) -> Need:
    return reckon(entries, machine.files, machine.memory.figures(), settings.reserve)
