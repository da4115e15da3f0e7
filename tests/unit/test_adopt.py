# SPDX-License-Identifier: LGPL-2.1-or-later
"""A process that the initrd started becomes a unit's; tests/vm/test_initrd.py has it with systemd."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from khod.cli.adopt import adopt
from khod.errors import Held


def test_the_manager_hears_of_it_when_it_is_in_the_units_group(tmp_path: Path) -> None:
    own, group = tmp_path / "cgroup", tmp_path / "groups/system.slice/vmm.service"
    own.write_text("1:name=systemd:/elsewhere\n0::/system.slice/vmm.service\n")
    group.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(5)
        adopt(4711, str(tmp_path / "notify"), groups=tmp_path / "groups", own=own)
        assert (group / "cgroup.procs").read_text() == "4711"
        assert manager.recv(1000).decode().split("\n")[:2] == ["READY=1", "MAINPID=4711"]
        own.write_text("1:name=systemd:/elsewhere\n")
        with pytest.raises(Held, match="4711"):
            adopt(4711, str(tmp_path / "notify"), groups=tmp_path / "groups", own=own)
        own.write_text("0::/nowhere\n")
        with pytest.raises(Held, match="nowhere"):
            adopt(4711, str(tmp_path / "notify"), groups=tmp_path / "groups", own=own)
        manager.setblocking(False)
        with pytest.raises(BlockingIOError):
            manager.recv(1000)
