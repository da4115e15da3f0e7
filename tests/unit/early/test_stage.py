# SPDX-License-Identifier: LGPL-2.1-or-later
"""The parts of the restore stage that need no kernel of their own; tests/vm/test_initrd.py has the whole."""

from __future__ import annotations

import hashlib
import os
import random
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from khod.abi import tree as abi
from khod.core.callers import Owner
from khod.core.node import to_node
from khod.early import folios, plan, record, rootfs, system, tree
from khod.early.plan import Plan, Start
from tests.unit.core.test_node import PLAIN as CARRIED


def encoded(*carried: object) -> bytes:
    nodes = tuple(to_node(n, one) for n, one in enumerate(carried, 1))  # type: ignore[arg-type]
    return abi.encode(
        abi.HandoverTree(
            update_id="up-1", boot_id="b", version="1", map_address=4096, map_pages=1, map_sha256=bytes(32), instances=nodes
        )
    )


def test_the_stage_reads_what_khod_wrote() -> None:
    data = encoded(CARRIED) + bytes(4000)
    found = tree.read(data, hashlib.sha256)
    assert found.update == "up-1"
    (one,) = found.instances
    assert (one.name, one.owner, one.session) == (CARRIED.name, str(CARRIED.owner), CARRIED.session.encode())
    assert one.names == [*CARRIED.fds, *CARRIED.states]
    assert (one.files, tuple(one.memory), tuple(one.sizes)) == (len(CARRIED.fds), CARRIED.memory, CARRIED.sizes)
    assert (tuple(one.seen), one.checked, one.digest) == (CARRIED.sample.frames, CARRIED.sample.checked, CARRIED.sample.digest)


def test_a_tree_that_is_damaged_is_left_to_khod() -> None:
    data = encoded(CARRIED)
    chance = random.Random(7)
    for _ in range(300):
        damaged = bytearray(data)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        with pytest.raises(ValueError):  # whatever it says
            tree.read(bytes(damaged), hashlib.sha256)
        rehashed = bytearray(damaged[:-32])
        rehashed += hashlib.sha256(rehashed).digest()
        with suppress(ValueError):
            tree.read(bytes(rehashed), hashlib.sha256)
    for size in range(0, len(data), 7):
        with pytest.raises(ValueError):
            tree.read(data[:size], hashlib.sha256)


def test_the_plan_there_and_back() -> None:
    starts = [Start("unit:vmm@a.service", "a", ["/bin/vmm", "--x", ""]), Start("user:root", "b", ["/bin/b"], ["nic", "iommu"])]
    written = plan.write(Plan(["/khod/modules/000-vfio.ko"], starts, [("vfio", "khod_vfio:plugin")], (1.5, 1 << 27)))
    found = plan.read(written)
    assert found.modules == ["/khod/modules/000-vfio.ko"]
    assert (found.plugins, found.restoring) == ([("vfio", "khod_vfio:plugin")], (1.5, 1 << 27))
    for before, now in zip(starts, found.starts, strict=True):
        assert [getattr(before, name) for name in Start.__slots__] == [getattr(now, name) for name in Start.__slots__]
    for wrong in (b"", b"khod-plan 2\n", b"khod-plan 1\nstart\ta\n", b"khod-plan 1\nmodule\n", b"khod-plan 1\nalso\ta\n"):
        with pytest.raises(ValueError, match="plan"):
            plan.read(wrong)


def test_the_record_tells_who_may_run() -> None:
    fd = record.begin()
    record.note(fd, "update", "u")
    record.note(fd, "mark", "retrieved", 17)
    record.note(fd, "start", "user:root", "a", "khod.u.1", 16, 4)
    record.note(fd, "runs", "user:root", "a", "khod.u.1", 42, 4711)
    record.note(fd, "start", "user:root", "b", "khod.u.2", 16, 4)
    record.note(fd, "runs", "user:root", "b", "khod.u.2", 43, 4712)
    record.note(fd, "failed", "user:root", "b", "khod.u.2", "no\tsuch\nfile")
    record.note(fd, "start", "user:root", "c", "khod.u.3", 16, 4)
    data = os.pread(fd, 4096, 0)
    os.close(fd)
    found = record.read(data)
    assert (found.update, found.marks) == ("u", {"retrieved": 17})
    assert [(s.name, s.pid, s.since, s.why) for s in found.started] == [
        ("a", 42, 4711, ""), ("b", 43, 4712, "no such file"), ("c", 0, 0, ""),
    ]  # fmt: skip
    assert {(s.frames, s.pages) for s in found.started} == {(16, 4)}
    assert record.read(data + b"runs\tuser:root\tc").started[2].pid == 0, "a torn line was not finished"
    with pytest.raises(ValueError, match="record"):
        record.read(b"something else\n")


@pytest.mark.parametrize(
    ("text", "doubtful"),
    [("root=/dev/vda", False), ("root=PARTUUID=ab-01", False), ("root=8:1", False), ("quiet", True), ("root=UUID=ab", True),
     ("root=LABEL=x", True), ("root=/dev/vda root=UUID=1", True)],
)  # fmt: skip
def test_which_roots_are_found_without_a_program(text: str, doubtful: bool) -> None:
    assert bool(rootfs.doubt(rootfs.cmdline(text))) is doubtful


def test_the_command_line_as_the_kernel_reads_it() -> None:
    found = rootfs.cmdline('root=/dev/sda2 rw rootflags="a=b" ro init=/bin/x -- root=/dev/y')
    assert (found["root"], found["rootflags"], found["init"]) == ("/dev/sda2", "a=b", "/bin/x")
    assert "rw" not in found, "the last one counts"


@pytest.mark.skipif(os.geteuid() != 0, reason="frames are root's to see")
def test_a_page_of_a_file_has_the_frame_that_everybody_sees() -> None:
    from tests.vm.driving import pagemap

    fd = os.memfd_create("pages")
    os.pwrite(fd, os.urandom(8 * 4096), 0)
    seen = pagemap(fd)
    with open("/proc/self/pagemap", "rb", buffering=0) as file:
        for index in (0, 7):
            with system.Page(fd, index) as page:
                assert folios.frame(folios.entries(file.fileno(), page.address // 4096, 1)[0], index) == seen[index]
    os.close(fd)


def test_a_process_is_marked_to_be_spared() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r}); from khod.early import system;"
        "system.survive(); print(open('/proc/self/cmdline').read()[0], open('/proc/self/comm').read(), system.began())"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    mark, name, began = done.stdout.split()
    assert (mark, name) == ("@", "khod-early")
    assert abs(int(began) / os.sysconf("SC_CLK_TCK") - float(Path("/proc/uptime").read_text().split()[0])) < 60


def test_an_owner_is_labelled_as_the_core_labels_it() -> None:
    from dataclasses import replace

    for owner, label in (("user:root", CARRIED.name), ("unit:a.service", f"{CARRIED.name} of unit:a.service")):
        data = encoded(replace(CARRIED, owner=Owner.parse(owner)))
        assert tree.read(data, hashlib.sha256).instances[0].label == label
