# SPDX-License-Identifier: LGPL-2.1-or-later
"""Kernel modules and what they depend on, by depmod's files (modules.dep(5)): what registers a handler must be there before
/dev/liveupdate is first opened."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from khod.errors import InvalidRequest

TREE = Path("/lib/modules")


def order(names: Sequence[str], release: str, tree: Path = TREE) -> list[Path]:
    """The files of these modules of a kernel and of all that they depend on, in the order of loading; what is built into that
    kernel is in none. Raises InvalidRequest."""
    if not names:
        return []
    directory = tree / release
    try:
        lines = (directory / "modules.dep").read_text().splitlines()
        built_in = {_name(line) for line in (directory / "modules.builtin").read_text().splitlines()}
    except OSError as error:
        raise InvalidRequest(f"{error.filename}: {error.strerror}", hint=f"install the modules of {release}, and run depmod")
    depends = {_name(path): (path, rest.split()) for path, _, rest in (line.partition(":") for line in lines)}
    found: dict[Path, None] = {}
    for name in map(_plain, names):
        if name in built_in:
            continue
        if name not in depends:
            raise InvalidRequest(f"there is no module {name!r} for {release}", hint=f"see {directory}/modules.dep")
        path, needed = depends[name]
        for one in (*reversed(needed), path):
            found[directory / one] = None
    return list(found)


def _name(path: str) -> str:
    return _plain(PurePosixPath(path.strip()).name.partition(".")[0])


def _plain(name: str) -> str:
    return name.replace("-", "_")
