# SPDX-License-Identifier: LGPL-2.1-or-later
"""`khoctl demo`: a whole live update of a simulated 1 TiB host, from guests that run to guests that run on.

The same program three times: switched on by a person, it builds the machine and its power supply; as init of the first kernel
it is the host with its guests and khod; as init of the second kernel, a new process that knows only what the machine's disk
and memory tell it, it is khod restoring, and whoever looks at what is left.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from khod import config, simulated
from khod.core.callers import Caller, Lifetime
from khod.core.host import Host
from khod.core.service import Registration
from khod.core.settings import Settings
from khod.core.state import State
from khod.core.views import EventView, SpanView, UpdateView
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE, Range
from khod.plugin.manager import PluginManager
from khod.simulated import image, power

GIB = 1 << 30
DEFAULT_MEMORY = "1T"
HYPERVISOR = 16
NOTES = "demo.json"
MARK = b"khod demo: this page belongs to "
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


@dataclass(frozen=True)
class Scale:
    """What stands on a host of `memory` bytes, in 1024ths of it: guests in 900, sixteen of the hypervisor's own in pages all
    over the host, and a quarter of one that somebody uses and nobody registers."""

    memory: int

    @property
    def unit(self) -> int:
        """1 GiB of 1 TiB; a guest's memory is made of folios of this size."""
        return self.memory >> 10

    @property
    def order(self) -> int:
        """Of a guest's folios."""
        return self.unit.bit_length() - 1 - PAGE_SHIFT

    @property
    def guests(self) -> int:
        """How many: 100 on 1 TiB."""
        return max(4, 100 * self.memory >> 40)

    @property
    def guest(self) -> int:
        """Bytes of one guest."""
        return 900 // self.guests * self.unit

    @property
    def parts(self) -> int:
        """Instances that the hypervisor's own memory is registered as."""
        return min(HYPERVISOR, self.guests)

    @property
    def bystander(self) -> int:
        """Bytes that nobody registers."""
        return self.unit // 4


@dataclass(frozen=True)
class Notes:
    """What the first boot leaves on the disk for the second: an honest witness, beside khod's own records."""

    guest: int
    """Physical address of the first guest's first page."""
    bystander: list[int]
    """Those of some of the bystander's pages."""
    resident: int
    """Most bytes that the first boot's processes had in memory together."""


def main(argv: list[str] | None = None) -> int:
    """Run it; returns 0 when everything that was registered came through and everything else was destroyed."""
    given = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="khoctl demo", description="A whole live update of a simulated host.")
    parser.add_argument("--memory", type=_scale, default=DEFAULT_MEMORY, metavar="SIZE")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args(given)
    scale: Scale = arguments.memory
    if (directory := os.environ.get(simulated.ENVIRONMENT)) is not None:
        return asyncio.run(_boot(Path(directory), scale, arguments.json))
    with tempfile.TemporaryDirectory(prefix="khod-demo-") as temporary:
        machine = Path(temporary) / "machine"
        base = 4 * GIB
        simulated.create(machine, memory=scale.memory, scratch=[Range(base, base + 4 * scale.unit)])
        (machine / "disk" / "bzImage").write_bytes(image.build())
        return power.run(machine, [sys.executable, "-m", "khod.demo", *given])


def _scale(text: str) -> Scale:
    """A size of memory that everything fits into. Raises ArgumentTypeError."""
    try:
        memory = config.size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error))
    if not (16 * GIB <= memory <= 1024 * GIB and memory.bit_count() == 1):
        raise argparse.ArgumentTypeError(f"{text}: the host has 16G, 32G, 64G, … up to 1T")
    return Scale(memory)


async def _boot(directory: Path, scale: Scale, as_json: bool) -> int:
    """One boot of the machine, as its init."""
    console = Console(stderr=as_json, highlight=False)
    process = simulated.connect(directory, "khod")
    host = Host(simulated.machine(process), Settings(), PluginManager())
    state = await host.start()
    if state is State.IDLE:
        await _first(directory, host, scale, console)
        return 1  # a jump does not return
    return await _second(directory, host, scale, console, as_json)


