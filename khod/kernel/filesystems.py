# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host's mounted file systems: the port `FileSystems` of the running kernel (decision 15)."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from khod.core.refusals import refusal

# fmt: off
IN_MEMORY = frozenset({
    "autofs", "bdev", "binder", "binfmt_misc", "bpf", "cgroup", "cgroup2", "configfs", "cpuset", "debugfs", "devpts",
    "devtmpfs", "efivarfs", "fusectl", "fuse.gvfsd-fuse", "fuse.lxcfs", "fuse.portal", "hugetlbfs", "mqueue", "nfsd",
    "nsfs", "proc", "pstore", "ramfs", "resctrl", "rpc_pipefs", "securityfs", "selinuxfs", "smackfs", "sysfs",
    "tmpfs", "tracefs",
})
# fmt: on
"""Types that keep nothing on a disk. A type that is not listed is synced: one call too many harms nobody."""


class Mount(NamedTuple):
    """One line of /proc/PID/mountinfo, as far as it matters here."""

    device: str
    """MAJOR:MINOR of the file system, the same for all its mounts."""
    point: str
    kind: str
    writable: bool
    """Whether the file system is; one of its mounts may still be read-only."""


class KernelFileSystems:
    """The port `FileSystems` of the running kernel."""

    def __init__(self, mountinfo: Path = Path("/proc/self/mountinfo")) -> None:
        self._mountinfo = mountinfo

    def sync(self) -> None:
        """See the port."""
        # sync(2) reaches what other mount namespaces have mounted, and a mount that another one covers, but never says
        # when it failed; syncfs(2) does.
        os.sync()
        for mounts in candidates(self._mountinfo.read_text()):
            _sync(mounts)


def parse(mountinfo: str) -> Iterator[Mount]:
    """The mounts of a mountinfo file (Documentation/filesystems/proc.rst, 3.5)."""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        _id, _parent, device, _root, point, *_ = left.split(" ")
        kind, _source, options, *_ = right.split(" ")
        yield Mount(device, _unescaped(point), kind, "rw" in options.split(","))


def candidates(mountinfo: str) -> list[list[Mount]]:
    """The file systems to sync: for each all its mounts, any of which will do."""
    devices: dict[str, list[Mount]] = {}
    for mount in parse(mountinfo):
        if mount.writable and mount.kind not in IN_MEMORY:
            devices.setdefault(mount.device, []).append(mount)
    return list(devices.values())


def _sync(mounts: list[Mount]) -> None:
    """syncfs one file system through the first of its mounts that still leads to it."""
    from khod.kernel.libc import syncfs  # ctypes

    for mount in mounts:
        try:
            if (fd := _open(mount)) < 0:
                continue
            try:
                syncfs(fd)
            finally:
                os.close(fd)
        except OSError as e:
            raise refusal("sync", e.errno or 0, f"{mount.point} ({mount.kind})")
        return


def _open(mount: Mount) -> int:
    """A descriptor on the mount; -1 when its path leads elsewhere: it is covered by another mount, or gone, or no place
    that can be opened without side effects."""
    try:
        # O_NONBLOCK: what is mounted may be a single file, and that one a FIFO.
        fd = os.open(mount.point, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        # A user's FUSE mount refuses even root; its server dies with the jump anyhow.
        if e.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENXIO) or (e.errno == errno.EACCES and "fuse" in mount.kind):
            return -1
        raise
    if _mount_device(fd) == mount.device:
        return fd
    os.close(fd)
    return -1


def _mount_device(fd: int) -> str:
    # Not st_dev: btrfs has one of its own for each subvolume. The kernel names the mount behind a descriptor instead.
    found = re.search(r"^mnt_id:\s*(\d+)$", Path(f"/proc/self/fdinfo/{fd}").read_text(), re.M)
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        identity, _parent, device, _ = line.split(" ", 3)
        if found and identity == found[1]:
            return device
    return ""


def _unescaped(path: str) -> str:
    # show_mountinfo() writes blank, tab, newline and backslash as three octal digits.
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), os.fsencode(path)))
