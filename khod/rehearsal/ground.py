# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a rehearsal needs of the host, looked at before anything is started: each thing that is missing is a refusal."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from khod.abi import ikconfig, kernel_image
from khod.abi.kernel_image import KernelImage
from khod.core import images
from khod.errors import FormatError, InvalidRequest, Refused
from khod.rehearsal import machine, qemu

OVERHEAD = 256 << 20
"""Of QEMU, beside the memory of its machine."""
SMALLEST = 1 << 30
"""Memory of a machine in which two kernels, their scratch areas and khod find room."""
NEEDED = (
    "CONFIG_9P_FS", "CONFIG_NET_9P_VIRTIO", "CONFIG_VIRTIO_PCI", "CONFIG_VIRTIO_BLK", "CONFIG_VIRTIO_CONSOLE",
    "CONFIG_EXT4_FS", "CONFIG_TMPFS", "CONFIG_DEVTMPFS_MOUNT", "CONFIG_DEBUG_FS", "CONFIG_SERIAL_8250_CONSOLE",
)  # fmt: skip
"""What both kernels must have in them: the machine starts them without an initrd."""
COVERED = ("/run", "/dev", "/proc", "/sys")
"""Where the machine has something else than the host."""


@dataclass(frozen=True)
class Kernel:
    """One of the two kernels."""

    path: Path
    image: KernelImage


def require_programs(path: str = qemu.PATH) -> None:
    """Raises Refused where nobody can run a machine, or this user cannot."""
    if os.uname().machine != "x86_64":
        raise Refused(f"a rehearsal runs on x86-64, and this machine is {os.uname().machine}")
    if os.geteuid():
        raise Refused(
            "a rehearsal shows this host's files to its machine, and only root may see them all", hint="run it as root"
        )
    if absent := machine.absent(path):
        hint = "on Debian: apt install qemu-system-x86 e2fsprogs util-linux"
        raise Refused(f"not installed: {', '.join(absent)}", hint=hint)


def require_memory(size: int, meminfo: Path = Path("/proc/meminfo")) -> None:
    """Raises InvalidRequest for a machine that is too small, Refused for one that is too large for this host."""
    if size < SMALLEST:
        raise InvalidRequest(f"a machine of {size} bytes is too small", hint=f"give it {SMALLEST} bytes or more")
    found = re.search(r"^MemAvailable: +(\d+) kB$", meminfo.read_text(), re.M)
    available = int(found[1]) << 10 if found else 0
    if available < size + OVERHEAD:
        raise Refused(
            f"not enough memory: the machine takes {size + OVERHEAD} bytes, and {available} are available",
            hint=f"give it less with --memory ({SMALLEST} bytes at least), or free some",
        )


def require_disk(directory: Path | None = None) -> None:
    """Raises Refused where there is no room for the machine's disk and its logs."""
    at = directory or Path(tempfile.gettempdir())
    free = shutil.disk_usage(at).free
    if free < 2 * machine.STATE_BYTES:
        raise Refused(f"{at} has {free} bytes free, and a rehearsal takes up to {2 * machine.STATE_BYTES}", hint="free some")


def running(given: Path | None, boot: Path = Path("/boot"), release: str = "") -> Kernel:
    """The image of the kernel that is jumped from. Raises Refused where there is none."""
    release = release or os.uname().release
    path = given or boot / f"vmlinuz-{release}"
    if given is None and not path.exists():
        raise Refused(f"there is no image of the running kernel: {path} is not there", hint="name its bzImage with --running")
    kernel = read(path, "running kernel")
    if given is None and kernel.image.release not in ("", release):
        raise Refused(
            f"{path} is Linux {kernel.image.release}, and {release} runs",
            hint="name the running kernel's bzImage with --running",
        )
    return kernel


def read(path: Path, what: str) -> Kernel:
    """A kernel's image that the machine can find and start. Raises InvalidRequest, NotAKernel, Refused."""
    at = path.resolve()
    if any(at.is_relative_to(covered) for covered in COVERED):
        raise InvalidRequest(f"{path}: the machine has a {'/' + at.parts[1]} of its own", hint="copy the image elsewhere")
    opened = images.open_image(str(at), "", "")
    try:
        image = kernel_image.read(images.kernel_bytes(opened, kernel_image.MAX_FILE))
        beside = images.config_beside(opened, image.release)
    except FormatError as error:
        raise Refused(f"{path}: {error.message}", hint=f"give the bzImage of the {what}")
    finally:
        images.close_image(opened)
    _bootable(path, image, image.config or (ikconfig.parse(beside) if beside else None))
    return Kernel(at, image)


def _bootable(path: Path, image: KernelImage, config: Mapping[str, str] | None) -> None:
    """A kernel whose configuration nobody knows is tried."""
    if image.machine != "x86-64":
        raise Refused(f"{path} is for {image.machine}, and this machine is x86-64", hint="name a kernel for this machine")
    missing = [name for name in NEEDED if config is not None and config.get(name) != "y"]
    if missing:
        raise Refused(
            f"{path} cannot be started in the machine: {', '.join(missing)} must be built in (=y), not as modules",
            hint="build it so, or rehearse on a host of the fleet whose kernel is",
        )
