# SPDX-License-Identifier: LGPL-2.1-or-later
"""`khoctl formats` as a process, on images made for it: it needs neither khod nor privileges."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import images

KHOCTL = str(Path(sys.executable).parent / "khoctl")


def khoctl(*argv: str | Path) -> tuple[int, str, str]:
    done = subprocess.run([KHOCTL, "formats", *map(str, argv)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture
def kernels(tmp_path: Path) -> dict[str, Path]:
    """Four that differ: today's, one with another LUO, one of composite names, and one without KHO."""
    made = {
        "today": images.vmlinux(),
        "luo": images.vmlinux(["kho-v4", "luo-v6"], release="7.4.0"),
        "later": images.vmlinux(["kho-v4;radix-v1;vmalloc-v1", "luo-v5;block-v1"], ["memfd-v2;vmalloc-v1"], release="7.5.0"),
        "plain": images.vmlinux([], [], release="6.12.0"),
    }
    for name, kernel in made.items():
        (tmp_path / name).write_bytes(images.bzimage(kernel, release="" if name == "later" else name + "-1"))
    return {name: tmp_path / name for name in made}


def test_the_paths_among_many(kernels: dict[str, Path]) -> None:
    status, out, _ = khoctl("--json", *kernels.values())
    assert status == 0
    found = json.loads(out)
    assert {Path(i["image"]).name: i["release"] for i in found["images"]} == {
        "today": "today-1", "luo": "luo-1", "later": "7.5.0", "plain": "plain-1",
    }  # fmt: skip
    paths = {(Path(p["from"]).name, Path(p["to"]).name): p["path"] for p in found["paths"]}
    assert len(paths) == 12
    assert (paths["today", "luo"], paths["luo", "today"]) == ("panic", "panic")
    assert (paths["today", "later"], paths["later", "today"], paths["today", "plain"]) == ("cold", "cold", "cold")
    assert {paths["plain", name] for name in ("today", "luo", "later")} == {"none"}
    why = next(p["why"] for p in found["paths"] if Path(p["to"]).name == "later" and Path(p["from"]).name == "today")
    assert "no radix is written, radix-v1 is read" in why


def test_a_table_for_people(kernels: dict[str, Path]) -> None:
    status, out, _ = khoctl(kernels["today"], kernels["luo"])
    assert status == 0
    assert "kho-v4 luo-v5 memblock-v1 memfd-v2 reserve-mem-v1" in out
    assert "luo: luo-v5 is written, luo-v6 is read" in out
    assert "the target panics while it boots" in out


def test_a_fleet_s_profile_can_be_demanded(kernels: dict[str, Path], tmp_path: Path) -> None:
    profile = tmp_path / "fleet.yaml"
    profile.write_text("fleet: front\nformats: [kho-v4, luo-v5, memfd-v2]\n")
    status, out, _ = khoctl("--profile", profile, "--json", kernels["today"])
    assert status == 0
    assert json.loads(out)["fleet"]["paths"][0]["path"] == "fine"
    status, out, _ = khoctl("--profile", profile, kernels["today"], kernels["luo"])
    assert status == 3
    assert "luo-v6 is read" in out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("fleet: [a]\nformats: [kho-v4]\n", "missing"),
        ("formats: [kho-v4]\n", "missing"),
        ("fleet: a\nformats: []\n", "missing"),
        ("fleet: a\nformats: [kho]\n", "'kho' is not the name of a format"),
        ("fleet: a\nformats: [kho-v4]\nmore: x\n", "no key more"),
        ("fleet: {a: b}\nformats: [kho-v4]\n", "fleet.yaml"),
        ("- [", "fleet.yaml"),
        ("[" * 20_000, "fleet.yaml"),
        ("x" * 70_000, "at most 65536"),
    ],
)
def test_profiles_that_will_not_do(text: str, words: str, kernels: dict[str, Path], tmp_path: Path) -> None:
    profile = tmp_path / "fleet.yaml"
    profile.write_text(text)
    status, out, complaint = khoctl("--profile", profile, kernels["today"])
    assert (status, out) == (2, "")
    assert words in complaint
    assert "a list such as" in complaint


def test_files_that_are_no_kernels(kernels: dict[str, Path], tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    cut.write_bytes(kernels["today"].read_bytes()[:17200])
    status, _, complaint = khoctl(kernels["today"], cut)
    assert status == 5
    assert f"{cut}: it was cut off" in complaint
    status, _, complaint = khoctl(tmp_path / "none")
    assert (status, "No such file" in complaint) == (2, True)
    os.mkfifo(tmp_path / "fifo")
    status, _, complaint = khoctl(tmp_path / "fifo")
    assert (status, "not a regular file" in complaint) == (2, True)
