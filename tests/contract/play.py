# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m tests.contract.play DIR``: init of a simulated machine, which plays the scenarios around its first jump."""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path

from khod.simulated import ENVIRONMENT, connect
from tests.contract.rig import SimulatedRig
from tests.contract.scenarios import after_all, before_all

REMEMBERED, OUTCOME = "remembered.json", "outcome.json"


def main(directory: Path) -> None:
    """Before the jump, jump; after it, leave the outcome in `directory`."""
    spawn = partial(connect, os.environ[ENVIRONMENT])
    rig = SimulatedRig(spawn("init"), spawn, directory)
    host = rig.machine
    if host.boot.boot().handover:
        outcome = after_all(host, rig, json.loads((directory / REMEMBERED).read_text()))
        (directory / OUTCOME).write_text(json.dumps({**outcome, "imports numpy": str("numpy" in sys.modules)}))
    else:
        (directory / REMEMBERED).write_text(json.dumps(before_all(host, rig, simulated=True)))
        host.kexec.load(host.kexec.open(rig.kernel_image()))
        host.kexec.execute()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