async def _first(directory: Path, host: Host, scale: Scale, console: Console) -> None:
    """Guests come up, somebody else uses memory too, and khod updates the host under them."""
    console.print(f"[bold]A host of {human(scale.memory)}[/] on kernel {host.boot.release}, simulated in {directory}")
    guests = simulated.connect(directory, "guests")
    with console.status("starting guests"):
        first = guests.memfd(scale.guest, order=scale.order)
        await _register(host, guests, _guest(0), first)
        for number in range(1, scale.guests):
            await _register(host, guests, _guest(number), guests.memfd(scale.guest, order=scale.order))
        for number in range(scale.parts):
            part = guests.memfd(HYPERVISOR // scale.parts * scale.unit, scatter=number + 1)
            await _register(host, guests, f"hypervisor-{number:02}", part)
        bystander = guests.memfd(scale.bystander)
        step = scale.bystander // 256
        for offset in range(0, scale.bystander, step):
            guests.write(bystander, offset, MARK + b"nobody")
    console.print(f"  {scale.guests} guests of {human(scale.guest)}, in folios of {human(scale.unit)}")
    pages = HYPERVISOR * scale.unit // PAGE_SIZE
    console.print(f"  {human(HYPERVISOR * scale.unit)} of the hypervisor's own, in {pages:,} pages scattered over the host")
    console.print(f"  {human(scale.bystander)} of somebody who did not register")
    await host.load(str(directory / "disk" / "bzImage"))
    plan = await host.plan()
    console.print(f"  an update needs {human(plan.memory.need)} of the {human(plan.memory.have)} that are free\n")
    events = await host.update(State.FROZEN)
    await _show(events, console, until="held")
    # Frames are final now: preserving moves pages, and nothing moves after it.
    (guest,) = await asyncio.to_thread(_addresses, guests, first, [0])
    frames = await asyncio.to_thread(_addresses, guests, bystander, range(0, scale.bystander >> PAGE_SHIFT, step >> PAGE_SHIFT))
    (directory / "disk" / NOTES).write_text(json.dumps(asdict(Notes(guest, frames, _resident()))))
    await host.proceed()
    await _show(events, console)


async def _register(host: Host, guests: simulated.Process, name: str, fd: int) -> None:
    """One guest: its memory is there, its first and last page say whose it is."""
    guests.call("populate", fd)
    size = int(guests.call("stat", fd)["size"])
    for offset in (0, size - PAGE_SIZE):
        guests.write(fd, offset, MARK + name.encode())
    asked = Registration(name=name, lifetime=Lifetime.PERSISTENT)
    await host.adopt(Caller.itself(), asked, guests.pid, [("memory", fd)])


def _addresses(process: simulated.Process, fd: int, pages: Any) -> list[int]:
    """Physical addresses of some pages of a file."""
    return [found[0] << PAGE_SHIFT for found in process.call("frames", fd, list(pages))]


async def _show(events: AsyncIterator[EventView], console: Console, until: str = "") -> None:
    """Tell of an update as it goes, until it ended or an event of the kind `until` came."""
    async for event in events:
        if event.kind == until:
            return
        if event.kind == "step":
            line = f"  {event.state:<10} {event.seconds:7.3f} s  {event.message}"
            console.print(line, no_wrap=True, overflow="ellipsis", crop=True, markup=False)
        elif event.kind in ("problem", "failed"):
            console.print(f"  {event.message}", style="red", markup=False)
        elif event.kind == "state" and event.state == State.PREPARING:
            console.print("[bold]The update[/]")
        elif event.kind == "state" and event.state == State.EXECUTING:
            console.print(f"  {event.state:<10}            reboot(LINUX_REBOOT_CMD_KEXEC)")


async def _second(directory: Path, host: Host, scale: Scale, console: Console, as_json: bool) -> int:
    """Look at what came through the jump, and at what did not."""
    console.print(f"\n[bold]A new kernel[/], jump number {host.boot.kexec_count}; khod is {host.state}\n")
    with console.status("comparing every folio, beside the guests"):
        await host.verified()
    notes = Notes(**json.loads((directory / "disk" / NOTES).read_text()))
    (update,) = await host.history(1)
    survived = {entry.name for entry in host.registry if await _intact(host, entry.name)}
    left = [host.machine.memory.read(address, len(MARK)) for address in notes.bystander]
    guest = host.machine.memory.read(notes.guest, len(MARK) + 9)
    report: dict[str, Any] = {
        "state": host.state,
        "memory": scale.memory,
        "registered": len(update.instances),
        "survived": len(survived),
        "checked": update.checked,
        "problems": [*host.problems, *update.problems],
        "unregistered_pages": len(left),
        "unregistered_survived": left.count(MARK),
        "witness": {"address": notes.guest, "bytes": guest.decode(errors="replace")},
        "spans": [asdict(span) for span in update.spans if not span.instance],
        "resident": max(notes.resident, _resident()),
    }
    await host.finish()
    if as_json:
        print(json.dumps(report))  # noqa: T201
    else:
        _print_timeline(update, console)
        _print_memory(report, survived, (notes.bystander[0], left[0]), scale, console)
    whole = report["survived"] == report["registered"] == scale.guests + scale.parts and guest == MARK + _guest(0).encode()
    return 0 if whole and MARK not in left and not report["problems"] else 1


async def _intact(host: Host, name: str) -> bool:
    """Whether a guest's first and last page still say whose they are."""
    answer = await host.claim(Caller.itself(), name)
    if answer.answer != "fds":
        return False
    (fd,) = answer.fds
    files = host.machine.files
    mark = MARK + name.encode()
    return all(files.read(fd, offset, len(mark)) == mark for offset in (0, files.stat(fd).size - PAGE_SIZE))


def _print_timeline(update: UpdateView, console: Console) -> None:
    table = _table("Timeline", "", "seconds", "plus or minus")
    for span in update.spans:
        if not span.instance:
            table.add_row(_phase(span), f"{span.seconds:.3f}", f"{span.uncertainty:.3f}" if span.uncertainty else "")
    console.print(table, "")


def _phase(span: SpanView) -> str:
    known = {
        "between": "between the two kernels' khods",
        "blackout": "blackout, first stopped to all restored",
    }
    return known.get(span.phase, span.phase)


def _print_memory(
    report: dict[str, Any], survived: set[str], bystander: tuple[int, bytes], scale: Scale, console: Console
) -> None:
    """What survived, what was destroyed, and a page of each."""
    table = _table("Memory", "", "size", "in folios of", "survived")
    count = scale.guests
    guests = sum(name.startswith("guest-") for name in survived)
    table.add_row(f"{count} guests", human(count * scale.guest), human(scale.unit), f"[green]{guests} of {count}")
    own = len(survived) - guests
    table.add_row("the hypervisor's own", human(HYPERVISOR * scale.unit), human(PAGE_SIZE), f"[green]{own} of {scale.parts}")
    spared, looked = report["unregistered_survived"], report["unregistered_pages"]
    table.add_row("not registered", human(scale.bystander), human(PAGE_SIZE), f"[red]{spared} of {looked} pages looked at")
    console.print(table, "")
    pages = _table("One page of each, by physical address", "", "address", "what is there now")
    witness = report["witness"]
    pages.add_row(_guest(0), f"{witness['address']:#x}", f"[green]{witness['bytes']}")
    pages.add_row("not registered", f"{bystander[0]:#x}", f"[red]{bystander[1][:12].hex(' ')} …")
    console.print(pages, "")
    console.print(f"[bold]Compared[/]: {report['checked']}")
    console.print(f"[bold]Resident[/]: {human(report['resident'])} at most, all processes of the demo together")
    for problem in report["problems"]:
        console.print(problem, style="red", markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, padding=(0, 2))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if name in ("seconds", "plus or minus", "size", "in folios of") else "left")
        table.columns[number].header_style = "dim"
    return table


def _guest(number: int) -> str:
    return f"guest-{number:03}"


def human(size: int) -> str:
    """Bytes for people: '9 GiB', '7.4 GiB'."""
    power_of = min((max(size, 1).bit_length() - 1) // 10, len(_UNITS) - 1)
    return f"{size / (1 << 10 * power_of):.1f}".removesuffix(".0") + f" {_UNITS[power_of]}"


def _resident() -> int:
    """The most that this process, its kernel and the power supply ever had in memory (proc(5), VmHWM), added up: more than
    they had at one time, since they share libraries."""
    total, pid = 0, os.getpid()
    for _ in range(3):
        status = Path(f"/proc/{pid}/status").read_text()
        total += int(re.findall(r"^VmHWM:\s+(\d+) kB", status, re.M)[0]) << 10
        pid = int(re.findall(r"^PPid:\s+(\d+)", status, re.M)[0])
    return total


if __name__ == "__main__":
    raise SystemExit(main())
