# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is looked at before an update, all in one place and with nothing touched: checks judge a `Situation` and ask nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from khod.abi import bzimage, cmdline, ikconfig, kernel_image
from khod.abi.fleet import Fleet
from khod.core import images
from khod.core.blocking import blocking
from khod.core.callers import Kind
from khod.core.driver import Continuity, StateArea
from khod.core.need import Need, reckon
from khod.core.ports import Image, KernelFacts, Machine, MemoryFigures
from khod.core.registry import Entry, Grade
from khod.core.settings import Settings
from khod.errors import FormatError, KhodError, MachineError

_INITRD_HEAD = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """The kernel to jump to."""

    image: Image
    header: bzimage.SetupHeader
    kernel: kernel_image.KernelImage | None
    """None when it could not be read; `problem` says why."""
    problem: str
    config: Mapping[str, str] | None
    """What it is built with; None when nobody knows."""
    config_source: str
    """Who says so, in words."""
    signed: bool | None
    """Whether it carries a signature; None when it cannot carry one."""
    initrd_size: int
    """0 for none."""
    initrd_head: bytes
    """Its first bytes."""

    @property
    def options(self) -> cmdline.CommandLine:
        """What it will be told."""
        return cmdline.parse(self.image.cmdline)

    def configured(self, option: str) -> bool | None:
        """Whether it is built with this, built in; None when nobody knows."""
        return None if self.config is None else self.config.get(option) == "y"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """One instance, and what is to be said against its coming along."""

    label: str
    objections: tuple[str, ...]
    sound: bool = True
    """Whether it is whole: one that is damaged, that no driver knows, or that is not finished, may not go along."""
    opaque: bool = False
    required: bool = True
    """Whether an update fails without it."""
    deserted: bool = False
    """Its client has to answer, and is not there."""
    continuity: Continuity = Continuity.PRESERVED
    """What an update gives it."""
    unsettled: bool = False
    """That is the least: what it is will be settled in preparing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """This host, now."""

    release: str
    facts: KernelFacts
    device: MachineError | None
    """Why /dev/liveupdate cannot be used."""
    figures: MemoryFigures
    need: Need
    size: int
    """Bytes that the next kernel's khod will retrieve."""
    files: int
    """Descriptors of them."""
    doubt: str
    """Why retrieving them might fail there, were it configured as this one is."""
    loaded: bool
    """Whether a kernel image is in place, which khod did not load."""
    instances: tuple[Instance, ...]
    stops: Mapping[str, str]
    """What the units that own or keep instances run when the host is stopped, by unit."""
    fleet: Fleet | None
    """What the fleet has agreed on, if it has."""
    fleet_problem: str
    """Why that cannot be read."""
    target: Target | None
    handled: int = 0
    """Bytes that are copied or hashed while everything stands still."""
    allowance: float = 0.0
    """Seconds that this may take."""
    freezing: float = 10.0
    """Seconds that one instance has to stand still without it."""
    huge: int = 0
    """Bytes that are to be made anew in the next kernel's pools of huge pages."""
    require: Continuity = Continuity.RESET
    """The least that every instance must be given."""
    late: Mapping[str, str] = field(default_factory=dict)
    """Instances that the initrd is to start, and will not: why, by their labels."""

    @property
    def options(self) -> cmdline.CommandLine:
        """What the running kernel was told."""
        return cmdline.parse(self.facts.cmdline)


