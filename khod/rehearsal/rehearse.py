# SPDX-License-Identifier: LGPL-2.1-or-later
"""The update that is about to be made, made first in a virtual machine on this host.

The machine starts from the image of the running kernel, with this host's root as its own, read-only; in it khod runs from the
same files, with the same configuration and plugins, and khoctl makes the update into the same target. Nothing of the host is
touched: what the machine writes is in memory, on a disk of its own, or in a directory for the run's logs.

QEMU is run directly, and not through virtme-ng: what that puts around a kernel's start takes longer, where the machine is
emulated, than the whole of the jump does, and has no place for a second kernel that is jumped to.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from khod import config
from khod.abi.cmdline import words as split
from khod.core.views import ImageView, InstanceView
from khod.errors import InvalidRequest
from khod.rehearsal import ground, machine, qemu, report
from khod.rehearsal.machine import Machine, Record, Result
from khod.rehearsal.report import Report, Verdict
from khod.rehearsal.shapes import EXAMPLE, Shape, huge_pages, scaled, shapes

SHARE = 4
"""Of the machine's memory stand-ins take one part in so many: the rest is scratch, two kernels' and khod's."""
RESERVE = 16 << 20
"""The setting `reserve` in there, where there is less memory to be kept."""
OWN = ("state_directory", "socket", "machine", "reserve", "jump", "luo_agent")
"""Settings that are the machine's own."""
DROPPED = frozenset(
    ("root", "rootfstype", "rootflags", "rootwait", "rootdelay", "ro", "rw", "init", "rdinit", "initrd", "resume", "console",
     "earlycon", "earlyprintk", "quiet", "panic", "BOOT_IMAGE", "crashkernel", "mem", "memmap", "tsc_early_khz", "hugepages",
     "hugepagesz", "default_hugepagesz", "kho_scratch", "reserve_mem", "ip", "nfsroot")
)  # fmt: skip
"""Words of a command line that are about this host's disks, consoles and amounts of memory."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be rehearsed."""

    target: Path
    instances: Sequence[InstanceView]
    running: Path | None = None
    """Instead of the image of the running kernel."""
    note: str = ""
    """What else is to be said of how the rehearsal differs; ''."""
    initrd: str = ""
    """Of the target on the host: said to have no part in it."""
    cmdline: str | None = None
    """The target's on the host; None for the running kernel's."""
    config: Path | None = None
    overrides: Sequence[str] = ()
    memory: int = 2 << 30
    cpus: int = 2
    deadline: float = 900
    """Seconds for all of it."""


def nothing(text: str) -> None:
    """Nobody listens."""


