# SPDX-License-Identifier: LGPL-2.1-or-later
"""The example, word for word, through a whole update of a simulated machine with khod's daemon on it: same program before and
after, as units would start it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from khod import simulated
from khod.simulated import image, power

ROOT = Path(__file__).parents[3]
EXAMPLE = ROOT / "examples/client.py"

_INIT = """
import subprocess, sys
from pathlib import Path
from khod.api.client import connect
from khod.errors import Lost
from tests.unit.daemons import Daemon

place, example = Path(sys.argv[1]), sys.argv[2]
with Daemon(place) as daemon:
    daemon.hear("READY=1")
    vmm = subprocess.Popen([sys.executable, example, str(daemon.socket)], stdout=subprocess.PIPE, text=True)
    line = vmm.stdout.readline()
    print(line, end="", flush=True)
    with connect(daemon.socket, timeout=60) as khod:
        if "from 0," not in line:
            print(khod.status().state, *(f"{view.name} {view.state}" for view in khod.instances()), flush=True)
            vmm.kill()
            raise SystemExit(0)
        khod.load(str(place / "bzImage"))
        for event in khod.update():
            if event.kind in ("problem", "failed"):
                print(event.message, flush=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_the_guest_goes_on_where_it_stood(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    simulated.create(tmp_path / "machine", memory=256 << 20)
    (tmp_path / "bzImage").write_bytes(image.build())
    init = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {_INIT}", str(tmp_path), str(EXAMPLE)]
    status = power.run(tmp_path / "machine", init)
    said = capfd.readouterr()
    assert status == 0, said.out + said.err
    first, second, last = said.out.splitlines()
    assert first == "running from 0, memory says 0"
    found = re.fullmatch(r"running from (\d+), memory says (\d+)", second)
    assert found and found[1] == found[2] and int(found[1]) > 0, second
    assert last == "idle guest claimed"


def test_it_is_as_short_as_it_is_said_to_be() -> None:
    """What counts: lines of code, without docstrings, imports and what is blank."""
    code = re.sub(r'""".*?"""', "", EXAMPLE.read_text(), flags=re.S)
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith(("#", "import", "from"))]
    assert len(lines) <= 40


def test_it_says_so_when_there_is_no_khod(tmp_path: Path) -> None:
    argv = [sys.executable, str(EXAMPLE), str(tmp_path / "khod.sock")]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert done.returncode == 1
    assert "khod does not answer" in done.stderr