class Surveyor:
    """Looks. Keeps what it read of the last image, for reading one takes longer than all else."""

    def __init__(self, machine: Machine, settings: Settings) -> None:
        self._machine, self._settings = machine, settings
        self._last: tuple[str, Target] | None = None

    async def look(self, entries: Sequence[Entry], image: Image | None, deserted: Sequence[Entry] = ()) -> Situation:
        """The situation with these instances and this image. `deserted` are those whose client has to answer, and is gone."""
        instances = [await self._instance(entry, entries, entry in deserted) for entry in entries]
        return await blocking(self._look, entries, image, tuple(instances))

    def _look(self, entries: Sequence[Entry], image: Image | None, instances: tuple[Instance, ...]) -> Situation:
        machine = self._machine
        device: MachineError | None = None
        try:
            machine.liveupdate.probe()
        except MachineError as error:
            device = error
        figures = machine.memory.figures()
        need = reckon(entries, machine.files, figures, self._settings.reserve)
        size, files = _retrieved(machine, entries)
        try:
            doubt = machine.custody.doubt(size, files)
        except KhodError as error:
            doubt = str(error)
        fleet, problem = self._fleet()
        handled = sum(entry.declaration.handled for entry in entries)
        return Situation(
            release=machine.boot.boot().release,
            facts=machine.kernel.facts(),
            device=device,
            figures=figures,
            need=need,
            size=size,
            files=files,
            doubt=doubt,
            loaded=machine.kexec.loaded(),
            instances=instances,
            stops=machine.manager.stop_commands(
                {e.owner.name for e in entries if e.owner.kind is Kind.UNIT}, {e.keeper_pid for e in entries if e.keeper_pid}
            ),
            fleet=fleet,
            fleet_problem=problem,
            target=self._target(image) if image else None,
            handled=handled,
            allowance=self._settings.allowance(handled),
            freezing=self._settings.freezing,
            huge=_huge(machine, entries),
            require=Continuity(self._settings.require),
            late=_late(self._settings, entries),
        )

    async def _instance(self, entry: Entry, entries: Sequence[Entry], deserted: bool) -> Instance:
        opaque = entry.grade is Grade.OPAQUE
        missing = entry.needs and entry.needs - {other.key for other in entries}
        unmet = [f"{entry.label} requires {name}, which is not registered" for _, name in sorted(missing)]
        return Instance(
            label=entry.label,
            objections=(*unmet, *await self._objections(entry, entries)),
            sound=entry.state.sound and not entry.unfinished,
            opaque=opaque,
            required=entry.required,
            deserted=deserted,
            continuity=entry.declaration.continuity,
            unsettled=entry.declaration.unsettled,
        )

    async def _objections(self, entry: Entry, entries: Sequence[Entry]) -> list[str]:
        if not entry.state.sound or (entry.driver is None and entry.grade is Grade.REGISTERED):
            return [f"{entry.label} is {entry.state}: {entry.problem}"]
        if entry.unfinished:
            return [entry.unfinished]
        if entry.driver is None:
            return []
        try:
            probe = await entry.driver.probe(self._machine)
            if not probe.supported:
                return [f"{entry.label}: driver {entry.driver.name} cannot work here: {probe.reason}"]
            return list(await entry.driver.check(entry.view(self._machine, entries)))
        except KhodError as error:
            return [f"{entry.label}: {error}"]

    def _fleet(self) -> tuple[Fleet | None, str]:
        try:
            return images.profile(str(self._settings.fleet)), ""
        except KhodError as error:
            return None, str(error)

    def _target(self, image: Image) -> Target:
        if self._last is None or self._last[0] != image.sha256:
            self._last = image.sha256, read(image)
        last = self._last[1]
        target = replace(last, image=image)  # its command line may be another
        if target.config is None and target.kernel and (text := images.config_beside(image, target.kernel.release)):
            source = f"config-{target.kernel.release} beside it"
            return replace(target, config=ikconfig.parse(text), config_source=source)
        return target


def read(image: Image) -> Target:
    """Everything that the files of an image say. They were checked when it was opened, so that they have a header."""
    data = images.kernel_bytes(image, kernel_image.MAX_FILE)
    initrd_size, initrd_head = images.initrd_size_and_head(image, _INITRD_HEAD)
    kernel, problem = None, ""
    try:
        kernel = kernel_image.read(data)
    except FormatError as error:
        problem = error.message
    return Target(
        image=image,
        header=bzimage.parse(data[: bzimage.HEADER_SIZE]),
        kernel=kernel,
        problem=problem,
        config=kernel.config if kernel else None,
        config_source="the image itself",
        signed=bzimage.signature(data[: bzimage.HEADER_SIZE]),
        initrd_size=initrd_size,
        initrd_head=initrd_head,
    )


def _late(settings: Settings, entries: Sequence[Entry]) -> dict[str, str]:
    """What the restore stage will find against starting an instance (`khod.early.tree.Instance`, `khod.driven`)."""
    known = {(str(entry.owner), entry.name): entry for entry in entries}
    found = {}
    for owner, names in settings.early:
        for name in names:
            entry = known.get((owner, name))
            why = "it is not registered" if entry is None else _late_one(settings, entry, names)
            if why:
                found[f"{name} of {owner}" if entry is None else entry.label] = why
    return found


def _late_one(settings: Settings, entry: Entry, group: Sequence[str]) -> str:
    """`group`: all instances that are started together."""
    alone = len(group) == 1
    if entry.grade is Grade.OPAQUE:
        return "its contents are its owner's"
    if others := sorted({name for owner, name in entry.needs if owner != entry.owner or name not in group}):
        return f"it needs {', '.join(others)}, which is not started with it (`also`)"
    if alone and entry.declaration.made:
        return "its driver makes descriptors of it anew, and it is started alone (`also`)"
    return "every byte of it is to be compared" if alone and settings.full else ""


def _huge(machine: Machine, entries: Sequence[Entry]) -> int:
    made = [machine.files.stat(entry.fds[name]) for entry in entries for name in entry.declaration.made if name in entry.fds]
    return sum(stat.size for stat in made if stat.kind == "hugetlb")


def _retrieved(machine: Machine, entries: Sequence[Entry]) -> tuple[int, int]:
    """Bytes and descriptors, a session for each instance among them, as `khod.core.restore` asks for them to be proven."""
    size = files = 0
    for entry in entries:
        preserved = [p.fd for p in entry.declaration.fds if p.name not in entry.shares]
        size += sum(machine.files.stat(fd).size for fd in preserved)
        size += sum(StateArea.file_size(bound) for bound in entry.bounds)
        files += 1 + len(entry.declaration.fds) + len(entry.bounds) + len(entry.declaration.made)
    return size, files
