# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks of those who build initrds for a host, and `khoctl initrd`, as processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from khod.early import paths, plan

ROOT = Path(__file__).parents[3]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
LAUNCHER = paths.LAUNCHER.lstrip("/")

pytestmark = pytest.mark.slow


def khoctl(*words: str | Path, status: int = 0) -> str:
    done = subprocess.run(["khoctl", "initrd", *words], env={"PATH": PATH}, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("wanted", [True, False])
def test_initramfs_tools(tmp_path: Path, wanted: bool) -> None:
    hook = ROOT / "systemd/initramfs-tools/khod"
    assert subprocess.run([hook, "prereqs"], capture_output=True, text=True, check=True).stdout == "\n"
    environment = {"PATH": PATH, "DESTDIR": str(tmp_path), "version": os.uname().release} | ({"KHOD": "y"} if wanted else {})
    subprocess.run([hook], env=environment, check=True)
    assert (tmp_path / LAUNCHER).exists() is wanted


def test_dracut(tmp_path: Path) -> None:
    module = ROOT / "systemd/dracut/90khod/module-setup.sh"
    script = f'. {module}; check; [ $? = 255 ] && depends && initdir="{tmp_path}" kernel="{os.uname().release}" && install'
    subprocess.run(["bash", "-c", script], env={"PATH": PATH}, check=True)
    assert os.access(tmp_path / LAUNCHER, os.X_OK)
    none = subprocess.run(["/bin/bash", "-c", f". {module}; check"], env={"PATH": "/nowhere"}, check=False)
    assert none.returncode == 1, "without khoctl the module is left out"


def test_khoctl_builds_what_the_configuration_says(tmp_path: Path) -> None:
    config, own, target = tmp_path / "khod.yaml", tmp_path / "own", tmp_path / "initrd"
    start = "{instance: vm-1, command: [/bin/sh, -c, exit], files: [/etc/hostname]}"
    config.write_text(f"initrd: {{use: build, start: [{start}]}}\n")
    own.write_bytes(b"own")
    said = json.loads(khoctl("build", target, "--initrd", own, "--config", config, "--json"))
    assert said["size"] == target.stat().st_size
    assert target.read_bytes().endswith(b"own")
    khoctl("add", tmp_path / "tree", "--config", config)
    (one,) = plan.read((tmp_path / "tree" / paths.PLAN.lstrip("/")).read_bytes()).starts
    assert (one.name, one.owner) == ("vm-1", "user:root")
    assert (tmp_path / "tree" / paths.VMM.lstrip("/") / "etc/hostname").exists()


def test_khoctl_says_what_is_wrong(tmp_path: Path) -> None:
    config = tmp_path / "khod.yaml"
    config.write_text("initrd: {start: [{instance: vm-1, command: [/nowhere/vmm]}]}\n")
    assert "/nowhere/vmm" in khoctl("build", tmp_path / "initrd", "--config", config, status=2)
    config.write_text("initrd: {start: [{instance: vm-1, command: [vmm]}]}\n")
    assert "absolute path" in khoctl("build", tmp_path / "initrd", "--config", config, status=2)
    assert not (tmp_path / "initrd").exists()
    config.write_text("")
    assert "cannot be written" in khoctl("build", tmp_path / "no" / "initrd", "--config", config, status=4)
    assert "cannot be made" in khoctl("add", config, "--config", config, status=4)
