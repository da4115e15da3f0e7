# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl inspect beside the kernel's own pagemap: while an update is held at frozen, after the jump, and held again there."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.vm.content import fill
from tests.vm.driving import Khod, page_flags, pagemap
from tests.vm.guest import Guest

MIB = 1 << 20
KINDS = {"ram": 16 * MIB, "odd": 3 * MIB + 4096, "thp": 4 * MIB}
THP = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def make(name: str, size: int) -> int:
    fd = os.memfd_create(name, 0x1 | 0x2 | 0x10)  # MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_EXEC
    THP.write_text("always" if name == "thp" else "never")
    os.ftruncate(fd, size)
    fill(fd, size)
    return fd


def inspect(vm: Guest, khod: Khod, name: str) -> dict[str, Any]:
    """As JSON, and kept on the host for whoever reads a run that failed."""
    started = time.monotonic()
    said = khod.ctl("inspect", "--json", "--seconds", "60")
    seconds = time.monotonic() - started
    (vm.shared / f"{name}.json").write_text(said)
    view: dict[str, Any] = json.loads(said)
    out = view["outgoing"] or {}
    vm.record(
        name,
        seconds=seconds,
        missing=[m["what"] for m in view["missing"]],
        format=out.get("format"),
        count=out.get("kexec_count"),
        reservations=[r["name"] for r in out.get("reservations", ())],
        balanced=sum(o["bytes"] for o in out.get("owners", ())) == sum(t["bytes"] for t in out.get("totals", ())),
        unknown=sum(o["bytes"] for o in out.get("owners", ()) if o["owner"] == "unknown") // 4096,
        incoming=view["incoming"] and {key: view["incoming"][key] for key in ("format", "previous_release", "kexec_count")},
    )
    return view


def frames(memfd: dict[str, Any]) -> list[int]:
    """Of each page of the file; its last folio may reach over its end."""
    found = [pfn + n for _, pfn, count in memfd["extents"] for n in range(count)]
    return found[: -(-memfd["size"] // 4096)]


def compare(vm: Guest, khod: Khod, view: dict[str, Any], fds: dict[str, int], name: str) -> None:
    """Every memfd that inspect lists beside what the kernel says of those that we hold, and of khod's own."""
    listed = {m["owner"].split(" of ")[0]: m for m in view["outgoing"]["memfds"]}
    expected = {kind: pagemap(fd) for kind, fd in fds.items()}
    expected |= {own: khod.frames_of(f"khod-{own.split()[-1]}") for own in ("khod, its folio map", "khod, its handover tree")}
    vm.record(
        f"{name} compared",
        names=sorted(listed),
        equal={kind: frames(listed[kind]) == expected[kind] if kind in listed else None for kind in expected},
        by={kind: listed[kind]["by"] for kind in expected if kind in listed},
        huge=listed.get("thp", {}).get("orders"),
        map_lists=all(
            any(start <= frame * 4096 < end for start, end in view["khod_map"]) for kind in expected for frame in expected[kind]
        ),
        sessions=len({m["session"] for m in listed.values()}),
    )


def held(vm: Guest, khod: Khod, fds: dict[str, int], name: str) -> None:
    khod.ctl("load", str(vm.kernel), "--reuse-cmdline")
    khod.ctl("update", "--hold-at", "frozen")
    view = inspect(vm, khod, name)
    (vm.state / f"{name}.json").write_text(json.dumps(view))
    compare(vm, khod, view, fds, name)


def before(vm: Guest) -> None:
    page_flags()
    khod = Khod(vm)
    fds = {name: make(name, size) for name, size in KINDS.items()}
    with khod.client() as client:
        for name, fd in fds.items():
            client.register(name, "guestmemfd", [("ram", fd)], lifetime="persistent")
    held(vm, khod, fds, "cold")
    at = pagemap(fds["ram"])[5] * 4096
    (told,) = json.loads(khod.ctl("inspect", "--addr", hex(at + 7), "--json"))
    vm.record("addr", preserved=told["preserved"], order=told["order"], head=told["folio"] == at, owners=told["owners"])
    with khod.client() as client:
        client.proceed()
    signal.pause()


def after(vm: Guest) -> None:
    khod = Khod(vm)
    fds = {}
    for name in KINDS:
        with khod.client() as client:
            answer = client.claim(name)
        fds[name] = answer.fds[0]
    now = inspect(vm, khod, "landed")
    frames_now = {name: pagemap(fd) for name, fd in fds.items()}
    cold = {m["owner"].split(" of ")[0]: m for m in json.loads((vm.state / "cold.json").read_text())["outgoing"]["memfds"]}
    vm.record(
        "in place",
        equal={name: frames(cold[name]) == frames_now[name] for name in KINDS},
        listed=all(
            any(start <= frame * 4096 < end for start, end in now["khod_map"]) for one in frames_now.values() for frame in one
        ),
    )
    khod.ctl("finish")
    held(vm, khod, fds, "again")
    khod.ctl("abort")
