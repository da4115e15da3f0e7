# SPDX-License-Identifier: LGPL-2.1-or-later
"""Restoration: every instance retrieved, compared with what was noted of it, and given back to its driver.

Runs in dependency order, independent instances at once. Nothing here releases anything: an instance with which something is
wrong stays in khod's hands, whole, and is told apart (decisions 21 to 23). No numpy anywhere.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from khod.core import sample
from khod.core.alerts import Alert, alert
from khod.core.blocking import blocking
from khod.core.book import Book
from khod.core.driver import Declaration, Drivers, Preserve, Request, StateArea
from khod.core.incoming import Incoming
from khod.core.node import Carried
from khod.core.ports import Machine
from khod.core.registry import Entry, Grade, InstanceState, Key, order, users
from khod.core.settings import Settings
from khod.early.record import Started
from khod.errors import DeadlinePassed, FormatError, KhodError

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

    def __init__(self, machine: Machine, settings: Settings, drivers: Drivers, incoming: Incoming, book: Book) -> None:
        self.machine, self.settings, self.drivers, self.incoming, self.book = machine, settings, drivers, incoming, book
        self.verification = Verification()
        self._users: Mapping[Key, list[Entry]] = {}
        self.on_instance: Callable[[Entry], None] = lambda entry: None
        """Told of each instance as it is done."""
        self.limit = settings.restoring + settings.allowance(sum(map(_handled, incoming.carried)))
        """Seconds for one instance: those of a generation are restored at once, and share what the machine can copy."""
        self.running: Mapping[str, Started] = {}
        """By their sessions: those that were compared and started before khod, and have been written to since."""

    async def restore(self, others: Mapping[Key, Entry]) -> list[Entry]:
        """All instances of the tree whose sessions are not over, as entries: RESTORED, or WAITING, DAMAGED or QUARANTINED with
        the reason. `others` are there already: registered, or finished, before khod was started anew."""
        carried = {c.key: c for c in self.incoming.carried if c.session not in self.book.contents.over}
        entries = {key: self._entry(c) for key, c in carried.items()}
        self._users = users(entries.values())
        generations = order(entries.values())
        await blocking(self._prove, [e for generation in generations for e in generation], carried)
        for generation in generations:
            await asyncio.gather(*(self._one(e, carried[e.key], {**others, **entries}) for e in generation))
        return list(entries.values())

    async def take_custody(self, carried: list[Carried]) -> list[Entry]:
        """Retrieve the sessions and descriptors of instances whose bookkeeping failed, as far as that is proven to succeed;
        nothing is compared."""
        carried = [c for c in carried if c.session not in self.book.contents.over]
        entries = {c.key: self._entry(c) for c in carried}
        await blocking(self._prove, list(entries.values()), {c.key: c for c in carried})
        for one in carried:
            entry = entries[one.key]
            if entry.state is InstanceState.WAITING:
                continue
            entry.state, entry.problem = InstanceState.DAMAGED, f"not verified: {self.incoming.verdict}"
            try:
                await blocking(self._retrieve, entry, one, entries)
            except KhodError as error:
                entry.problem += f"; {error}"
        return list(entries.values())

    def _entry(self, carried: Carried) -> Entry:
        driver = None if carried.grade is Grade.OPAQUE else self.drivers.for_compatible(carried.compatible)
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
            incoming=carried.session,
            grade=carried.grade,
            lifetime=carried.lifetime,
            client_states=tuple(carried.bound(name) for name in carried.client_states),
            shares=dict(carried.shares),
            shareable=carried.shareable,
        )

    def _prove(self, entries: list[Entry], carried: Mapping[Key, Carried]) -> None:
        """Decision 19: a retrieve that fails loses the file, so none is tried that is not proven to succeed."""
        size = files = 0
        proven = []
        for entry in entries:
            one = carried[entry.key]
            if one.session in self.book.contents.proven:
                continue
            # What is made anew goes into custody as well.
            more, most = size + sum(one.sizes), files + 1 + len(one.fds) + len(one.states) + len(one.made)
            if doubt := self.machine.custody.doubt(more, most):
                self._mark(entry, InstanceState.WAITING, f"not retrieved yet, for that could fail and lose it: {doubt}")
                continue
            size, files = more, most
            proven.append(one.session)
        if proven:
            self.book.note_proven(proven)

    async def _one(self, entry: Entry, carried: Carried, others: Mapping[Key, Entry]) -> None:
        try:
            if entry.state is InstanceState.WAITING:
                return
            async with asyncio.timeout(self.limit):
                await self._restore_one(entry, carried, others)
        except TimeoutError:
            self._mark(entry, InstanceState.DAMAGED, str(DeadlinePassed(f"no end within {self.limit:g} s")))
        except KhodError as error:
            self._mark(entry, InstanceState.DAMAGED, str(error))
        except Exception as error:  # a bug of ours must not end the process that holds everybody's memory
            logger.exception("instance %s", entry.label)
            self._mark(entry, InstanceState.DAMAGED, f"khod failed at it: {error!r}")
        finally:
            self.on_instance(entry)

    async def _restore_one(self, entry: Entry, carried: Carried, others: Mapping[Key, Entry]) -> None:
        await blocking(self._retrieve, entry, carried, others)
        if entry.grade is Grade.OPAQUE:
            entry.state = InstanceState.RESTORED
            return
        page = self.book.contents.pages.get(entry.key)
        if page is not None and page.state in (InstanceState.DAMAGED, InstanceState.QUARANTINED):
            self._mark(entry, page.state, page.problem)
            return
        fresh = page is None or page.state is InstanceState.WAITING
        if carried.session in self.running:  # it was compared in the initrd, and has been written to since
            self.verification.frames += self.running[carried.session].frames
            self.verification.pages += self.running[carried.session].pages
        elif fresh:  # else it was compared, and has been written to since
            await blocking(self._compare, entry, carried)
        if entry.driver is None:
            self._mark(entry, InstanceState.QUARANTINED, f"no plugin here reads {carried.compatible!r}")
            return
        if unsound := [others[key].label for key in entry.needs if key in others and not others[key].state.sound]:
            raise FormatError(f"{entry.label}: requires {', '.join(unsound)}, which did not come through sound")
        if page is None or page.state is InstanceState.WAITING:
            made = await entry.driver.restore(entry.view(self.machine, others.values(), self._users.get(entry.key, ())))
        else:  # what it made is in its owner's hands: it is in custody, and not made twice
            made = {name: await blocking(self.machine.custody.take, page.deposits[name]) for name in carried.made}
        entry.fds.update(made)
        if missing := sorted(set(carried.made) ^ set(made)):
            raise FormatError(f"{entry.label}: its driver made {sorted(made)} anew, and not {missing}")
        declared = await entry.driver.declare(self.machine, Request(entry.name, dict(entry.fds), entry.options))
        if declared.unsettled:  # until the next update settles it: as it came
            declared = replace(declared, strategy=carried.strategy, continuity=carried.continuity)
        entry.declaration = declared
        entry.properties = dict(entry.declaration.properties)
        entry.state = InstanceState.RESTORED

    def _mark(self, entry: Entry, state: InstanceState, problem: str) -> None:
        fields = {"KHOD_INSTANCE": entry.name, "KHOD_OWNER": str(entry.owner)}
        alert(logger, Alert.INSTANCE_UNSOUND, "instance %s: %s: %s", entry.label, state, problem, **fields)
        entry.state, entry.problem = state, problem
        self.verification.problems.append(f"{entry.label}: {problem}")

    def _retrieve(self, entry: Entry, carried: Carried, others: Mapping[Key, Entry]) -> None:
        """Its session and everything in it. What fails is raised after the rest was tried: each is somebody's memory."""
        machine = self.machine
        entry.session = machine.liveupdate.retrieve_session(carried.session)
        failures: list[KhodError] = []
        for token, name in enumerate((*carried.fds, *carried.states)):
            try:
                if name in carried.shares and token < len(carried.fds):
                    fd = self._shared(entry, name, others)
                else:
                    fd = machine.liveupdate.retrieve_fd(entry.session, token)
            except KhodError as error:
                failures.append(error)
                continue
            if token < len(carried.fds):
                entry.fds[name] = fd
            else:
                entry.states[name] = StateArea(machine.files, fd, carried.bound(name))
        entry.declaration = Declaration(
            carried.compatible,
            tuple(Preserve(name, fd) for name, fd in entry.fds.items()),
            properties=carried.properties,
            size=sum(carried.sizes),
        )
        if failures:
            raise failures[0]

    def _shared(self, entry: Entry, name: str, others: Mapping[Key, Entry]) -> int:
        """A descriptor of a file that is in another instance's session, or, when that is over, in custody for this one."""
        page = self.book.contents.pages.get(entry.key)
        if page is not None and name in page.deposits:
            return self.machine.custody.take(page.deposits[name])
        key, theirs = entry.shares[name]
        holder = others.get(key)
        if holder is None or theirs not in holder.fds:
            raise FormatError(f"{entry.label}: {name!r} is a file of {key[1]}, which did not come through with it")
        return self.machine.files.duplicate(holder.fds[theirs])

    def _compare(self, entry: Entry, carried: Carried) -> None:
        """Sizes, the sample's frames and orders, the sample's bytes; every byte where that was noted."""
        machine, seen = self.machine, carried.sample
        memory = [entry.fds[carried.fds[index]] for index in carried.memory]
        areas = [entry.states[name].fd for name in carried.states]
        for fd, size in zip([*memory, *areas], carried.sizes, strict=True):
            if (found := machine.files.stat(fd).size) != size:
                raise FormatError(f"{entry.label}: a file came back with {found} bytes, it had {size}")
        sizes = carried.sizes[: len(memory)]
        chosen = sample.choose(self.incoming.update, entry.label, sizes, len(seen.frames))
        if len(chosen) != len(seen.frames):
            raise FormatError(f"{entry.label}: a sample of {len(seen.frames)} pages was noted of {len(chosen)} that there are")
        self._compare_frames(entry, carried, memory, chosen)
        _, digest = sample.digest(machine.files, memory, chosen, lambda done: done >= seen.checked)
        if digest != seen.digest:
            raise FormatError(f"{entry.label}: bytes differ in its sample of {seen.checked} pages")
        self.verification.pages += seen.checked
        if carried.content:
            if sample.content_digest(machine.files, memory, sizes) != carried.content:
                raise FormatError(f"{entry.label}: bytes differ")
            self.verification.full += 1

    def _compare_frames(self, entry: Entry, carried: Carried, memory: list[int], chosen: list[tuple[int, int]]) -> None:
        found = sample.locations(self.machine.frames, memory, chosen)
        for (index, page), before, now in zip(chosen, carried.sample.frames, found, strict=True):
            name = carried.fds[carried.memory[index]]
            if before != now:
                (pfn_was, folio_was), (pfn, folio) = sample.unpacked(before), sample.unpacked(now)
                raise FormatError(
                    f"{entry.label}: page {page} of {name!r} is frame {pfn:#x} of order {folio.order},"
                    f" it was {pfn_was:#x} of order {folio_was.order}"
                )
            _, folio = sample.unpacked(now)
            if self.incoming.map is not None and not self.incoming.map.contains(folio.pfn, folio.order):
                raise FormatError(f"{entry.label}: page {page} of {name!r}: folio {folio.pfn:#x} is not in the folio map")
        self.verification.frames += len(chosen)


def _handled(carried: Carried) -> int:
    """Bytes of an instance that are read whole before it is handed out: its driver's, and khod's own where all are compared."""
    return carried.handled + (sum(carried.sizes[: len(carried.memory)]) if carried.content else 0)
