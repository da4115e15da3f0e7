# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory of every kind through two live updates, by khod and khoctl: bytes, frames, orders, seals; and the folio map walked by
physical address alone in both kernels."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sys
from pathlib import Path

from tests.vm.content import PAGE, fill, filled
from tests.vm.driving import Kcore, Khod, orders, page_flags, pagemap, walk
from tests.vm.guest import Guest

MIB = 1 << 20
KINDS = {
    "page": PAGE,
    "ram": 64 * MIB,
    "large": 1024 * MIB,
    "sparse": 32 * MIB,
    "sealed": 2 * MIB,
    "thp": 8 * MIB,
    "empty": 0,
}
SEALS = 0x2 | 0x4  # F_SEAL_SHRINK | F_SEAL_GROW
THP = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


def make(name: str, size: int) -> int:
    fd = os.memfd_create(name, 0x1 | 0x2 | 0x10)  # MFD_CLOEXEC | MFD_ALLOW_SEALING | MFD_EXEC
    if name == "thp":
        THP.write_text("always")
    os.ftruncate(fd, size)
    if name == "sparse":
        os.pwrite(fd, b"island", 20 * MIB)
    else:
        fill(fd, size)
    if name == "thp":
        THP.write_text("never")
    if name == "sealed":
        fcntl.fcntl(fd, 1033, SEALS)  # F_ADD_SEALS
    return fd


def intact(name: str, fd: int) -> bool:
    if name == "sparse":
        head = os.pread(fd, 20 * MIB, 0)
        return head == bytes(20 * MIB) and os.pread(fd, 6, 20 * MIB) == b"island"
    return filled(fd, KINDS[name])


def see(vm: Guest, khod: Khod, fds: dict[str, int]) -> dict[str, object]:
    """What the kernel says of the memory, and whether the map says the same, walked through /proc/kcore."""
    flags = page_flags()
    frames = {name: pagemap(fd) for name, fd in fds.items()}
    folios = {name: sorted(orders(f, flags)) for name, f in frames.items()}
    with khod.client() as client:  # khod's part alone: searching memory for the kernel's takes its time
        view = client.inspect()
    listed = set(walk(Kcore(), view.map_address))
    own = khod.unnamed() if vm.stage else [khod.frames_of("khod-map"), khod.frames_of("khod-tree")]
    expected = {folio for name in folios for folio in folios[name]} | {f for one in own for f in orders(one, flags)}
    totals = {o.order: o.folios for o in view.orders}
    vm.record(
        f"map-{vm.stage}",
        equal=listed == expected,
        listed=len(listed),
        missing=len(expected - listed),
        extra=len(listed - expected),
        totals_agree=totals == {o: sum(1 for _, order in listed if order == o) for o in totals},
        huge=sum(1 for _, order in folios["thp"] if order == 9),
        source=view.source,
    )
    return {"frames": frames, "folios": folios}


def jump(vm: Guest, khod: Khod, fds: dict[str, int]) -> None:
    khod.ctl("load", str(vm.kernel), "--reuse-cmdline")
    khod.ctl("update", "--hold-at", "frozen")
    seen = see(vm, khod, fds)
    (vm.state / "seen.json").write_text(json.dumps(seen))
    with khod.client() as client:
        client.proceed()
    signal.pause()


def claim(khod: Khod, name: str) -> int:
    with khod.client() as client:
        answer = client.claim(name)
    assert answer.answer == "fds", answer
    assert answer.names == ["ram"], answer
    return answer.fds[0]


def before(vm: Guest) -> None:
    khod = Khod(vm)
    fds = {name: make(name, size) for name, size in KINDS.items()}
    for name, fd in fds.items():
        if name == "ram":  # adopted from a running process
            khod.ctl("register", name, "--pid", str(os.getpid()), "--fd", str(fd))
        elif name == "page":  # given by khoctl
            os.set_inheritable(fd, True)
            khod.ctl("register", name, "--memfd-fd", str(fd))
        else:
            with khod.client() as client:
                client.register(name, "guestmemfd", [("ram", fd)], lifetime="persistent")
    status = json.loads(khod.ctl("status", "--json"))
    assert status["device"] == "ok", status
    assert "no kernel" in khod.ctl("update", "--dry-run", status=3)
    assert "large" in khod.ctl("instances")
    jump(vm, khod, fds)


def after(vm: Guest) -> None:
    khod = Khod(vm)
    told = json.loads((vm.state / "seen.json").read_text())
    # A program that khoctl gave way to, with the descriptor as systemd passes it.
    program = "import os; print(os.environ['LISTEN_FDS'], os.environ['LISTEN_FDNAMES'], os.environ['LISTEN_PID'] =="
    program += " str(os.getpid()), os.pread(3, 8, 0).hex(), os.fstat(3).st_size)"
    said = khod.ctl("claim", "page", "--", sys.executable, "-S", "-c", program)
    fds = {name: claim(khod, name) for name in KINDS}
    now = see(vm, khod, fds)
    vm.record(
        "memory",
        claim=said.split(),
        bytes={name: intact(name, fd) for name, fd in fds.items()},
        frames={name: now["frames"][name] == told["frames"][name] for name in KINDS},  # type: ignore[index]
        orders={name: now["folios"][name] == [tuple(f) for f in told["folios"][name]] for name in KINDS},  # type: ignore[index]
        seals=fcntl.fcntl(fds["sealed"], 1034),
        sizes={name: os.fstat(fd).st_size for name, fd in fds.items()},
    )
    khod.ctl("claim", "nobody", "--", "true", status=9)
    with khod.client() as client:
        (update,) = client.history()
        vm.record("ledger", checked=update.checked, outcome=update.outcome, problems=list(update.problems),
                  spans={s.phase: [s.seconds, s.uncertainty] for s in update.spans if not s.instance})  # fmt: skip
    khod.ctl("finish")
    # Once is enough for a GiB: emulation makes seconds of it at every turn.
    khod.ctl("unregister", "large")
    os.close(fds.pop("large"))
    os.pwrite(fds["page"], b"second", 16)
    for fd in fds.values():
        os.close(fd)
    khod.ctl("load", str(vm.kernel))
    with khod.client() as client:
        list(client.update())


def after2(vm: Guest) -> None:
    khod = Khod(vm)
    fds = {name: claim(khod, name) for name in KINDS if name != "large"}
    with khod.client() as client:
        states = {i.name: i.state for i in client.instances()}
        history = client.history()
    vm.record(
        "again",
        states=states,
        page=os.pread(fds["page"], 6, 16).decode(),
        ram=filled(fds["ram"], KINDS["ram"]),
        outcomes=[u.outcome for u in history],
    )
