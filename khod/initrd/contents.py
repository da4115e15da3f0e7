# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is in the initrd, as members of an archive: the same for the same files on the host."""

from __future__ import annotations

import marshal
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path

from khod.abi import cpio
from khod.abi.cpio import Member
from khod.early import paths, plan
from khod.errors import InvalidRequest, MachineError
from khod.initrd import closure, libraries, modules
from khod.initrd.launcher import launcher
from khod.plugin.manager import GROUP

Members = dict[str, Member]


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """An instance that the stage starts."""

    instance: str
    owner: str = "user:root"
    command: tuple[str, ...]
    """With the program's absolute path."""
    files: tuple[str, ...] = ()
    """What the VMM needs beside its libraries: files, and directories with all that is in them."""
    also: tuple[str, ...] = ()
    """Other instances of the same owner's that it is given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What an initrd is to hold."""

    release: str = ""
    """Of the kernel that it is for; '' for the running one. Only its modules are looked up by it."""
    modules: tuple[str, ...] = ()
    starts: tuple[Start, ...] = field(default=())
    restoring: tuple[float, int] = (120.0, 0)
    """See `khod.early.plan.Plan`."""

    @property
    def driven(self) -> bool:
        """Whether drivers have to do with any of them (`khod.driven`)."""
        return any(start.also for start in self.starts)


def members(spec: Spec) -> Members:
    """All of it. Raises InvalidRequest, MachineError."""
    found: Members = {"dev/console": cpio.characters(5, 1, 0o600), "dev/null": cpio.characters(1, 3, 0o666)}
    for empty in ("dev", "proc", "sys", "run", paths.MODULES.lstrip("/"), paths.VMM.lstrip("/")):
        found[empty] = cpio.directory()
    plugins = installed() if spec.driven else []
    stage = _interpreter(found, plugins)
    loaded = _modules(found, spec)
    for start in spec.starts:
        _vmm(found, start)
    starts = [plan.Start(start.owner, start.instance, list(start.command), list(start.also)) for start in spec.starts]
    try:
        found[paths.PLAN.lstrip("/")] = cpio.file(plan.write(plan.Plan(loaded, starts, plugins, spec.restoring)))
    except ValueError as error:
        raise InvalidRequest(f"the initrd's plan: {error}")
    found[paths.LAUNCHER.lstrip("/")] = cpio.file(launcher([*paths.INTERPRETER, stage], paths.HOST_INIT), 0o755)
    return found


def build(spec: Spec, behind: bytes = b"") -> bytes:
    """The archive, and behind it the host's own initrd."""
    return archive(members(spec)) + behind


def archive(found: Members) -> bytes:
    """The archive of these. The launcher is the last: where there is no room to unpack everything, the kernel finds none, and
    boots without it."""
    return cpio.archive(found, paths.LAUNCHER.lstrip("/"))


def installed() -> list[tuple[str, str]]:
    """The plugins of this host: their names, and what implements them."""
    return sorted((entry.name, entry.value) for entry in entry_points(group=GROUP))


def _interpreter(found: Members, plugins: Sequence[tuple[str, str]]) -> str:
    """The interpreter, its libraries and the stage's modules, with plugins those too; the stage's path. Raises MachineError,
    InvalidRequest."""
    program = os.path.realpath(sys.executable)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = f"{paths.HOME}/lib/{version}"
    implementing = [where.partition(":")[0] for _, where in plugins]
    directories = dict.fromkeys([_home("khod"), *map(_home, implementing), *filter(os.path.isdir, sys.path)])
    argv = [program, "-I", "-S", str(closure.__file__), ":".join(directories), *implementing]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=120, env={"LANG": "C.UTF-8"})
    if done.returncode:
        raise MachineError(f"the stage cannot be imported by {program}: {done.stderr.decode(errors='replace')[-500:]}")
    objects = [program]
    for name, origin, code in marshal.loads(done.stdout):
        where = name.replace(".", "/")
        if not code:
            objects.append(origin)
            found[f"{library}/lib-dynload/{os.path.basename(origin)}"] = cpio.file(libraries.read(origin), 0o755)  # noqa: PTH119
        elif os.path.basename(origin) == "__init__.py":  # noqa: PTH119
            found[f"{library}/{where}/__init__.pyc"] = cpio.file(code)
        else:
            found[f"{library}/{where}.pyc"] = cpio.file(code)
    # By these two the interpreter knows its library; os itself is frozen into it.
    found.setdefault(f"{library}/os.pyc", cpio.file(b""))
    found.setdefault(f"{library}/lib-dynload", cpio.directory())
    found[paths.PROGRAM.lstrip("/")] = cpio.file(libraries.read(program), 0o755)
    needed = libraries.closure(objects)
    if "" not in needed:
        raise InvalidRequest(f"{program} is no dynamic program", hint="run khod by an interpreter that is")
    for name, path in needed.items():
        where = f"{paths.LIBRARIES}/{name}" if name else paths.LOADER
        found[where.lstrip("/")] = cpio.file(libraries.read(path), 0o755)
    return f"/{library}/khod/early/stage.pyc"


