# SPDX-License-Identifier: LGPL-2.1-or-later
"""`khoctl demo`: a whole live update of a simulated 1 TiB host, from guests that run to guests that run on.

The same program three times: switched on by a person, it builds the machine and its power supply; as init of the first kernel
it is the host with its guests and khod; as init of the second kernel, a new process that knows only what the machine's disk
and memory tell it, it is khod restoring, and whoever looks at what is left.
"""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from khod import simulated
from khod.core.host import Host
from khod.core.settings import Settings
from khod.core.state import State
from khod.core.views import EventView, UpdateView
from khod.folio.units import PAGE_SIZE, Range
from khod.plugin.manager import PluginManager
from khod.simulated import image, power

GIB = 1 << 30
MEMORY = 1 << 40
GUESTS = 100
GUEST_SIZE = 9 * GIB
GIB_ORDER = 18
SCATTERED = 16
"""GiB of the hypervisor's own memory, in 4 KiB pages all over the host."""
BYSTANDER = 256 << 20
"""Bytes that somebody uses and nobody registers."""
NOTES = "demo.json"
MARK = b"khod demo: this page belongs to "


@dataclass(frozen=True)
class Notes:
    """What the first boot leaves on the disk for the second: an honest witness, beside khod's own records."""

    bystander: list[int]
    """Frames of the bystander's pages."""
    built: float
    ready: float


def main(argv: list[str] | None = None) -> int:
    """Run it; returns 0 when everything that was registered came through and everything else was destroyed."""
    arguments = sys.argv[1:] if argv is None else argv
    as_json = "--json" in arguments
    if (directory := os.environ.get(simulated.ENVIRONMENT)) is not None:
        return asyncio.run(_boot(Path(directory), as_json))
    with tempfile.TemporaryDirectory(prefix="khod-demo-") as temporary:
        machine = Path(temporary) / "machine"
        scratch = [Range(4 * GIB, 8 * GIB)]
        simulated.create(machine, memory=MEMORY, scratch=scratch)
        (machine / "disk" / "bzImage").write_bytes(image.build())
        init = [sys.executable, "-m", "khod.demo", *(["--json"] if as_json else [])]
        return power.run(machine, init)


async def _boot(directory: Path, as_json: bool) -> int:
    """One boot of the machine, as its init."""
    console = Console(stderr=as_json, highlight=False)
    process = simulated.connect(directory, "khod")
    host = Host(simulated.machine(process), Settings(), PluginManager())
    state = await host.start()
    if state is State.IDLE:
        await _first(directory, host, console)
        return 1  # a jump does not return
    return await _second(directory, host, state, console, as_json)


async def _first(directory: Path, host: Host, console: Console) -> None:
    console.print(f"[bold]A host of {MEMORY // GIB} GiB[/] on kernel {host.boot.release}, simulated: {directory}")
    started = time.monotonic()
    guests = simulated.connect(directory, "guests")
    with console.status("starting guests"):
        for number in range(GUESTS):
            await _register(host, guests, f"guest-{number:03}", guests.memfd(GUEST_SIZE, order=GIB_ORDER))
        for number in range(SCATTERED):
            await _register(host, guests, f"hypervisor-{number:02}", guests.memfd(GIB, scatter=number + 1))
        bystander = guests.memfd(BYSTANDER)
        for offset in range(0, BYSTANDER, 1 << 20):
            guests.write(bystander, offset, MARK + b"nobody")
    frames = [found[0] for found in guests.call("frames", bystander, list(range(0, BYSTANDER >> 12, 256)))]
    built = time.monotonic() - started
    console.print(
        f"  {GUESTS} guests of {GUEST_SIZE // GIB} GiB in 1 GiB folios, {SCATTERED} GiB of the hypervisor's in"
        f" {SCATTERED * GIB // PAGE_SIZE:,} scattered pages, {BYSTANDER >> 20} MiB of somebody who did not register"
    )
    notes = Notes(frames, built, time.monotonic())
    (directory / "disk" / NOTES).write_text(json.dumps(asdict(notes)))
    await host.load(str(directory / "disk" / "bzImage"))
    plan = await host.plan()
    console.print(f"  an update needs {plan.memory.need / GIB:.1f} GiB of the {plan.memory.have / GIB:.0f} GiB that are free\n")
    await _show(await host.update(), console)


