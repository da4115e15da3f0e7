# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restoration: every instance retrieved, compared with what was noted of it, and given back to its driver.

Runs in dependency order, independent instances at once. Nothing here releases anything: an instance with which something is
wrong stays in khod's hands, whole, and is told apart (decisions 21 to 23). No numpy anywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from khod.core import sample
from khod.core.blocking import blocking
from khod.core.driver import Declaration, Drivers, Preserve, Request, StateArea, StateBound
from khod.core.incoming import Incoming
from khod.core.learning import FramesDigest, windows
from khod.core.node import Carried
from khod.core.ports import Machine
from khod.core.registry import Entry, InstanceState, order
from khod.core.settings import Settings
from khod.errors import DeadlinePassed, FormatError, KhodError
from khod.folio.blocks import Blocks, OrderDifference

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Verification:
    """What was compared, for the report."""

    frames: int = 0
    pages: int = 0
    full: int = 0
    """Instances of which every byte was compared."""
    folios: int = 0
    """Folios compared beside the workload; 0 until that is done."""
    problems: list[str] = field(default_factory=list)

    def sentence(self) -> str:
        """Which bytes and frames were checked."""
        bytes_ = f"every byte of {self.full} instances" if self.full else f"the bytes of {self.pages} sampled pages"
        rest = f", then all {self.folios} folios" if self.folios else ""
        return f"the frames of {self.frames} sampled pages and {bytes_} before hand-over{rest}"


class Restorer:
    """Restores the instances of one incoming update."""

    def __init__(self, machine: Machine, settings: Settings, drivers: Drivers, incoming: Incoming) -> None:
        self.machine, self.settings, self.drivers, self.incoming = machine, settings, drivers, incoming
        self.verification = Verification()
        self.on_instance: Callable[[Entry], None] = lambda entry: None
        """Told of each instance as it is done."""

    async def restore(self) -> list[Entry]:
        """All instances of the tree, as entries: RESTORED, or DAMAGED or QUARANTINED with the reason."""
        entries = {c.name: self._entry(c) for c in self.incoming.carried}
        carried = {c.name: c for c in self.incoming.carried}
        for generation in order(entries.values()):
            await asyncio.gather(*(self._one(e, carried[e.name], entries) for e in generation))
        return list(entries.values())

    async def take_custody(self, carried: list[Carried]) -> list[Entry]:
        """Retrieve the sessions and descriptors of instances whose bookkeeping failed; nothing is compared."""
        entries = [self._entry(c) for c in carried]
        for entry, one in zip(entries, carried, strict=True):
            entry.state, entry.problem = InstanceState.DAMAGED, f"not verified: {self.incoming.verdict}"
            try:
                await blocking(self._retrieve, entry, one)
            except KhodError as error:
                entry.problem += f"; {error}"
        return entries

    def _entry(self, carried: Carried) -> Entry:
        driver = self.drivers.for_compatible(carried.compatible)
        return Entry(
            name=carried.name,
            driver=driver,
            driver_name=carried.driver,
            owner=carried.owner,
            required=carried.required,
            requires=carried.requires,
            options=carried.options,
            declaration=Declaration(carried.compatible, (), properties=carried.properties, size=sum(carried.sizes)),
            fds={},
        )

    async def _one(self, entry: Entry, carried: Carried, others: dict[str, Entry]) -> None:
        try:
            async with asyncio.timeout(self.settings.restoring):
                await self._retrieve_and_compare(entry, carried)
                if entry.driver is None:
                    self._mark(entry, InstanceState.QUARANTINED, f"no plugin here reads {carried.compatible!r}")
                    return
                if unsound := [r for r in carried.requires if r in others and not others[r].state.sound]:
                    raise FormatError(f"{entry.name}: requires {', '.join(unsound)}, which did not come through sound")
                await entry.driver.restore(entry.view(self.machine))
                entry.declaration = await entry.driver.declare(
                    self.machine, Request(entry.name, dict(entry.fds), entry.options)
                )
                entry.properties = dict(entry.declaration.properties)
                entry.state = InstanceState.RESTORED
        except TimeoutError:
            self._mark(entry, InstanceState.DAMAGED, str(DeadlinePassed(f"no end within {self.settings.restoring:g} s")))
        except KhodError as error:
            self._mark(entry, InstanceState.DAMAGED, str(error))
        except Exception as error:  # a bug of ours must not end the process that holds everybody's memory
            logger.exception("instance %s", entry.name)
            self._mark(entry, InstanceState.DAMAGED, f"khod failed at it: {error!r}")
        finally:
            self.on_instance(entry)

    def _mark(self, entry: Entry, state: InstanceState, problem: str) -> None:
        logger.error("instance %s: %s: %s", entry.name, state, problem)
        entry.state, entry.problem = state, problem
        self.verification.problems.append(f"{entry.name}: {problem}")

    async def _retrieve_and_compare(self, entry: Entry, carried: Carried) -> None:
        await blocking(self._retrieve, entry, carried)
        await blocking(self._compare, entry, carried)

    def _retrieve(self, entry: Entry, carried: Carried) -> None:
        """Its session and everything in it. What fails is raised after the rest was tried: each is somebody's memory."""
        machine = self.machine
        entry.session = machine.liveupdate.retrieve_session(carried.session)
        entry.session_name = carried.session
        failures: list[KhodError] = []
        for token, name in enumerate((*carried.fds, *carried.states)):
            try:
                fd = machine.liveupdate.retrieve_fd(entry.session, token)
            except KhodError as error:
                failures.append(error)
                continue
            if token < len(carried.fds):
                entry.fds[name] = fd
            else:
                bound = StateBound(name, carried.bounds[token - len(carried.fds)])
                entry.states[name] = StateArea(machine.files, fd, bound)
        entry.declaration = Declaration(
            carried.compatible,
            tuple(Preserve(name, fd) for name, fd in entry.fds.items()),
            properties=carried.properties,
            size=sum(carried.sizes),
        )
        if failures:
            raise failures[0]

    def _compare(self, entry: Entry, carried: Carried) -> None:
        """Sizes, the sample's frames and orders, the sample's bytes; every byte where that was noted."""
        machine, seen = self.machine, carried.sample
        memory = [entry.fds[carried.fds[index]] for index in carried.memory]
        areas = [entry.states[name].fd for name in carried.states]
        for fd, size in zip([*memory, *areas], carried.sizes, strict=True):
            if (found := machine.files.stat(fd).size) != size:
                raise FormatError(f"{entry.name}: a file came back with {found} bytes, it had {size}")
        sizes = carried.sizes[: len(memory)]
        chosen = sample.choose(self.incoming.update, entry.name, sizes, len(seen.frames))
        if len(chosen) != len(seen.frames):
            raise FormatError(f"{entry.name}: a sample of {len(seen.frames)} pages was noted of {len(chosen)} that there are")
        self._compare_frames(entry, carried, memory, chosen)
        _, digest = sample.digest(machine.files, memory, chosen, lambda done: done >= seen.checked)
        if digest != seen.digest:
            raise FormatError(f"{entry.name}: bytes differ in its sample of {seen.checked} pages")
        self.verification.pages += seen.checked
        if carried.content:
            if sample.content_digest(machine.files, memory, sizes) != carried.content:
                raise FormatError(f"{entry.name}: bytes differ")
            self.verification.full += 1

    def _compare_frames(self, entry: Entry, carried: Carried, memory: list[int], chosen: list[tuple[int, int]]) -> None:
        found = sample.locations(self.machine.frames, memory, chosen)
        for (index, page), before, now in zip(chosen, carried.sample.frames, found, strict=True):
            name = carried.fds[carried.memory[index]]
            if before != now:
                (pfn_was, folio_was), (pfn, folio) = sample.unpacked(before), sample.unpacked(now)
                raise FormatError(
                    f"{entry.name}: page {page} of {name!r} is frame {pfn:#x} of order {folio.order},"
                    f" it was {pfn_was:#x} of order {folio_was.order}"
                )
            _, folio = sample.unpacked(now)
            if self.incoming.map is not None and not self.incoming.map.contains(folio.pfn, folio.order):
                raise FormatError(f"{entry.name}: page {page} of {name!r}: folio {folio.pfn:#x} is not in the folio map")
        self.verification.frames += len(chosen)


