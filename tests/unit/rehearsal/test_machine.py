# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is put into a machine before it is switched on, and the command that switches it on; none is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from khod.rehearsal.machine import INSIDE, Machine, absent, arguments, prepare

needs_tools = pytest.mark.skipif("mke2fs" in absent(), reason="not installed: mke2fs")
SAYS = "import json, os, sys; print(json.dumps([os.environ['WORDS'], os.getcwd(), sys.argv[1:]]))"


@pytest.fixture
def made(tmp_path: Path) -> Machine:
    return Machine(
        tmp_path / "a scenario's.py",
        tmp_path / "bzImage",
        python=(sys.executable, "-c", SAYS),
        environment={"WORDS": 'it\'s a $HOME of "words"'},
        start=tmp_path,
        memory="1G",
        cmdline=("quiet",),
        parameters={"given": 1},
        stage_deadline=7,
    )


@needs_tools
def test_the_job_is_started_with_its_variables_whatever_is_in_them(made: Machine, tmp_path: Path) -> None:
    prepare(made, tmp_path)
    job = tmp_path / "shared/job"
    done = subprocess.run(["sh", "-e", str(job)], capture_output=True, text=True, check=True, timeout=60)
    words, where, rest = json.loads(done.stdout)
    assert (words, where) == ('it\'s a $HOME of "words"', str(tmp_path))
    assert rest[0] == "-P", "the directory of guest.py is no place for its imports"
    assert Path(rest[1]).name == "guest.py"
    assert rest[2] == str(made.scenario)
    assert json.loads((tmp_path / "shared/parameters.json").read_text()) == {
        "kernel": str(made.kernel), "stage_deadline": 7, "given": 1,
    }  # fmt: skip


@needs_tools
def test_what_starts_it_lies_in_the_directory_of_the_run_and_can_be_executed(made: Machine, tmp_path: Path) -> None:
    prepare(made, tmp_path)
    assert os.access(tmp_path / "init", os.X_OK)
    assert set(INSIDE) < {path.name for path in tmp_path.iterdir()}
    words = arguments(made, tmp_path)
    append = words[words.index("-append") + 1].split()
    assert {f"init={tmp_path}/init", "kho=on", "liveupdate=on", "quiet", "rootfstype=9p"} <= set(append)
    bare = arguments(replace(made, options=()), tmp_path)
    assert "kho=on" not in bare[bare.index("-append") + 1].split()


def test_the_host_is_shown_and_not_handed_over(made: Machine, tmp_path: Path) -> None:
    shown = [word for word in arguments(made, tmp_path) if word.startswith("local,")]
    assert [word.split(",")[2] for word in shown] == ["path=/", f"path={tmp_path}/shared"]
    assert ["readonly=on" in word for word in shown] == [True, False]
    assert "-no-reboot" in arguments(made, tmp_path)
