# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl register."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

from khod.api.client import Asked
from khod.cli import output, show
from khod.cli.command import Json, khod, reporting
from khod.config import size
from khod.errors import InvalidRequest

DEFAULT_NAME = "ram"


@reporting
def register(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the instance is to be called.", show_default=False)],
    memfd_fd: Annotated[
        list[str] | None,
        typer.Option(metavar="[NAME=]N", help="Descriptor N, inherited from who runs khoctl. May be given again."),
    ] = None,
    pid: Annotated[int, typer.Option(metavar="PID", help="Take the descriptors out of this process.", show_default=False)] = 0,
    fd: Annotated[
        list[str] | None, typer.Option(metavar="[NAME=]N", help="Descriptor N of process PID. May be given again.")
    ] = None,
    driver: Annotated[str, typer.Option(metavar="DRIVER", help="Which plugin takes care of it.")] = "guestmemfd",
    optional: Annotated[bool, typer.Option("--optional", help="An update may go on without it.")] = False,
    requires: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="An instance that it cannot be without. May be given again.")
    ] = None,
    lifetime: Annotated[
        str | None,
        typer.Option(
            metavar="LIFETIME",
            help="What keeps it registered: persistent (until khoctl unregister; the default of --memfd-fd), "
            "or process (that of --pid; its default).",
            show_default=False,
        ),
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=SIZE", help="A state that its client will write, at most so large. May be given again."),
    ] = None,
    shareable: Annotated[
        bool, typer.Option("--shareable", help="Others may register the same memory, if they say so too.")
    ] = False,
    option: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="For the driver. May be given again.")] = None,
    json: Json = False,
) -> None:
    """Register memory that shall come through an update. Touches nothing in the kernel.

    It belongs to who runs khoctl. Descriptors have names, by which they are claimed: the first is "ram" unless it is given
    another, the next "ram1".

    \b
    Example:
        khoctl register vm1 --pid "$(pidof qemu-system-x86_64)" --fd 12
        khoctl register vm1 --memfd-fd ram=5 --requires net0 --state devices=64K
    """
    inherited, adopted = _named(memfd_fd or []), _named(fd or [])
    asked = Asked(
        required=not optional,
        requires=requires or [],
        options=dict(_pair(text) for text in option or []),
        lifetime=_lifetime(lifetime, bool(pid)),
        states=[_state(text) for text in state or []],
        shareable=shareable,
    )
    if bool(inherited) == bool(adopted) or bool(adopted) != bool(pid):
        raise InvalidRequest("which descriptors?", hint="give --memfd-fd N, or --pid PID and --fd N")
    with khod(context) as client:
        made = (
            client.adopt(name, driver, pid, adopted, **asked) if adopted else client.register(name, driver, inherited, **asked)
        )
    if json:
        output.print_json(made)
    else:
        show.instance(made.instance)
        output.print_pairs([("handle", made.handle)])


def _lifetime(given: str | None, of_process: bool) -> str:
    if given is None:
        return "process" if of_process else "persistent"
    if given == "connection" or (given == "process" and not of_process):
        raise InvalidRequest(f"khoctl cannot keep an instance of lifetime {given!r} registered: it ends", hint="persistent")
    return given


def _state(text: str) -> tuple[str, int]:
    name, _, bytes_ = text.rpartition("=")
    try:
        return name or _no_state(text), size(bytes_)
    except ValueError:
        return _no_state(text)


def _no_state(text: str) -> NoReturn:
    raise InvalidRequest(f"{text!r} is no state", hint="NAME=SIZE, where SIZE is bytes, or has K, M or G behind it")


def _named(texts: list[str]) -> list[tuple[str, int]]:
    return [_descriptor(text, DEFAULT_NAME + (str(index) if index else "")) for index, text in enumerate(texts)]


def _descriptor(text: str, default: str) -> tuple[str, int]:
    name, equals, number = text.rpartition("=")
    if not number.isdecimal() or (equals and not name):
        raise InvalidRequest(f"{text!r} is no descriptor", hint="a number, or a name, '=' and a number")
    return (name if equals else default), int(number)


def _pair(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise InvalidRequest(f"{text!r} is no option for a driver", hint="KEY=VALUE")
    return key, value