def _home(module: str) -> str:
    """The directory that a module is found in."""
    package = find_spec(module.partition(".")[0])
    if package is None or package.origin is None:
        raise MachineError(f"the plugin {module!r} is installed, and cannot be found")
    return str(Path(package.origin).parents[1 if package.submodule_search_locations else 0])


def _modules(found: Members, spec: Spec) -> list[str]:
    """The kernel modules, numbered; their paths in the order of loading."""
    loaded = []
    for number, path in enumerate(modules.order(spec.modules, spec.release or os.uname().release)):
        where = f"{paths.MODULES}/{number:03}-{path.name}"
        found[where.lstrip("/")] = cpio.file(libraries.read(str(path)))
        loaded.append(where)
    return loaded


def _vmm(found: Members, start: Start) -> None:
    """One VMM with what it needs, by the paths that all of it has on the host."""
    program = start.command[0]
    if not program.startswith("/"):
        raise InvalidRequest(
            f"the command of {start.instance} begins with {program!r}", hint="name the program by its absolute path"
        )
    for path in _programs(program):
        _add(found, path)
        if libraries.read(path).startswith(b"\x7fELF"):
            for needed in libraries.closure([path]).values():
                _add(found, needed)
    for path in start.files:
        if not os.path.lexists(path) or not path.startswith("/"):
            raise InvalidRequest(f"{path!r}, which {start.instance} is to have, is no path of this host")
        for one in _below(path):
            _add(found, one)
    if os.path.exists("/etc/ld.so.cache"):  # noqa: PTH110
        _add(found, "/etc/ld.so.cache")


def _programs(path: str) -> Iterator[str]:
    """A program, and for a script its interpreter too."""
    yield path
    head = libraries.read(path)[:256]
    if head.startswith(b"#!"):
        words = os.fsdecode(head[2:].split(b"\n")[0]).split()
        if not words or not words[0].startswith("/"):
            raise InvalidRequest(f"{path}: its first line names no interpreter by an absolute path")
        yield words[0]


def _below(path: str) -> Iterable[str]:
    if not os.path.isdir(path):  # noqa: PTH112
        return [path]
    every = [path]
    for directory, names, files in os.walk(path):
        names.sort()
        every += [os.path.join(directory, name) for name in sorted([*names, *files])]  # noqa: PTH118
    return every


def _add(found: Members, path: str) -> None:
    """A file, with every link that leads to it, below the VMMs' root."""
    root = paths.VMM.lstrip("/")
    for _ in range(40):  # as the kernel does
        part, link = _first_link(path)
        if not link:
            break
        found[root + part] = cpio.link(link)
        path = os.path.normpath(os.path.join(os.path.dirname(part), link) + path[len(part) :])  # noqa: PTH118, PTH120
    if os.path.isdir(path):  # noqa: PTH112
        found.setdefault(root + path, cpio.directory())
    elif os.path.isfile(path):  # noqa: PTH113
        permissions = os.stat(path).st_mode & 0o777  # noqa: PTH116
        found[root + path] = cpio.file(libraries.read(path), permissions)


def _first_link(path: str) -> tuple[str, str]:
    """The first part of a path that is a symbolic link, and where it leads; '' for none."""
    parts: Sequence[str] = path.split("/")
    for depth in range(2, len(parts) + 1):
        part = "/".join(parts[:depth])
        if os.path.islink(part):  # noqa: PTH114
            return part, os.readlink(part)  # noqa: PTH115
    return path, ""
