# SPDX-License-Identifier: LGPL-2.1-or-later
"""How the boot goes on: with the host's own initrd, or, where there is none, on the root file system that ``root=`` names, as
the kernel itself would have gone on (init/do_mounts.c)."""

from __future__ import annotations

import os
import time

from khod.early import paths, system

ROOT = f"/{paths.HOME}/root"
MS_RDONLY = 1
MOVED = ("/dev", "/proc", "/sys")
"""What is taken along to the root file system."""
INITS = ("/sbin/init", "/etc/init", "/bin/init", "/bin/sh")
"""What the kernel tries where ``init=`` says nothing."""
SOMEBODY, NOBODY = b"+", b"-"
"""What the custodian says first: whether it may have started somebody, who then runs from what is in the initrd."""
MORE = b"*"
"""What it says next if there are some to be started by `khod.driven`; and the number of the socket that it listens on."""
WAIT = 30.0
"""Seconds that the root's device may take to appear, unless ``rootwait`` says for ever."""
TYPE_CHECKING = False  # typing takes longer to import than all that is done here
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn


def go_on(arguments: list[str], runs: bool, say: Callable[[str], None]) -> NoReturn:
    """Become the host's init. `runs`: somebody may run from what is in the initrd. Raises OSError or ValueError when there is
    no init."""
    if os.access(paths.HOST_INIT, os.X_OK):
        for target in ("/sys/fs/cgroup", "/sys", "/proc", "/dev"):  # it mounts them itself, and is refused where they are
            try:
                system.detach(target)
            except OSError:
                pass
        os.execv(paths.HOST_INIT, [paths.HOST_INIT, *arguments])
    with open("/proc/cmdline") as f:
        options = cmdline(f.read())
    device = _device(options, say)
    if not runs:
        _free(f"/{paths.HOME}")
    _mount(device, options)
    for target in MOVED:
        try:
            os.makedirs(ROOT + target, exist_ok=True)
            system.mount(target, ROOT + target, "", system.MS_MOVE)
        except OSError as error:
            say(f"{target} stays behind: {error}")  # the init mounts what it misses
    os.chdir(ROOT)
    system.mount(".", "/", "", system.MS_MOVE)
    os.chroot(".")
    os.chdir("/")
    inits = [options["init"]] if options.get("init") else [*INITS]
    for init in inits:
        try:
            os.execv(init, [init, *arguments])
        except OSError as error:
            say(f"{init}: {error}")
    raise ValueError(f"no init on {device}: tried {', '.join(inits)}")


def _free(path: str) -> None:
    """Remove all that is below a directory: it is memory. What this process has open it goes on with."""
    with os.scandir(path) as found:
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                _free(entry.path)
                os.rmdir(entry.path)
            else:
                os.unlink(entry.path)


def cmdline(text: str) -> dict[str, str]:
    """A command line of the kernel: what stands behind each '=', '' for a word alone; the last one of a name counts."""
    words = [word.strip('"') for word in text.partition(" -- ")[0].split()]
    found = {word.partition("=")[0]: word.partition("=")[2].strip('"') for word in words}
    # Of these two the last one counts.
    modes = [word for word in words if word in ("ro", "rw")]
    for word in modes[:-1]:
        if word != modes[-1]:
            found.pop(word, None)
    return found


def doubt(options: dict[str, str]) -> str:
    """Why this stage cannot find the root file system by itself; '' when it can. For whoever builds an initrd."""
    root = options.get("root", "")
    if not root:
        return "the command line has no root="
    if root.startswith(("/dev/", "PARTUUID=", "PARTLABEL=")) or _numbers(root):
        return ""
    return f"root={root} takes a program to find"


def _numbers(root: str) -> str:
    major, colon, minor = root.partition(":")
    return root if colon and major.isdigit() and minor.isdigit() else ""


def _device(options: dict[str, str], say: Callable[[str], None]) -> str:
    """The path of the root's device, when it is there."""
    if reason := doubt(options):
        raise ValueError(reason)
    root = options["root"]
    end = None if "rootwait" in options else time.monotonic() + WAIT
    while not (found := _find(root)):
        if end is not None and time.monotonic() > end:
            raise ValueError(f"root={root} has not appeared within {WAIT:g} s")
        time.sleep(0.005)  # as the kernel does (init/do_mounts.c, wait_for_root): drivers tell process 1 nothing
    say(f"root={root} is {found}")
    return found


def _find(root: str) -> str:
    if root.startswith("/dev/"):
        return root if os.path.exists(root) else ""
    kind, _, wanted = root.partition("=")
    for name in os.listdir("/sys/class/block"):
        if kind == root:
            with open(f"/sys/class/block/{name}/dev") as f:
                same = f.read().strip() == root
        else:
            with open(f"/sys/class/block/{name}/uevent") as f:
                key = "PARTUUID" if kind == "PARTUUID" else "PARTNAME"
                same = f"{key}={wanted}".lower() in f.read().lower().split("\n")
        if same:
            return f"/dev/{name}"
    return ""


def _mount(device: str, options: dict[str, str]) -> None:
    os.makedirs(ROOT, exist_ok=True)
    flags = 0 if "rw" in options else MS_RDONLY
    kinds = options["rootfstype"].split(",") if options.get("rootfstype") else _kinds()
    reasons = []
    for kind in kinds:
        try:
            system.mount(device, ROOT, kind, flags, options.get("rootflags", ""))
            return
        except OSError as error:
            reasons.append(f"{kind}: {error}")
    raise ValueError(f"{device} cannot be mounted as {', '.join(reasons)}")


def _kinds() -> list[str]:
    with open("/proc/filesystems") as f:
        return [line.strip() for line in f if not line.startswith("nodev")]
