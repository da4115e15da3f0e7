# SPDX-License-Identifier: LGPL-2.1-or-later
"""Whether a retrieve is sure to succeed (decision 19): one that fails has freed the memory, and is not given a second chance.

The kernel charges what it retrieves to whoever asks: the custodian. What can make it fail are limits of the custodian's
control group and of every group above it, strict overcommit accounting, and the table of descriptors.
"""

from __future__ import annotations

import os


def need(size: int, files: int) -> int:
    """Bytes that are charged for `files` files of `size` bytes in all: their last pages whole, the page cache's tree (576 bytes
    for 64 pages, and its upper levels), an inode each, and as much again of what is not the files themselves."""
    return size + 2 * (size // 256) + 2 * files * 8192


def judge(size: int, files: int, limits: list[tuple[str, int]], room: int) -> str:
    """What is wrong, with what to raise; '' for nothing. `limits`: for each file that holds one, its path with how to raise it
    and the bytes that are left below it. `room`: descriptors."""
    if files > room:
        return f"the custodian has room for {room} more descriptors and {files} are asked for: raise LimitNOFILE= of its unit"
    needed = need(size, files)
    for what, left in limits:
        if left < needed:
            return f"{needed} bytes will be charged, and {max(left, 0)} are left below {what}"
    return ""


def doubt(size: int, files: int, room: int, root: str = "/") -> str:
    """`judge` by what this process is limited by. `root` is where proc and sys are."""
    try:
        limits = [*group_limits(root), *overcommit_limits(root)]
    except (OSError, ValueError) as error:
        return f"the limits that the custodian is under cannot be read: {error}"
    return judge(size, files, limits, room)


def overcommit_limits(root: str = "/") -> list[tuple[str, int]]:
    """vm.overcommit_memory=2 refuses a page of shared memory beyond CommitLimit."""
    if _read(f"{root}proc/sys/vm/overcommit_memory") != "2":
        return []
    figures = {}
    for line in _read(f"{root}proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        figures[name] = int(value.split()[0]) * 1024
    left = figures["CommitLimit"] - figures["Committed_AS"]
    return [("CommitLimit of /proc/meminfo: raise vm.overcommit_ratio, or set vm.overcommit_memory to 0", left)]


def group_limits(root: str = "/") -> list[tuple[str, int]]:
    """memory.max and memory.high of our control group and of all above it, of whichever hierarchy has the controller."""
    found = []
    mounts = _mounts(root)
    for line in _read(f"{root}proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            files: tuple[tuple[str, str], ...] = (("memory.max", "memory.current"), ("memory.high", "memory.current"))
        elif "memory" in controllers.split(","):
            files = (("memory.limit_in_bytes", "memory.usage_in_bytes"),)
        else:
            continue
        where = mounts.get("0" if number == "0" else "memory")
        if where is None:
            if path != "/":
                raise OSError(None, f"control group {path} is not mounted anywhere")
            continue  # of the root itself there are no limits
        mounted, at = where
        found += _limits(root + at.lstrip("/"), _below(path, mounted), files)
    return found


def _below(path: str, mounted: str) -> list[str]:
    # A mount can begin below the root of the hierarchy, as in a container: what is above it cannot be seen from here.
    inside = path[len(mounted) :] if path.startswith(mounted.rstrip("/") + "/") or path == mounted else path
    return [part for part in inside.split("/") if part]


def _limits(at: str, parts: list[str], files: tuple[tuple[str, str], ...]) -> list[tuple[str, int]]:
    found = []
    for depth in range(len(parts), -1, -1):
        group = "/".join([at, *parts[:depth]])
        if not os.path.isdir(group):
            raise OSError(None, f"there is no {group}")
        for limit, usage in files:
            try:
                value = _read(f"{group}/{limit}")
            except FileNotFoundError:  # the root group, or the controller is not enabled here
                continue
            if value != "max":
                found.append((f"{group}/{limit}", int(value) - int(_read(f"{group}/{usage}"))))
    return found


def _mounts(root: str) -> dict[str, tuple[str, str]]:
    """Where control groups are mounted: by '0' for version 2 and 'memory' for version 1, which group, and where."""
    found: dict[str, tuple[str, str]] = {}
    for line in _read(f"{root}proc/self/mountinfo").splitlines():
        head, _, tail = line.partition(" - ")
        mounted, at = head.split()[3:5]
        kind, _, options = tail.split()[:3]
        if kind == "cgroup2":
            found.setdefault("0", (mounted, at))
        elif kind == "cgroup" and "memory" in options.split(","):
            found.setdefault("memory", (mounted, at))
    return found


def _read(path: str) -> str:
    with open(path) as f:
        return f.read().strip()
