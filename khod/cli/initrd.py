# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl initrd. Needs no khod: it is for those who build initrds."""

from __future__ import annotations

import stat
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from khod import config
from khod.cli import output
from khod.cli.command import Json, reporting
from khod.errors import MachineError


class Action(StrEnum):
    """What to do."""

    BUILD = "build"
    ADD = "add"


@reporting
def initrd(
    action: Annotated[
        Action, typer.Argument(metavar="build|add", help="Write an initrd, or add to a tree.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(metavar="PATH", help="The initrd, or the tree's directory.", show_default=False)],
    behind: Annotated[
        Path | None,
        typer.Option("--initrd", metavar="PATH", help="build: the host's own initrd, to go behind.", show_default=False),
    ] = None,
    release: Annotated[
        str, typer.Option(metavar="RELEASE", help="Of the kernel that it is for; the running one's.", show_default=False)
    ] = "",
    configuration: Annotated[
        Path | None, typer.Option("--config", metavar="FILE", help=f"Instead of {config.DEFAULT_PATH}.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Build the initrd that restores before there is a root file system, or add its restore stage to one.

    "build" writes an initrd: the restore stage with the kernel modules and VMMs that the configuration names under initrd:,
    and the host's own initrd behind it. "add" puts the same files into a directory that an initrd is being made of; the hooks
    for dracut and initramfs-tools call it. The kernel that is to use it has rdinit=/khod/init on its command line. khod
    itself does all this whenever a kernel is loaded, with initrd.use set to build.

    \b
    Example:
        khoctl initrd build /boot/initrd.khod --initrd /boot/initrd.img-7.3.1
        khoctl load /boot/vmlinuz-7.3.1 --initrd /boot/initrd.khod --reuse-cmdline --append rdinit=/khod/init
    """
    from khod.initrd import contents
    from khod.initrd.image import spec
    from khod.initrd.libraries import read

    found = contents.members(spec(config.load(configuration), release))
    if action is Action.ADD:
        size = _add(found, target)
    else:
        data = contents.archive(found) + (read(str(behind)) if behind else b"")
        size = len(data)
        try:
            target.write_bytes(data)
        except OSError as error:
            raise MachineError(f"{target} cannot be written", errno=error.errno)
    if json:
        output.print_json({"path": str(target), "size": size, "files": len(found)})
    else:
        output.say(f"{target}: {size} bytes, {len(found)} files")


def _add(found: dict[str, Any], root: Path) -> int:
    """Make the files below a directory; device nodes are whoever's who makes the initrd. Returns the bytes."""
    size = 0
    try:
        for name in sorted(found):
            member, path = found[name], root / name
            if stat.S_ISCHR(member.mode):
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            if stat.S_ISDIR(member.mode):
                path.mkdir(exist_ok=True)
            elif stat.S_ISLNK(member.mode):
                path.unlink(missing_ok=True)
                path.symlink_to(member.content.decode("utf-8", "surrogateescape"))
            else:
                path.write_bytes(member.content)
                path.chmod(stat.S_IMODE(member.mode))
                size += len(member.content)
    except OSError as error:
        raise MachineError(f"{error.filename} cannot be made", errno=error.errno)
    return size
