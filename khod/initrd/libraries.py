# SPDX-License-Identifier: LGPL-2.1-or-later
"""The shared libraries that programs need, by what their files say (ld.so(8)): nothing is run to find out."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterable
from pathlib import Path

from khod.abi import elf
from khod.errors import FormatError, InvalidRequest

_CONFIGURATION = Path("/etc/ld.so.conf")
_DEFAULT = ("/lib64", "/usr/lib64", "/lib", "/usr/lib")
_LARGEST = 1 << 30


def directories(configuration: Path = _CONFIGURATION) -> list[str]:
    """Where the loader looks: what ld.so.conf and the files that it includes name, and its own."""
    return list(dict.fromkeys([*_configured(configuration, 0), *_DEFAULT]))


def _configured(path: Path, depth: int) -> Iterable[str]:
    try:
        lines = path.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return
    for line in lines:
        words = line.partition("#")[0].split()
        if words[:1] == ["include"] and depth < 4:
            for pattern in words[1:]:
                for found in sorted(glob.glob(pattern, root_dir=path.parent)):  # noqa: PTH207  # relative to there, or absolute
                    yield from _configured(path.parent / found, depth + 1)
        elif words and words[0].startswith("/"):
            yield words[0].rstrip("/")


def read(path: str) -> bytes:
    """A file's bytes. Raises InvalidRequest."""
    try:
        with open(path, "rb") as f:
            data = f.read(_LARGEST + 1)
    except OSError as error:
        raise InvalidRequest(f"{path}: {error.strerror}")
    if len(data) > _LARGEST:
        raise InvalidRequest(f"{path} has more than {_LARGEST} bytes")
    return data


def closure(programs: Iterable[str]) -> dict[str, str]:
    """All libraries of these programs and shared objects, by the name that they are needed under, each with its path, and under
    '' the loader, if there is one. Raises InvalidRequest naming what needs which library that is nowhere."""
    found: dict[str, str] = {}
    search = directories()
    todo = list(programs)
    while todo:
        path = todo.pop(0)
        data = read(path)
        try:
            linkage = elf.linkage(data)
        except FormatError as error:
            raise InvalidRequest(f"{path}: {error.message}")
        if linkage.interpreter is not None and "" not in found:
            at, size = linkage.interpreter
            found[""] = os.fsdecode(data[at : at + size].rstrip(b"\0"))
        origin = os.path.dirname(os.path.realpath(path))  # noqa: PTH120
        own = [part.replace("$ORIGIN", origin).replace("${ORIGIN}", origin) for part in linkage.search]
        for name in linkage.needed:
            if name not in found:
                found[name] = _find(name, [*own, *search], path)
                todo.append(found[name])
    return found


def _find(name: str, search: Iterable[str], needed_by: str) -> str:
    for directory in search if "/" not in name else [""]:
        path = f"{directory}/{name}" if directory else name
        if os.path.isfile(path):  # noqa: PTH113
            return path
    raise InvalidRequest(
        f"{needed_by} needs {name}, which is nowhere", hint="install the library, or list its directory in ld.so.conf"
    )
