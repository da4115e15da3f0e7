# SPDX-License-Identifier: LGPL-2.1-or-later
"""A VMM with its descriptors, as ``khoctl claim`` would start it.

It runs from a file system that stays when the initrd is cleared away, with mounts of its own, since whoever moves to another
root detaches what was mounted below the old one; and in a control group that says that it is to be spared meanwhile.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the half that is written in C: see khod.custodian
import fcntl
import os
import resource

from khod.early import paths, record, system

FIRST = 3
"""SD_LISTEN_FDS_START, systemd/sd-daemon.h."""
GROUPS = "/sys/fs/cgroup"
GROUP = f"{GROUPS}/khod-early"
SURVIVE = "user.survive_final_kill_signal"
"""The mark of a control group whose processes systemd spares (SurviveFinalKillSignal= of systemd.unit(5))."""
SIGPIPE = 13
FILES = 1024
"""Descriptors that a process may have open unless it asks for more, as systemd has it: some close all that they may have."""
TYPE_CHECKING = False  # typing takes longer to import than all that is done here
if TYPE_CHECKING:
    from collections.abc import Callable

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def prepare(clears: bool, say: Callable[[str], None]) -> str:
    """Make the VMMs' root file system ready, and a control group for them; its path. `clears`: whoever goes on with the boot
    clears the initrd away, so it is copied to a file system of its own. Done once, however often it is called. Raises
    OSError."""
    root = paths.STAYS if clears else paths.VMM
    if os.access(f"{root}/proc/self", os.F_OK):
        return root
    try:
        _group()
    except OSError as error:
        say(f"no control group for what is started: {error}")
    if clears:
        os.makedirs(paths.STAYS, exist_ok=True)
        system.mount("tmpfs", paths.STAYS, "tmpfs", options="mode=755")
        _copy(paths.VMM, paths.STAYS)
    for name, kind in (("dev", "devtmpfs"), ("proc", "proc"), ("sys", "sysfs")):
        os.makedirs(f"{root}/{name}", exist_ok=True)
        system.mount(kind, f"{root}/{name}", kind)
    return root


def _group() -> None:
    system.mount("cgroup2", GROUPS, "cgroup2")
    os.makedirs(GROUP, exist_ok=True)
    os.setxattr(GROUP, SURVIVE, b"1")


def start(
    root: str, command: list[str], names: list[str], fds: list[int], clients: list[str], told: tuple[int, list[list[str]]]
) -> str:
    """Start a VMM with these descriptors, which are borrowed: '' when it runs, or why it does not. `told` is the record, and
    the words that speak of each of its instances there. Raises OSError where no process could be made."""
    ours, theirs = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
        if pid == 0:
            _become(root, command, names, fds, clients, told, theirs)
    finally:
        os.close(theirs)
    try:
        return os.read(ours, 4096).decode("utf-8", "replace")  # nothing: the pipe was closed by execve
    finally:
        os.close(ours)


def _become(
    root: str,
    command: list[str],
    names: list[str],
    fds: list[int],
    clients: list[str],
    told: tuple[int, list[list[str]]],
    out: int,
) -> None:
    """In the new process: never returns."""
    fd, instances = told
    try:
        try:
            with open(f"{GROUP}/cgroup.procs", "w") as f:
                f.write("0")
        except OSError:
            pass  # no such group: nobody who looks for it either
        os.setsid()
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(FILES, most), most))
        with open("/proc/self/oom_score_adj", "w") as f:
            f.write("0")
        since = system.began()
        system.mounts_apart()
        os.chroot(root)
        os.chdir("/")
        # Out of the way first: their numbers may be those that others have to get.
        spare = [fcntl.fcntl(one, fcntl.F_DUPFD_CLOEXEC, FIRST + len(fds)) for one in (out, fd, *fds)]
        for index, one in enumerate(spare[2:]):
            os.dup2(one, FIRST + index, inheritable=True)
        out, fd = spare[:2]
        environment = {
            "PATH": _PATH,
            "LANG": "C.UTF-8",
            "LISTEN_FDS": str(len(fds)),
            "LISTEN_FDNAMES": ":".join(name.replace(":", "-") for name in names),
            "LISTEN_PID": str(os.getpid()),
            "KHOD_STATES": ":".join(name.replace(":", "-") for name in clients),
            "KHOD_EARLY": "1",
        }
        _signal.signal(SIGPIPE, _signal.SIG_DFL)  # which Python ignores
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        record.note_all(fd, [["runs", *words, os.getpid(), since] for words in instances])
        os.execve(command[0], command, environment)
    except BaseException as error:
        try:
            record.note_all(fd, [["failed", *words, str(error) or repr(error)] for words in instances])
            os.write(out, (str(error) or repr(error)).encode())
        finally:
            os._exit(127)


def _copy(source: str, target: str) -> None:
    with os.scandir(source) as found:
        entries = list(found)
    for entry in entries:
        to = f"{target}/{entry.name}"
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), to)
        elif entry.is_dir():
            os.mkdir(to)
            _copy(entry.path, to)
        elif entry.is_file():
            reading, writing = os.open(entry.path, os.O_RDONLY), os.open(to, os.O_WRONLY | os.O_CREAT, entry.stat().st_mode)
            while os.sendfile(writing, reading, None, 1 << 24):
                pass
            os.close(reading)
            os.close(writing)
