# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest on the lab's host that the initrd starts: for the tests, which look at whether it came through, and for
`bench.initrd`, which looks at how long it took."""

from __future__ import annotations

import base64
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.vm.host import HERE, KERNEL, Host
from tests.vm.jumps import GUEST, SIZE

VMM = "/usr/local/bin/vmm"
COMMAND = ("cc", "-O2", "-Wall", "-Wextra", "-Werror", "-static")


def program(source: Path, host: Host, path: str) -> None:
    """A C program into the machine, static."""
    with tempfile.TemporaryDirectory() as directory:
        built = Path(directory) / "program"
        subprocess.run([*COMMAND, "-o", str(built), str(source)], check=True, timeout=120)
        content = base64.b64encode(built.read_bytes()).decode()
    host.run("sh", "-c", f"base64 -d >{path} && chmod 755 {path}", input=content)


def configured(
    host: Host, use: str = "build", *, files: Sequence[str] = (), first: Path | None = None, also: Sequence[str] = ()
) -> None:
    """khod, with the instance "guest" to be started in the initrd, which holds these files as well; `first` is the source of
    the first of them. `also`: instances that are started with it."""
    program(HERE / "programs" / "vmm.c", host, VMM)
    if first is not None:
        program(first, host, files[0])
    own = host.run("cat", "/etc/khod/khod.yaml").out
    start = f"{{instance: guest, command: [{VMM}, '{SIZE}'], files: {list(files)}, also: {list(also)}}}"
    host.write("/etc/khod/khod.yaml", f"{own}initrd:\n  use: {use}\n  start:\n  - {start}\n")
    host.run("systemctl", "restart", "khod.service")


def guest(host: Host, name: str, *, enabled: bool) -> None:
    """A guest that registers itself; with `enabled` it is started at each boot, and claims what came through."""
    host.programs("guest")
    unit = GUEST.replace("programs.guest guest", f"programs.guest {name}")
    host.unit(f"{name}.service", unit if enabled else unit.partition("[Install]")[0])


def device_guest(host: Host, *, enabled: bool) -> None:
    """A guest with a device, by the instances "guest", "mappings" and "edu"; see `guest`."""
    host.programs("device", "device_guest", "guest")
    unit = GUEST.replace("programs.guest guest", "programs.device_guest guest")
    unit = unit.replace("[Service]", "[Service]\nLimitMEMLOCK=infinity")
    host.unit("guest.service", unit if enabled else unit.partition("[Install]")[0])


def update(host: Host, initrd: str = "", *, jump: str = "direct") -> None:
    """A jump, with the initrd that khod builds, or that one."""
    host.run("khoctl", "load", KERNEL, *(["--initrd", initrd] if initrd else []))
    host.jump("khoctl", "update", "--jump", jump)
