# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl inspect."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from khod.cli import output, show_inspection
from khod.cli.command import Json, khod, reporting
from khod.core.views import InspectionView
from khod.errors import InvalidRequest, KhodError

if TYPE_CHECKING:  # numpy takes longer to import than all other commands need to run
    from khod.inspect.inspection import Wishes
    from khod.inspect.preserved import Preserved
    from khod.inspect.source import Source
    from khod.inspect.views import Inspection, Missing

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@reporting
def inspect(
    context: typer.Context,
    addr: Annotated[
        list[str] | None,
        typer.Option(
            "--addr", metavar="ADDRESS", help="Tell of this physical address alone; may be repeated.", show_default=False
        ),
    ] = None,
    picture: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw physical memory, as .svg or .png.", show_default=False)
    ] = None,
    diff: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Tell what differs from an earlier inspection, of --json.", show_default=False),
    ] = None,
    read: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Show an earlier inspection, of --json.", show_default=False)
    ] = None,
    dump: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Read a memory dump: an ELF core, or bytes with --base.", show_default=False),
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Where the bytes of --dump begin.", show_default=False)
    ] = None,
    root: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Where the root of the handover is.", show_default=False)
    ] = None,
    bitmaps: Annotated[
        int | None, typer.Option(metavar="BYTES", help="Of a bitmap of kho-v1: 512 or 4096.", show_default=False)
    ] = None,
    seconds: Annotated[float, typer.Option(metavar="N", help="For searching memory.")] = 20.0,
    json: Json = False,
) -> None:
    """Show what is handed over, from physical memory.

    khod's own tree and map, the kernel's to the next kernel and from the previous one, the memfds in it, and whose they are.
    Reading memory takes root; without it khod's part is shown. What cannot be had now is listed with the reason.

    \b
    Example:
        khoctl inspect
        khoctl inspect --addr 0x1f9a00000
        khoctl inspect --json > before.json; khoctl inspect --diff before.json --picture memory.svg
        khoctl inspect --dump vmcore
    """
    if bitmaps not in (None, 512, 4096):
        raise InvalidRequest(f"--bitmaps is 512 or 4096, not {bitmaps}")
    if not 0 < seconds < 1e6:
        raise InvalidRequest(f"--seconds is a number above 0, not {seconds:g}")
    if base is not None and dump is None:
        raise InvalidRequest("--base belongs to a dump", hint="name it with --dump")
    if dump is not None and read is not None:
        raise InvalidRequest("--dump and --read are two things to look at", hint="give one")
    if picture is not None and picture.suffix not in (".svg", ".png"):
        raise InvalidRequest(f"{picture}: pictures are .svg or .png")
    addresses = [_address("--addr", text) for text in addr or ()]
    from khod.inspect.inspection import Wishes

    wishes = Wishes(seconds=seconds, root=_address("--root", root) if root is not None else None, bitmaps=bitmaps)
    before = _earlier(diff) if diff is not None else None
    if read is not None:
        seen = _Seen(_earlier(read))
    elif dump is not None:
        seen = _of_dump(dump, _address("--base", base) if base is not None else None, wishes)
    else:
        seen = _of_here(context, wishes)
    if picture is not None:
        _draw(picture, seen.inspection)
    _show(seen, addresses, before, json)


@dataclass
class _Seen:
    inspection: Inspection
    preserved: Preserved | None = None


@dataclass
class _Khod:
    """khod's word, where there was one."""

    view: InspectionView | None = None
    boot_id: str = ""
    error: KhodError | None = None
    missing: list[Missing] = field(default_factory=list)


def _show(seen: _Seen, addresses: list[int], before: Inspection | None, as_json: bool) -> None:
    from khod.inspect.difference import difference
    from khod.inspect.owners import address

    if addresses:
        answers = [address(seen.inspection, seen.preserved, at) for at in addresses]
        if as_json:
            output.print_json(answers)
        else:
            show_inspection.addresses(answers)
    elif before is not None:
        differences = difference(before, seen.inspection)
        if as_json:
            output.print_json({"differences": differences})
        else:
            show_inspection.differences(differences)
    elif as_json:
        output.print_json(seen.inspection)
    else:
        show_inspection.inspection(seen.inspection)


def _of_here(context: typer.Context, wishes: Wishes) -> _Seen:
    """The running kernel, and the khod that speaks for it."""
    from khod.inspect.live import Live
    from khod.inspect.views import Missing

    said = _ask(context)
    here = _BOOT_ID.read_text().strip() if _BOOT_ID.exists() else ""
    if said.view is not None and said.boot_id != here:
        said.missing.append(Missing(what="the kernel's handover", why="khod speaks of another machine than this one"))
        return _only(said)
    try:
        source = Live()
    except KhodError as error:
        if said.error is not None:
            raise said.error
        said.missing.append(Missing(what="the kernel's handover", why=str(error)))
        return _only(said)
    with closing(source):
        return _look(source, wishes, said)


def _ask(context: typer.Context) -> _Khod:
    from khod.inspect.views import Missing

    try:
        with khod(context) as client:
            return _Khod(client.inspect(), client.status().boot_id)
    except KhodError as error:
        return _Khod(error=error, missing=[Missing(what="khod's tree and map", why=str(error))])


def _only(said: _Khod) -> _Seen:
    from khod.inspect.views import Inspection

    return _Seen(Inspection(source="khod", time=time.time_ns(), khod=said.view, missing=tuple(said.missing)))


def _of_dump(path: Path, base: int | None, wishes: Wishes) -> _Seen:
    from khod.inspect.dump import Dump

    with closing(Dump(path, base)) as source:
        return _look(source, wishes, _Khod())


def _look(source: Source, wishes: Wishes, said: _Khod) -> _Seen:
    from khod.inspect.inspection import Look

    look = Look(source, wishes, said.view, missing=said.missing)
    with _readable():
        return _Seen(look.inspection(), look.preserved)


@contextmanager
def _readable() -> Iterator[None]:
    """What the kernel says while memory is read."""
    try:
        yield
    except OSError as error:
        from khod.errors import MachineError

        raise MachineError("read physical memory", errno=error.errno)


def _earlier(path: Path) -> Inspection:
    from khod.inspect.difference import load

    try:
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"read {path}: {error.strerror}")
    return load(data, str(path))


def _draw(path: Path, inspection: Inspection) -> None:
    from khod.inspect.picture import draw, png, svg

    drawn = draw(inspection)
    try:
        if path.suffix == ".png":
            path.write_bytes(png(drawn))
        else:
            path.write_text(svg(drawn))
    except OSError as error:
        raise InvalidRequest(f"write {path}: {error.strerror}")


def _address(option: str, text: str) -> int:
    try:
        value = int(text, 0)
    except ValueError:
        raise InvalidRequest(f"{option}: {text!r} is no address", hint="as in 0x1f9a00000")
    if not 0 <= value < 1 << 52:
        raise InvalidRequest(f"{option}: {text} is no physical address", hint="they are below 2**52")
    return value
