# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the daemon checks before it touches anything."""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

from khod import config, daemon
from khod.core.settings import Settings
from khod.simulated import create

ROOT = Path(__file__).parents[2]


def khod(config: Path, code: str = "import khod.daemon; raise SystemExit(khod.daemon.main())", **env: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['khod', '--config', {str(config)!r}]; {code}"],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | env,
        cwd=ROOT,
    )
    return done.returncode, done.stderr


def test_a_socket_that_is_taken_stops_it_before_anything_is_retrieved(tmp_path: Path) -> None:
    """The end of a khod that has retrieved is the end of what it retrieved: what can fail by itself comes first."""
    create(tmp_path / "machine", memory=64 << 20)
    config = tmp_path / "khod.yaml"
    config.write_text(f"socket: {tmp_path}/khod.sock\nmachine: simulated:{tmp_path}/machine\n")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "khod.sock"))
        other.listen(1)
        status, said = khod(config)
    # No kernel runs on that machine: had it come so far as to open it, it would have said that.
    assert (status, "somebody answers" in said) == (3, True), said


def test_every_setting_of_the_core_comes_from_the_configuration() -> None:
    """With the same default, and each from a setting of its own."""
    assert daemon.core_settings(config.Config()) == Settings()
    source = inspect.getsource(daemon.core_settings)
    taken = dict(re.findall(r"^        (\w+)=(?:\w+\()?configuration\.([\w.]+)", source, re.M))
    assert set(taken) == {row.name for row in dataclasses.fields(Settings)}
    assert len(set(taken.values())) == len(taken)


def test_the_journal_gets_messages_without_what_its_fields_say() -> None:
    code = (
        "import khod.daemon, logging; assert khod.daemon.set_up_logging('info'); (handler,) = logging.getLogger().handlers;"
        "print(type(handler).__name__, handler.format(logging.makeLogRecord({'msg': 'started', 'levelname': 'INFO'})))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        env=os.environ | {"JOURNAL_STREAM": "8:1"},
        cwd=ROOT,
    )
    assert done.stdout == "JournalHandler started\n", done.stderr