def verify_rest(machine: Machine, incoming: Incoming, entries: list[Entry]) -> Verification:
    """Compare every folio with what was noted, and their union with the map, beside the running workload. Blocks.

    What differs is reported, not judged: after a retrieve the kernel may migrate pages again, bytes and all.
    """
    result = Verification()
    union = Blocks()
    noted = {c.name: c for c in incoming.carried}
    for entry in entries:
        carried = noted.get(entry.name)
        if carried is None or not entry.state.sound:
            continue
        memory = [entry.fds[carried.fds[index]] for index in carried.memory]
        areas = [entry.states[name].fd for name in carried.states if name in entry.states]
        for fd, was in zip([*memory, *areas], carried.frames, strict=True):
            digest = FramesDigest()
            for window in windows(machine, fd):
                union.add(window.pfns, window.orders)
                digest.add(window)
            if digest.digest() != was:
                result.problems.append(f"{entry.name}: some of its pages are in other frames than before the jump")
    for fd in (incoming.tree_fd, incoming.map_fd):
        for window in windows(machine, fd) if fd >= 0 else ():
            union.add(window.pfns, window.orders)
    result.folios = union.folio_count
    if incoming.map is not None and all(e.state.sound for e in entries):
        missing, extra = incoming.map.difference(union)
        result.problems += [f"the folio map lacks {_said(d)}" for d in missing]
        result.problems += [f"the folio map lists {_said(d)}, which nothing has" for d in extra]
    return result


def _said(difference: OrderDifference) -> str:
    first = ", ".join(f"{folio.pfn:#x}" for folio in difference.first)
    return f"{difference.folios} folios of order {difference.order} (first frames {first})"
