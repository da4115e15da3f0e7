# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.kernel.boot, filesystems, processes, memory and clock on this host, and on files that look like another one's."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from khod.errors import InvalidRequest, NotPermitted, SyncFailed
from khod.kernel import filesystems
from khod.kernel.boot import KernelBootInfo, kho_setup_data
from khod.kernel.clock import KernelClock
from khod.kernel.filesystems import KernelFileSystems, Mount
from khod.kernel.memory import KernelMemory, _movable_used
from khod.kernel.processes import KernelProcesses


def test_a_cold_boot(tmp_path: Path) -> None:
    boot = KernelBootInfo(tmp_path / "kho", tmp_path / "setup_data").boot()
    assert boot.boot_id == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert boot.release == subprocess.check_output(["uname", "-r"], text=True).strip()
    assert (boot.handover, boot.kexec_count, boot.previous_release) == (False, 0, "")


def test_a_boot_by_handover_as_debugfs_tells_it(tmp_path: Path) -> None:
    blobs = tmp_path / "kho/in/sub_fdts"
    blobs.mkdir(parents=True)
    (blobs / "kexec-metadata").write_bytes(struct.pack("=I65sI", 1, b"7.3.4", 3))
    info = KernelBootInfo(tmp_path / "kho", tmp_path / "setup_data")
    boot = info.boot()
    assert (boot.handover, boot.kexec_count, boot.previous_release) == (True, 3, "7.3.4")
    assert info.boot() is boot


def test_a_boot_by_handover_without_debugfs(tmp_path: Path) -> None:
    for number, kind in (("0", "0x9"), ("1", "0xa")):
        entry = tmp_path / "setup_data" / number
        entry.mkdir(parents=True)
        (entry / "type").write_text(f"{kind}\n")
        (entry / "data").write_bytes(b"seed" if kind == "0x9" else b"kho!" * 8)
    assert kho_setup_data(tmp_path / "setup_data") == b"kho!" * 8
    boot = KernelBootInfo(tmp_path / "kho", tmp_path / "setup_data").boot()
    assert (boot.handover, boot.kexec_count) == (True, 0)


MOUNTINFO = r"""
21 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
22 21 0:5 / /dev rw - devtmpfs devtmpfs rw
23 21 0:20 / /run rw shared:2 master:3 - tmpfs tmpfs rw
24 21 8:2 / /mnt/with\040blank ro,relatime - xfs /dev/sda2 rw
25 21 8:1 /var /srv rw - ext4 /dev/sda1 rw
26 21 8:3 / /media ro - iso9660 /dev/sr0 ro
27 21 0:44 / /net rw - nfs4 server:/export rw,vers=4.2
""".strip()


def test_every_writable_file_system_once_and_none_in_memory() -> None:
    assert filesystems.candidates(MOUNTINFO) == [
        [Mount("8:1", "/", "ext4", True), Mount("8:1", "/srv", "ext4", True)],
        [Mount("8:2", "/mnt/with blank", "xfs", True)],
        [Mount("0:44", "/net", "nfs4", True)],
    ]


def test_findmnt_reads_the_same(tmp_path: Path) -> None:
    said = subprocess.check_output(["findmnt", "-rn", "-o", "MAJ:MIN,FSTYPE"], text=True).split()
    own = [word for m in filesystems.parse(Path("/proc/self/mountinfo").read_text()) for word in (m.device, m.kind)]
    assert sorted(own) == sorted(said)


def test_this_host_can_be_synced() -> None:
    synced: list[str] = []
    sys.addaudithook(lambda event, args: synced.append(str(args[0])) if event == "open" else None)
    KernelFileSystems().sync()
    expected = filesystems.candidates(Path("/proc/self/mountinfo").read_text())
    assert expected
    assert all(any(mount.point in synced for mount in mounts) for mounts in expected)


def test_a_file_system_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def syncfs(fd: int) -> None:
        raise OSError(errno.EIO, "syncfs")

    monkeypatch.setattr("khod.kernel.libc.syncfs", syncfs)  # no disk that fails is at hand
    point = filesystems.candidates(Path("/proc/self/mountinfo").read_text())[0][0].point
    with pytest.raises(SyncFailed, match=point) as refused:
        KernelFileSystems().sync()
    assert refused.value.errno == errno.EIO


def test_processes_of_user_space_alone_and_not_ourselves() -> None:
    # A name with what /proc/PID/stat separates its fields by.
    program = "import sys; open('/proc/self/comm', 'w').write('a) b (c'); print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        child.stdout.readline()
        listing = {p.pid: p.name for p in KernelProcesses().listing()}
        child.communicate()
    assert listing[child.pid] == "a) b (c"
    assert os.getpid() not in listing
    assert not any(Path(f"/proc/{pid}/exe").is_symlink() and not _has_exe(pid) for pid in listing if pid != child.pid)


def _has_exe(pid: int) -> bool:
    """A kernel thread has none; one that ended meanwhile proves nothing."""
    try:
        Path(f"/proc/{pid}/exe").readlink()
    except FileNotFoundError:
        return not Path(f"/proc/{pid}").exists()
    except PermissionError:
        return True
    return True


def test_a_descriptor_of_another_process() -> None:
    program = "import os, sys; fd = os.memfd_create('theirs'); os.write(fd, b'hello'); print(fd, flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        number = int(child.stdout.readline())
        processes = KernelProcesses()
        try:
            fd = processes.descriptor(child.pid, number)
        except NotPermitted:
            child.communicate()
            pytest.skip("this host does not let us trace our own child")
        assert os.pread(fd, 10, 0) == b"hello"
        assert not os.get_inheritable(fd)
        os.close(fd)
        with pytest.raises(InvalidRequest, match="no such descriptor"):
            processes.descriptor(child.pid, 999)
        with pytest.raises(InvalidRequest, match=r"descriptor 0 of process \d+ is 'pipe:.*', which khod cannot keep"):
            processes.descriptor(child.pid, 0)
        child.communicate()
    for pid in (child.pid, -1, 0):
        with pytest.raises(InvalidRequest, match="no such process"):
            processes.descriptor(pid, 0)


def test_memory_as_the_host_lays_it_out() -> None:
    memory = KernelMemory()
    figures = memory.figures()
    assert 0 < figures.available <= figures.total
    if not os.geteuid():
        ranges = memory.ram()
        assert all(a.end < b.start for a, b in pairwise(ranges))
        assert all(r.start % 4096 == r.end % 4096 == 0 for r in ranges)
        assert sum(r.end - r.start for r in ranges) >= figures.total


def test_movable_memory_in_use() -> None:
    zone = "Node {}, zone {:>8}\n  pages free     {}\n        min      5\n        managed  {}\n"
    text = zone.format(0, "Normal", 1, 1000) + zone.format(0, "Movable", 10, 100) + zone.format(1, "Movable", 0, 7)
    assert _movable_used(text) == (90 + 7) * 4096
    assert _movable_used(Path("/proc/zoneinfo").read_text()) >= 0


def test_the_rate_is_given_once_it_can_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = [5_000_000_000]
    monkeypatch.setattr("time.clock_gettime_ns", lambda _clock: raw[0])
    clock = KernelClock(lambda: 7 + raw[0] * 2)  # two ticks a nanosecond: 2 GHz
    raw[0] += 99_000_000
    assert clock.stamp().tsc_khz == 0
    raw[0] += 1_000_000
    stamp = clock.stamp()
    assert (stamp.tsc, stamp.tsc_khz) == (7 + raw[0] * 2, 2_000_000)
    without = KernelClock(None).stamp()
    assert (without.tsc, without.tsc_khz) == (0, 0)
