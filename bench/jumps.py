# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m bench.jumps [ROUNDS]``: the blackout of a service's 256 MiB when a host with an init jumps, by khod and without.

Measured is how long nobody could write to the memory: from the service's last write in the old kernel until it has the memory
again in the new one and has read from it, by the time stamp counter, which runs on. All three in the same image of the
lab (`tests.vm.host`: Debian sid, systemd), in turns:

- *systemd alone*: the service keeps its memory in PID 1's descriptor store, ``systemctl kexec``;
- *khod systemd*: the service is khod's client, ``khoctl update --jump systemd``;
- *khod direct*: the same, ``khoctl update --jump direct``.

The first starts as early as a unit can; the other two wait for khod-restored.target.
"""

from __future__ import annotations

import json
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

from bench.host import machine
from tests.vm import host
from tests.vm.jumps import WAYS, Blackout, jump

OUT = Path(__file__).parent / "out"
ROUNDS = 3


def main(rounds: int = ROUNDS) -> int:
    if reason := host.missing():
        print(f"no host can be booted here: {reason}", file=sys.stderr)
        return 2
    runs: dict[str, list[Blackout]] = {way: [] for way in WAYS}
    print("| jump by | to the service's start | until it has its memory | blackout, s |")
    print("| --- | --- | --- | --- |")
    for _ in range(rounds):
        for way in WAYS:
            with host.Host() as running:
                runs[way].append(jump(running, way))
            last = runs[way][-1]
            print(f"| {way} | {last.boot:.2f} | {last.held:.2f} | {last.whole:.2f} |", flush=True)
    medians = {way: statistics.median(run.whole for run in runs[way]) for way in WAYS}
    print(f"\nblackout of 256 MiB, medians of {rounds}:", ", ".join(f"{way} {medians[way]:.1f} s" for way in WAYS))
    content = {"machine": machine(), "runs": {way: [asdict(run) for run in runs[way]] for way in WAYS}, "medians": medians}
    OUT.mkdir(exist_ok=True)
    (OUT / "bench-jumps.json").write_text(json.dumps(content, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:2])))
