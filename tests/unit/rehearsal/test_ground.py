# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a rehearsal refuses, and what it says then; nothing is started."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from khod.errors import InvalidRequest, NotAKernel, Refused
from khod.rehearsal import ground, machine
from khod.rehearsal.ground import NEEDED
from tests import images

CONFIG = "".join(f"{name}=y\n" for name in NEEDED)


def kernel(at: Path, *, config: str | None = CONFIG, release: str = "7.3.4", number: int = 62) -> Path:
    at.write_bytes(images.bzimage(images.vmlinux(config=config, release=release, machine=number), release=release))
    return at


def test_programs_and_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(Refused, match=r"not installed: qemu-system-x86_64, mke2fs, setpriv.*apt install"):
        ground.require_programs("/nowhere")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(Refused, match=r"only root.*run it as root"):
        ground.require_programs("/nowhere")


def test_memory(tmp_path: Path) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       8000000 kB\nMemAvailable:   2600000 kB\n")
    ground.require_memory(2 << 30, meminfo)
    with pytest.raises(Refused, match=r"takes 3489660928 bytes, and 2662400000 are available.*--memory"):
        ground.require_memory(3 << 30, meminfo)
    with pytest.raises(InvalidRequest, match="too small"):
        ground.require_memory(512 << 20, meminfo)


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ground.require_disk(tmp_path)
    monkeypatch.setattr(machine, "STATE_BYTES", 1 << 60)
    with pytest.raises(Refused, match=f"{tmp_path} has [0-9]+ bytes free"):
        ground.require_disk(tmp_path)


def test_the_image_of_the_running_kernel(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"no image of the running kernel: .*vmlinuz-7\.3\.4 is not there.*--running"):
        ground.running(None, tmp_path, "7.3.4")
    kernel(tmp_path / "vmlinuz-7.3.4")
    assert ground.running(None, tmp_path, "7.3.4").image.release == "7.3.4"
    kernel(tmp_path / "vmlinuz-7.3.5")
    with pytest.raises(Refused, match=r"is Linux 7\.3\.4, and 7\.3\.5 runs"):
        ground.running(None, tmp_path, "7.3.5")
    other = kernel(tmp_path / "other", release="7.2.12")
    assert ground.running(other, tmp_path, "7.3.4").image.release == "7.2.12", "named by hand, it may be another"


def test_images_that_cannot_be_played(tmp_path: Path) -> None:
    whole = kernel(tmp_path / "whole")
    (tmp_path / "cut").write_bytes(whole.read_bytes()[:-4096])
    with pytest.raises(Refused, match=r"cut: it was cut off.*bzImage of the target"):
        ground.read(tmp_path / "cut", "target")
    with pytest.raises(InvalidRequest, match="No such file"):
        ground.read(tmp_path / "gone", "target")
    with pytest.raises(InvalidRequest, match="not a regular file"):
        ground.read(tmp_path, "target")
    (tmp_path / "vmlinux").write_bytes(images.vmlinux())
    with pytest.raises(NotAKernel):
        ground.read(tmp_path / "vmlinux", "target")
    with pytest.raises(Refused, match="is for arm64"):
        ground.read(kernel(tmp_path / "arm", number=183), "target")
    with pytest.raises(InvalidRequest, match="a /dev of its own"):
        ground.read(Path("/dev/zero"), "target")


def test_what_must_be_built_in(tmp_path: Path) -> None:
    modular = CONFIG.replace("CONFIG_9P_FS=y", "CONFIG_9P_FS=m").replace("CONFIG_EXT4_FS=y\n", "")
    with pytest.raises(Refused, match="CONFIG_9P_FS, CONFIG_EXT4_FS must be built in"):
        ground.read(kernel(tmp_path / "modular", config=modular), "target")
    # Where the image does not carry it, it lies beside; where nobody knows, it is tried.
    bare = kernel(tmp_path / "bare", config=None)
    assert ground.read(bare, "target").path == bare
    (tmp_path / "config-7.3.4").write_text(modular)
    with pytest.raises(Refused, match="CONFIG_9P_FS"):
        ground.read(bare, "target")
