# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a retrieve is sure to succeed (decision 19)."""

from __future__ import annotations

from pathlib import Path

import pytest

from khod.custodian.doubt import doubt, group_limits, judge, need

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A host of which we are the group /khod.slice/custodian of control groups version 2, without any limit."""
    group = tmp_path / "sys/fs/cgroup/khod.slice/custodian"
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/sys/vm").mkdir(parents=True)
    (tmp_path / "proc/sys/vm/overcommit_memory").write_text("0\n")
    (tmp_path / "proc/self/cgroup").write_text("0::/khod.slice/custodian\n")
    (tmp_path / "proc/self/mountinfo").write_text("25 30 0:23 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 1000 kB\nCommitLimit: 4096 kB\nCommitted_AS: 1024 kB\n")
    for directory in (group, group.parent):
        for name, value in (("memory.max", "max"), ("memory.high", "max"), ("memory.current", str(MIB))):
            (directory / name).write_text(value + "\n")
    return tmp_path


def ask(root: Path, size: int = 10 * MIB, files: int = 1, room: int = 100) -> str:
    return doubt(size, files, room, f"{root}/")


def test_no_limit_no_doubt(root: Path) -> None:
    assert ask(root) == ""
    assert ask(root, size=1 << 50) == ""


@pytest.mark.parametrize("group", ["khod.slice/custodian", "khod.slice"])
@pytest.mark.parametrize("name", ["memory.max", "memory.high"])
def test_a_limit_anywhere_on_the_path_is_named(root: Path, group: str, name: str) -> None:
    limit = root / "sys/fs/cgroup" / group / name
    limit.write_text(f"{8 * MIB}\n")
    words = ask(root)
    assert str(limit) in words
    assert f"{7 * MIB} are left" in words
    limit.write_text(f"{MIB + need(10 * MIB, 1)}\n")
    assert ask(root) == ""
    limit.write_text(f"{MIB + need(10 * MIB, 1) - 1}\n")
    assert ask(root) != ""
    limit.write_text(f"{MIB // 2}\n")  # already beyond it
    assert "and 0 are left" in ask(root)


def test_version_1(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("9:memory:/docker/x/khod\n8:cpu:/\n0::/\n")
    (root / "proc/self/mountinfo").write_text(
        "25 30 0:23 /docker/x /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
        "26 30 0:24 / /sys/fs/cgroup/unified rw - cgroup2 x rw\n"
    )
    group = root / "sys/fs/cgroup/memory/khod"
    group.mkdir(parents=True)
    (root / "sys/fs/cgroup/unified").mkdir()
    for directory in (group, group.parent):
        (directory / "memory.limit_in_bytes").write_text("9223372036854771712\n")
        (directory / "memory.usage_in_bytes").write_text("4096\n")
    assert ask(root) == ""
    (group.parent / "memory.limit_in_bytes").write_text(f"{10 * MIB}\n")
    assert str(group.parent / "memory.limit_in_bytes") in ask(root)


def test_strict_overcommit(root: Path) -> None:
    (root / "proc/sys/vm/overcommit_memory").write_text("2\n")
    words = ask(root)
    assert "vm.overcommit_ratio" in words
    assert f"{3 * MIB} are left" in words
    assert ask(root, size=2 * MIB) == ""


def test_what_cannot_be_read_is_not_proven(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/gone\n")
    assert "cannot be read" in ask(root)
    (root / "proc/self/mountinfo").write_text("")
    assert "not mounted" in ask(root)
    (root / "proc/self/cgroup").write_text("0::/\n")  # the root group has no limits
    assert ask(root) == ""


def test_descriptors(root: Path) -> None:
    assert ask(root, files=100) == ""
    assert "LimitNOFILE=" in ask(root, files=101)


def test_what_is_needed_is_more_than_the_bytes() -> None:
    for size, files in ((0, 1), (4096, 1), (1, 10_000), (1 << 40, 3)):
        tree = 576 * (size // 4096 // 64 + files)
        assert need(size, files) >= size + files * 4096 + tree
    assert need(1 << 40, 1) < 1.01 * (1 << 40)
    assert judge(0, 0, [], 0) == ""


def test_this_host_can_be_read() -> None:
    assert all(left <= 1 << 64 for _, left in group_limits())
