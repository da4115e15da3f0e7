# SPDX-License-Identifier: LGPL-2.1-or-later
"""Calls made by somebody else: a process with a user, groups and a control group of its own, on khod's real socket."""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ONLY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")

_CODE = """
import array, json, os, socket, sys
who = json.load(sys.stdin)
if who["cgroup"]:
    with open(who["cgroup"] + "/cgroup.procs", "w") as procs:
        procs.write(str(os.getpid()))
os.setgroups(who["groups"])
os.setgid(who["gid"])
os.setuid(who["uid"])
answers = []
for connection in who["connections"]:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    try:
        sock.connect(who["path"])
    except OSError as error:
        answers += [[{"error": type(error).__name__}]] * len(connection)
        continue
    rest = b""
    for call, files in connection:
        fds = [os.memfd_create("ram") for _ in range(files)]
        for fd in fds:
            os.ftruncate(fd, 4096)
        sock.sendmsg([json.dumps(call).encode() + b"\\0"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
        parts = []
        while not parts or parts[-1].get("continues"):
            while b"\\0" not in rest and (more := sock.recv(65536)):
                rest += more
            if b"\\0" not in rest:
                parts.append({"error": "hung up"})
                break
            part, _, rest = rest.partition(b"\\0")
            parts.append(json.loads(part))
        answers.append(parts)
    sock.close()
json.dump(answers, sys.stdout)
"""


@dataclass(frozen=True)
class Somebody:
    """Who calls."""

    user: str
    groups: tuple[int, ...] = ()
    cgroup: str = ""
    """The directory of a control group."""

    def calls(self, path: Path, *connections: Sequence[tuple[str, Mapping[str, Any], int]]) -> list[list[dict[str, Any]]]:
        """Make calls (method, parameters, memfds beside it), each list on one connection: all answers to each."""
        entry = pwd.getpwnam(self.user)
        who = {
            "uid": entry.pw_uid,
            "gid": entry.pw_gid,
            "groups": self.groups,
            "cgroup": self.cgroup,
            "path": str(path),
            "connections": [[_call(*call) for call in calls] for calls in connections],
        }
        command = [sys.executable, "-I", "-S", "-c", _CODE]
        done = subprocess.run(command, input=json.dumps(who), capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        answers: list[list[dict[str, Any]]] = json.loads(done.stdout)
        return answers


def _call(method: str, parameters: Mapping[str, Any], files: int) -> tuple[dict[str, Any], int]:
    more = {"more": True} if method in ("Update", "Subscribe") else {}
    return {"method": f"org.khod.Host.{method}", "parameters": parameters} | more, files


def names(count: int) -> list[str]:
    """Users of this machine that are not root."""
    found = [entry.pw_name for entry in pwd.getpwall() if entry.pw_uid not in (0, os.geteuid())]
    if len(found) < count:
        pytest.skip(f"{count} users are needed, there are {len(found)}")
    return found[:count]


class _Alone:
    """Control groups are the host's: one process at a time makes some, however many."""

    def __init__(self) -> None:
        self._depth, self._file = 0, -1

    def __enter__(self) -> None:
        if not self._depth:
            self._file = os.open(Path(tempfile.gettempdir(), "khod-control-groups.lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if not self._depth:
            os.close(self._file)


_alone = _Alone()


@contextmanager
def control_group(name: str) -> Iterator[str]:
    """The directory of a control group of the unified hierarchy, such as 'system.slice/vmm.service', removed afterwards."""
    with _alone, _control_group(name) as directory:
        yield directory


@contextmanager
def _control_group(name: str) -> Iterator[str]:
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    root = next((Path(mount[1]) for mount in mounts if mount[2] == "cgroup2"), None)
    if root is None or not os.access(root, os.W_OK):
        pytest.skip("no control groups can be made here")
    made: list[Path] = []
    here = root
    for part in name.split("/"):
        here = here / part
        if not here.exists():
            try:
                here.mkdir()
            except OSError as error:
                pytest.skip(f"no control groups can be made here: {error}")
            made.append(here)
    try:
        yield str(here)
    finally:
        for directory in reversed(made):
            directory.rmdir()
