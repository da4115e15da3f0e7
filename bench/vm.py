# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m bench.vm``: the blackout of a 64 MiB memfd across a real kexec, khod's against that of a bare C program.

Measured is what a guest feels: from the last write to its memory in the old kernel until each of its words has been compared
in the new one, by the time stamp counter, which runs on. Both sides run in the same machine of the lab (`tests.vm`), in turns,
under the same init, whose first command in the new kernel is

- khod's daemon, and beside it a static C program which claims the memory as soon as khod answers; or
- the same C program, which takes it from the kernel itself (`blackout.c`).

The last write is made while the update stands at `prepared`, right before it is told to go on: this guest needs no time to
stand still, and all that khod does from there on (freeze, sample, map, sync, journal, jump) is on khod's account. The C
program has nothing of the kind to do: it writes, and jumps.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from bench.host import machine
from khod.rehearsal.tsc import host_tsc_khz
from tests.vm import runner

HERE = Path(__file__).parent
OUT = HERE / "out"
ROUNDS = 5
TARGET = 1.5
COMMAND = ("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static")
SIDES = ("khod", "c")


@dataclass(frozen=True, slots=True)
class Blackout:
    """One live update, in seconds."""

    boot: float
    """From the last write to the first instruction of the C program in the new kernel."""
    held: float
    """From there until the descriptor was there."""
    compared: float
    """And until its words were compared."""

    @property
    def whole(self) -> float:
        return self.boot + self.held + self.compared


def build() -> Path:
    """The C program, static."""
    program = OUT / "blackout"
    OUT.mkdir(exist_ok=True)
    subprocess.run([*COMMAND, "-o", str(program), str(HERE / "blackout.c")], check=True, timeout=120)
    return program


def measure(side: str, program: Path) -> Blackout:
    """One run of the machine. Raises AssertionError with the logs' place if it does not pass."""
    scenario = runner.HERE / "scenarios" / "blackout.py"
    parameters = {"side": side, "program": str(program)}
    played = runner.Machine(scenario, parameters=parameters, stage_deadline=150, deadline=300)
    told = runner.run(played).require().facts("blackout")
    stamps = [told[name] / host_tsc_khz() / 1000 for name in ("last", "began", "held", "compared")]
    return Blackout(*(later - earlier for earlier, later in pairwise(stamps)))


def main() -> int:
    if reason := runner.missing():
        print(f"no virtual machine can be run here: {reason}", file=sys.stderr)
        return 2
    program = build()
    runs: dict[str, list[Blackout]] = {side: [] for side in SIDES}
    print("| side | to the first command | until the memory is there | until compared | blackout, s |")
    print("| --- | --- | --- | --- | --- |")
    for _ in range(ROUNDS):
        for side in SIDES:
            runs[side].append(measure(side, program))
            print(_line(side, runs[side][-1]), flush=True)
    medians = {side: statistics.median(run.whole for run in runs[side]) for side in SIDES}
    ratio = medians["khod"] / medians["c"]
    met = ratio <= TARGET
    print(f"\nblackout of 64 MiB, medians of {ROUNDS}: khod {medians['khod']:.2f} s, C {medians['c']:.2f} s")
    print(f"ratio {ratio:.2f} x, target ≤ {TARGET:.2f} x, met: {'yes' if met else 'NO'}")
    content = {
        "machine": machine(),
        "runs": {side: [asdict(run) for run in runs[side]] for side in SIDES},
        "medians": medians,
        "ratio": ratio,
        "target": TARGET,
        "met": met,
    }
    (OUT / "bench-vm.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0 if met else 1


def _line(side: str, run: Blackout) -> str:
    return f"| {side} | {run.boot:.2f} | {run.held:.2f} | {run.compared:.2f} | {run.whole:.2f} |"


if __name__ == "__main__":
    sys.exit(main())