def rehearse(plan: Plan, say: Callable[[str], None] = nothing) -> Report:
    """Make the update in a machine, and tell how it went; `say` hears what happens meanwhile. What the run leaves is removed
    when the verdict is `works` or `blocked`.

    Raises InvalidRequest and Refused where it cannot be rehearsed: nothing was started then.
    """
    ground.require_programs()
    ground.require_memory(plan.memory)
    ground.require_disk()
    running, target = ground.running(plan.running), ground.read(plan.target, "target")
    found, left_out = shapes(plan.instances)
    made = scaled(found or [EXAMPLE], plan.memory // SHARE)
    settings, differs = _settings(plan)
    differs += _differences(plan, running, found, made)
    host = _words(Path("/proc/cmdline").read_text())
    if plan.running is not None:  # as if it ran, and could do it
        host = tuple(dict.fromkeys((*host, "kho=on", "liveupdate=on")))
    pools = (f"hugepages={pages}",) if (pages := huge_pages(made)) else ()
    began = time.monotonic()

    def told(record: Record) -> None:
        say(f"{time.monotonic() - began:7.1f}  {_told(record)}")

    def parameters(directory: Path) -> dict[str, Any]:
        own = (*qemu.common_words(), *machine.root_words(directory), *pools)
        words = host if plan.cmdline is None else _words(plan.cmdline)
        return {
            "target": str(target.path),
            "cmdline": " ".join((*own, *words)),
            "settings": settings,
            "shapes": msgspec.to_builtins(made),
            "overrides": list(plan.overrides),
        }

    say(f"{0:7.1f}  starting Linux {running.image.release}, under emulation")
    result = machine.run(
        Machine(
            Path(__file__).with_name("played.py"),
            running.path,
            python=(sys.executable, "-S"),
            environment={"PYTHONPATH": ":".join(importable())},
            memory=f"{plan.memory >> 20}M",
            cpus=plan.cpus,
            options=(),
            cmdline=(*pools, *host),
            told=told,
            boot_deadline=plan.deadline,
            stage_deadline=plan.deadline,
            deadline=plan.deadline,
        ),
        parameters,
        keep=True,  # a run that came to its end may have a bad one
    )
    return _report(result, running, target, left_out, differs, time.monotonic() - began)


def _report(
    result: Result,
    running: ground.Kernel,
    target: ground.Kernel,
    left_out: dict[str, str],
    differs: list[str],
    seconds: float,
) -> Report:
    verdict, reason = report.judge(result)
    told = {record.name: record.facts for record in result.records}
    update = report.update(result)
    kept = verdict not in (Verdict.WORKS, Verdict.BLOCKED)
    if not kept:
        result.discard()
    return Report(
        verdict=verdict,
        reason=reason,
        running=told.get("started", {}).get("release", running.image.release),
        target=target.image.release,
        landed=told.get("landing", {}).get("release", ""),
        seconds=seconds,
        parts=report.parts(result),
        left_out=left_out,
        differs=differs,
        checks=report.checks(result),
        ledger=update.spans if update else (),
        checked=update.checked if update else "",
        problems=update.problems if update else (),
        overridden=update.overridden if update else (),
        logs=str(result.directory) if kept else "",
    )


def _told(record: Record) -> str:
    """A record, for people."""
    facts = record.facts
    match record.name:
        case "started" | "landing":
            return f"Linux {facts['release']} is up, starting khod"
        case "registered":
            return f"registered: {len(facts['sizes'])} stand-ins, {sum(facts['sizes'].values())} bytes"
        case "preflight":
            faults = [row["name"] for row in facts["checks"] if row["verdict"] == "blocker"]
            return f"preflight: {', '.join(faults) or 'nothing'} in the way"
        case "landed":
            return f"khod is {facts['state']}"
        case "blocked" | "undone":
            return f"{record.name}: {facts['said']}"
    return f"{record.name}: {facts.get('message', '')}"


def _words(cmdline: str) -> tuple[str, ...]:
    """What of a command line of this host goes into the machine's; what follows ``--`` is its init's."""
    words = split(cmdline)
    options = words[: words.index("--")] if "--" in words else words
    return tuple(word for word in options if word.partition("=")[0] not in DROPPED)


def _settings(plan: Plan) -> tuple[dict[str, Any], list[str]]:
    """This host's configuration as the machine's khod gets it, and how it differs. Raises InvalidRequest where it is none."""
    path = plan.config or config.DEFAULT_PATH
    raw: dict[str, Any] = {}
    if plan.config is not None or path.exists():
        config.load(path)  # as a whole it must be one
        import yaml

        raw = yaml.safe_load(path.read_text()) or {}
    ours = {key: value for key, value in raw.items() if key not in OWN}
    differs = [f"the setting {key} is the machine's own" for key in raw if key in OWN]
    return {**ours, "reserve": RESERVE}, differs


def _differences(plan: Plan, running: ground.Kernel, found: Sequence[Shape], made: Sequence[Shape]) -> list[str]:
    said = [plan.note] if plan.note else []
    if running.image.release != os.uname().release:
        said.append(f"Linux {running.image.release} stands in for the running {os.uname().release}")
    if not found:
        said.append(f"nothing that a stand-in can be made of is registered: one of {EXAMPLE.size} bytes was")
    before, after = (sum(shape.size for shape in all_of) for all_of in (found, made))
    if found and after < before:
        said.append(f"memory is smaller by a factor of {math.ceil(before / max(1, after))}: {after} bytes for {before}")
    if plan.initrd:
        said.append(f"the initrd {plan.initrd} has no part in it: the machine's root is this host's, without one")
    said.append("there are no devices but the machine's own, and scratch areas are what its kernel makes of its memory")
    said.append("clients do not answer: the stand-ins' owner is root, and stands still by itself")
    return said


def importable() -> list[str]:
    """The directories that this Python imports khod, its dependencies and its plugins from: with them it needs no `site`, whose
    hooks for editable installations take a second under emulation."""
    found = [entry for entry in sys.path if entry and Path(entry).is_dir()]
    modules = ["khod", *(point.module.partition(".")[0] for point in importlib.metadata.entry_points(group="khod"))]
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.origin:
            at = Path(spec.origin).parent
            found.append(str(at.parent if spec.submodule_search_locations else at))
    return list(dict.fromkeys(found))


def target_of(kernel: Path | None, append: str | None, loaded: ImageView | None) -> tuple[Path, str, str | None]:
    """Kernel, initrd and command line that the update would jump to. Raises InvalidRequest where none is named."""
    if kernel is not None:
        return kernel, "", append
    if loaded is None:
        raise InvalidRequest("no kernel to jump to is named", hint="`khoctl load KERNEL`, or --kernel here")
    return Path(loaded.kernel), loaded.initrd, loaded.cmdline if append is None else append
