# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m bench.initrd [ROUNDS]``: the blackout of 256 MiB with a restore in the initrd, against systemd's own live update
and against the least that there can be.

Measured is how long nobody could write to the memory: from the last write in the old kernel until whoever has the memory in the
new one writes to it again, by the time stamp counter, which runs on. All three in the same image of the lab (`tests.vm.host`:
Debian sid, systemd), in turns:

- *khod, initrd*: a client of khod's, which stands still when asked; a VMM that the initrd starts (``tests/vm/programs/vmm.c``);
- *C, initrd*: a static program that is the first process in the same initrd (``first.c``), and does nothing else;
- *systemd alone*: a service that keeps its memory in PID 1's descriptor store, ``systemctl kexec``.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

from bench.host import machine
from khod.rehearsal.tsc import host_tsc_khz
from tests.vm import early, host
from tests.vm.host import KERNEL, Host
from tests.vm.jumps import SIZE, Blackout, jump

HERE = Path(__file__).parent
OUT = HERE / "out"
ROUNDS = 5
SIDES = ("khod, initrd", "C, initrd", "systemd alone")
FIRST = "/usr/local/bin/first"
INITRD = "/var/lib/khod/initrd.img"
TARGETS = {"C, initrd": 1.5, "systemd alone": 0.2}
"""How long khod may take, in terms of the others."""
PATIENCE = 60.0


def measure(side: str) -> Blackout:
    """One jump. Raises AssertionError or Lost where it did not go through."""
    with Host() as running:
        if side == "systemd alone":
            return jump(running, side)
        early.configured(running, files=[FIRST], first=HERE / "first.c")
        if side == "khod, initrd":
            early.guest(running, "guest", enabled=False)
            early.update(running)
            told = running.record("runs").facts
            assert told["equal"], told
            return _blackout(told["last"], told["began"], told["held"])
        running.run("khoctl", "load", KERNEL)
        running.start(FIRST, "update", KERNEL, INITRD, str(SIZE), f"/khod/vmm{FIRST}")
        return _blackout(*_on_console(running))


def _on_console(running: Host) -> tuple[int, int, int]:
    """What the program told: it has no other way."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        log = running.directory / "serial.log"
        if found := re.search(r"first: (\d+) (\d+) (\d+)\r?\n", log.read_text(errors="replace") if log.exists() else ""):
            last, began, held = map(int, found.groups())
            return last, began, held
        time.sleep(0.05)  # a file that grows tells nobody, and this is no part of what is measured
    raise AssertionError(f"the C program told nothing within {PATIENCE:g} s")


def _blackout(last: int, began: int, held: int) -> Blackout:
    khz = host_tsc_khz() * 1000
    return Blackout((began - last) / khz, (held - began) / khz)


def main(rounds: int = ROUNDS) -> int:
    if reason := host.missing():
        print(f"no host can be booted here: {reason}", file=sys.stderr)
        return 2
    runs: dict[str, list[Blackout]] = {side: [] for side in SIDES}
    print("| side | to the first instruction of who has the memory | until it writes | blackout, s |")
    print("| --- | --- | --- | --- |")
    for _ in range(rounds):
        for side in SIDES:
            runs[side].append(measure(side))
            last = runs[side][-1]
            print(f"| {side} | {last.boot:.2f} | {last.held:.2f} | {last.whole:.2f} |", flush=True)
    medians = {side: statistics.median(run.whole for run in runs[side]) for side in SIDES}
    print(f"\nblackout of 256 MiB, medians of {rounds}:", ", ".join(f"{side} {medians[side]:.2f} s" for side in SIDES))
    ratios = {side: medians["khod, initrd"] / medians[side] for side in TARGETS}
    met = {side: ratio <= TARGETS[side] for side, ratio in ratios.items()}
    for side, ratio in ratios.items():
        print(f"khod / {side}: {ratio:.2f}, target ≤ {TARGETS[side]:.2f}, met: {'yes' if met[side] else 'NO'}")
    content = {
        "machine": machine(),
        "runs": {side: [asdict(run) for run in runs[side]] for side in SIDES},
        "medians": medians,
        "ratios": ratios,
        "targets": TARGETS,
        "met": all(met.values()),
    }
    OUT.mkdir(exist_ok=True)
    (OUT / "bench-initrd.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
