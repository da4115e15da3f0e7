# SPDX-License-Identifier: LGPL-2.1-or-later
"""The unit file, judged by systemd itself."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.unit.test_house import tool

UNIT = Path(__file__).parents[2] / "systemd/khod.service"


def verify(unit: Path) -> str:
    """What systemd-analyze complains of, warnings included."""
    command = [tool("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stderr + ("" if done.returncode == 0 else f"exit status {done.returncode}")


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    text = UNIT.read_text()
    assert "ExecStart=/usr/bin/khod\n" in text
    copy = tmp_path / UNIT.name
    # khod need not be installed where the unit expects it: any program will do.
    copy.write_text(text.replace("ExecStart=/usr/bin/khod", f"ExecStart={sys.executable}"))
    assert verify(copy) == ""
    copy.write_text(copy.read_text() + "[Service]\nKillMod=process\n")
    assert "KillMod" in verify(copy), "the judge sleeps"
