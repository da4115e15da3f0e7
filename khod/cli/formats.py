# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl formats. Needs no khod: an image says by itself what it understands."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from khod.abi import fleet, kernel_image
from khod.abi.bzimage import HEADER_SIZE
from khod.abi.fleet import Fleet
from khod.abi.formats import Comparison, Format, Match, compare_all, worst
from khod.abi.kernel_image import KernelImage
from khod.cli import output
from khod.cli.command import Json, reporting
from khod.errors import FormatError, InvalidRequest, Refused


@reporting
def formats(
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Kernels: bzImage or vmlinux.", show_default=False)],
    profile: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The formats that a fleet agreed on (YAML).", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Show which formats kernels understand, and which update paths exist among them.

    A path is what becomes of memory that the first kernel preserves when the second one is booted by it. With --profile, each
    kernel is held against that as well; one that falls short ends the command with status 3.

    \b
    Example:
        khoctl formats /boot/vmlinuz-7.3.4 /boot/vmlinuz-7.4.0
        khoctl formats --profile fleet.yaml /boot/vmlinuz-*
    """
    agreed = _fleet(profile) if profile else None
    kernels = [(str(path), _read(path)) for path in images]
    paths = [(a, b, compare_all(one.formats, other.formats)) for a, one in kernels for b, other in kernels if a != b]
    held = [(a, compare_all(agreed.formats, one.formats)) for a, one in kernels] if agreed else []
    if json:
        output.print_json(_object(kernels, paths, agreed, held))
    else:
        _show(kernels, paths, agreed, held)
    if any(comparison.match is not Match.COMPATIBLE for _, compared in held for comparison in compared):
        raise typer.Exit(Refused.exit_status)


def _read(path: Path) -> KernelImage:
    try:
        with open(path, "rb", opener=_opener) as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise InvalidRequest(f"{path} is not a regular file")
            head = file.read(HEADER_SIZE)
            kernel_image.require(head, found.st_size)
            return kernel_image.read(head + file.read())
    except OSError as error:
        raise InvalidRequest(f"cannot read the kernel {str(path)!r}: {error.strerror}")
    except FormatError as error:
        raise FormatError(f"{path}: {error.message}", hint="give a bzImage or a vmlinux of Linux for x86-64")


def _opener(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)  # it may be a FIFO, which nobody writes to


def _fleet(path: Path) -> Fleet:
    try:
        with open(path, "rb", opener=_opener) as file:
            return fleet.parse(file.read(fleet.MAX_SIZE + 1), str(path))
    except OSError as error:
        raise InvalidRequest(f"cannot read the profile {str(path)!r}: {error.strerror}")


def _show(
    kernels: Sequence[tuple[str, KernelImage]],
    paths: Sequence[tuple[str, str, list[Comparison]]],
    agreed: Fleet | None,
    held: Sequence[tuple[str, list[Comparison]]],
) -> None:
    rows = [(name, image.release, " ".join(map(str, image.formats)) or "none") for name, image in kernels]
    output.print_table(("image", "kernel", "formats"), rows)
    if paths:
        output.say()
        output.print_table(("from", "to", "path", "why"), [(a, b, *_verdict(compared)) for a, b, compared in paths])
    if agreed:
        output.say()
        output.print_table(("fleet", "image", "path", "why"), [(agreed.name, a, *_verdict(compared)) for a, compared in held])


def _verdict(compared: list[Comparison]) -> tuple[str, str]:
    reasons = "; ".join(c.reason for c in compared if c.reason)
    outcome = worst(compared) if compared else None
    if outcome is None:
        return "none", "the first kernel hands nothing over: it has no formats"
    return outcome, f"{reasons}: {outcome.sentence}" if reasons else outcome.sentence


def _object(
    kernels: Sequence[tuple[str, KernelImage]],
    paths: Sequence[tuple[str, str, list[Comparison]]],
    agreed: Fleet | None,
    held: Sequence[tuple[str, list[Comparison]]],
) -> dict[str, Any]:
    found: dict[str, Any] = {
        "images": [
            {
                "image": name,
                "kind": image.kind,
                "machine": image.machine,
                "release": image.release,
                "compression": image.compression,
                "formats": _texts(image.formats),
                "listed": image.listed,
                "configured": image.config is not None,
            }
            for name, image in kernels
        ],
        "paths": [{"from": a, "to": b, **_path(compared)} for a, b, compared in paths],
    }
    if agreed:
        found["fleet"] = {"name": agreed.name, "formats": _texts(agreed.formats)}
        found["fleet"]["paths"] = [{"to": a, **_path(compared)} for a, compared in held]
    return found


def _path(compared: list[Comparison]) -> dict[str, Any]:
    path, why = _verdict(compared)
    formats = [
        {
            "name": c.name,
            "writes": str(c.writes or ""),
            "reads": _texts(c.reads),
            "verdict": c.match,
            "outcome": c.outcome,
            "reason": c.reason,
        }
        for c in compared
    ]
    return {"path": path, "why": why, "formats": formats}


def _texts(formats: Sequence[Format]) -> list[str]:
    return [str(f) for f in formats]
