# SPDX-License-Identifier: LGPL-2.1-or-later
"""The port Kexec, with the restore stage in front of each image's initrd, or in it, where that is configured."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from khod.core.ports import Image, Kexec
from khod.early import paths
from khod.errors import FormatError, InvalidRequest, MachineError, Refused

if TYPE_CHECKING:
    from khod.config import Config
    from khod.initrd.contents import Spec

NONE, BUILD, HOST = "none", "build", "host"
"""What `initrd.use` may be: see khod.config."""
FILE = "initrd.img"
"""In the state directory: the initrd that was built last. An image has its own one open."""
_WORD = f"rdinit={paths.LAUNCHER}"


class JumpImages:
    """`Kexec`, by another one. Where an initrd is built, that takes a second in the call of `open`."""

    def __init__(self, inner: Kexec, configuration: Config, directory: Path) -> None:
        self._inner, self._configuration, self._directory = inner, configuration, directory

    def open(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> Image:
        """See the port. Raises Refused as well, for a host whose root file system takes a program to find and whose own initrd
        is not named; and what building raises."""
        words = without_stage(self._inner.running_cmdline() if cmdline is None else cmdline)
        use = self._configuration.initrd.use
        if use == NONE:
            return self._inner.open(kernel, initrd, words if cmdline is None else cmdline)
        if use == HOST and not initrd:
            raise Refused(
                "no initrd is named, and the host's own is to hold the restore stage", hint="khoctl load KERNEL --initrd PATH"
            )
        if use == HOST:
            _check_stage(initrd)
        if use == BUILD:
            initrd = self._build(kernel, initrd, words)
        return self._inner.open(kernel, initrd, with_stage(words))

    def _build(self, kernel: str, behind: str, cmdline: str) -> str:
        from khod.early.rootfs import cmdline as parsed
        from khod.early.rootfs import doubt
        from khod.initrd.contents import build
        from khod.initrd.libraries import read

        if not behind and (reason := doubt(parsed(cmdline))):
            raise Refused(
                f"the restore stage cannot go on with the boot by itself: {reason}",
                hint="name the host's own initrd: --initrd PATH",
            )
        self._inner.release(self._inner.open(kernel, behind, cmdline))  # what is wrong with these is said first
        data = build(spec(self._configuration, _release(kernel)), read(behind) if behind else b"")
        target, made = self._directory / FILE, self._directory / f"{FILE}.new"
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            made.write_bytes(data)
            made.replace(target)
        except OSError as error:
            made.unlink(missing_ok=True)
            raise MachineError(f"the initrd of {len(data)} bytes cannot be written to {target}", errno=error.errno or 0)
        return str(target)

    def release(self, image: Image) -> None:
        """See the port."""
        self._inner.release(image)

    def load(self, image: Image) -> None:
        """See the port."""
        self._inner.load(image)

    def unload(self) -> None:
        """See the port."""
        self._inner.unload()

    def loaded(self) -> bool:
        """See the port."""
        return self._inner.loaded()

    def running_cmdline(self) -> str:
        """See the port."""
        return self._inner.running_cmdline()

    def execute(self) -> NoReturn:
        """See the port."""
        self._inner.execute()


def spec(configuration: Config, release: str = "") -> Spec:
    """What an initrd is to hold by the configuration."""
    from khod.initrd.contents import Spec, Start

    settings, deadlines = configuration.initrd, configuration.deadlines
    starts = [Start(instance=s.instance, owner=s.owner, command=s.command, files=s.files, also=s.also) for s in settings.start]
    restoring = deadlines.restoring, deadlines.carry_rate
    return Spec(release=release, modules=settings.modules, starts=tuple(starts), restoring=restoring)


def _check_stage(initrd: str) -> None:
    """Raises Refused for one without the stage: where rdinit= leads nowhere, the kernel runs no init of the initrd at all."""
    from khod.abi.cpio import names
    from khod.initrd.libraries import read

    hint = "khoctl initrd build makes one that does; or see the hooks for dracut and initramfs-tools"
    try:
        if paths.LAUNCHER.lstrip("/") in names(read(initrd)):
            return
    except FormatError as error:
        raise Refused(f"{initrd} is no initrd whose contents can be seen: {error.message}", hint=hint)
    raise Refused(f"{initrd} does not hold the restore stage", hint=hint)


def without_stage(cmdline: str) -> str:
    """A command line that does not name the stage: the running kernel's does, if it came up by it."""
    return " ".join(word for word in cmdline.split(" ") if word != _WORD)


def with_stage(cmdline: str) -> str:
    """A command line that names it: before the words that are its init's."""
    before, dashes, after = f" {cmdline} ".partition(" -- ")
    return f"{before.strip()} {_WORD}{dashes}{after}".strip()


def _release(kernel: str) -> str:
    """Of a kernel image; '' for one that does not say."""
    from khod.abi import bzimage

    try:
        with open(kernel, "rb") as f:
            return bzimage.parse(f.read(bzimage.HEADER_SIZE)).version
    except (OSError, FormatError) as error:
        raise InvalidRequest(f"{kernel}: {os.strerror(error.errno or 0) if isinstance(error, OSError) else error}")