async def _register(host: Host, guests: simulated.Process, name: str, fd: int) -> None:
    """One guest: its memory is there, its first and last page say whose it is."""
    guests.call("populate", fd)
    size = int(guests.call("stat", fd)["size"])
    for offset in (0, size - PAGE_SIZE):
        guests.write(fd, offset, MARK + name.encode())
    await host.adopt(name, "guestmemfd", guests.pid, [("memory", fd)], owner="uid:0")
    guests.close(fd)


async def _show(events: AsyncIterator[EventView], console: Console) -> None:
    console.print("[bold]The update[/]")
    with console.status("") as live:
        async for event in events:
            live.update(f"{event.state}: {event.message[:100]}")
            if event.kind == "step":
                console.print(
                    f"  {event.state:<10} {event.seconds:7.3f} s  {event.message}",
                    no_wrap=True,
                    overflow="ellipsis",
                    markup=False,
                )
            elif event.kind in ("problem", "failed"):
                console.print(f"  [red]{event.message}[/]")
            elif event.kind == "state" and event.state == State.EXECUTING:
                console.print("  executing             reboot(LINUX_REBOOT_CMD_KEXEC)")


async def _second(directory: Path, host: Host, state: State, console: Console, as_json: bool) -> int:
    console.print(f"\n[bold]A new kernel[/], jump number {host.boot.kexec_count}; khod is {state}")
    with console.status("comparing every folio, beside the guests"):
        await host.verified()
    notes = Notes(**json.loads((directory / "disk" / NOTES).read_text()))
    (update,) = await host.history(1)
    survived = [entry.name for entry in host.registry if await _intact(host, entry.name)]
    spared = sum(host.machine.memory.read(pfn << 12, len(MARK)) == MARK for pfn in notes.bystander)
    await host.finish()
    report: dict[str, Any] = {
        "state": state,
        "registered": len(update.instances),
        "survived": len(survived),
        "checked": update.checked,
        "problems": [*host.problems, *update.problems],
        "bystander_pages": len(notes.bystander),
        "bystander_spared": spared,
        "spans": [asdict(span) for span in update.spans if not span.instance],
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
    }
    if as_json:
        print(json.dumps(report))  # noqa: T201
    else:
        _print_report(report, update, console)
    whole = len(survived) == len(update.instances) == GUESTS + SCATTERED and not spared and not report["problems"]
    return 0 if whole else 1


async def _intact(host: Host, name: str) -> bool:
    """Whether a guest's first and last page still say whose they are."""
    answer = await host.claim(name, owner="uid:0")
    if answer.answer != "fds":
        return False
    (fd,) = answer.fds
    files = host.machine.files
    mark = MARK + name.encode()
    return all(files.read(fd, offset, len(mark)) == mark for offset in (0, files.stat(fd).size - PAGE_SIZE))


def _print_report(report: dict[str, Any], update: UpdateView, console: Console) -> None:
    table = Table("phase", "seconds", "plus or minus", title="Timeline", title_justify="left", box=None, header_style="bold")
    for span in update.spans:
        if not span.instance:
            table.add_row(span.phase, f"{span.seconds:.3f}", f"{span.uncertainty:.3f}" if span.uncertainty else "")
    console.print(table)
    console.print(f"\n[bold]Compared[/]: {report['checked']}")
    console.print(f"[green]Survived[/]: {report['survived']} of {report['registered']} registered instances, bytes and frames")
    destroyed = report["bystander_pages"] - report["bystander_spared"]
    console.print(f"[red]Destroyed[/]: {destroyed} of {report['bystander_pages']} pages looked at that nobody had registered")
    for problem in report["problems"]:
        console.print(f"[red]{problem}[/]")


if __name__ == "__main__":
    raise SystemExit(main())
