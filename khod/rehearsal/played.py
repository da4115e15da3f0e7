# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a rehearsal plays inside its machine: the update, by khod and khoctl, of stand-ins for what the host has registered."""

from __future__ import annotations

import mmap
import os
import threading
import zlib
from collections.abc import Iterator

import msgspec

from khod.api.client import Client
from khod.errors import KhodError
from khod.rehearsal.guest import Guest
from khod.rehearsal.inside import STATUS, Khod
from khod.rehearsal.shapes import DRIVER, File, Shape

CHUNK = 1 << 22
_MFD_ALLOW_SEALING, _MFD_HUGETLB, _MFD_EXEC = 0x2, 0x4, 0x10
_EXITS = {3: "blocked", 6: "undone"}
"""What an exit status of `khoctl update` means; any other is no verdict."""


def before(vm: Guest) -> None:
    """In the kernel that is to be left."""
    vm.record("started", release=os.uname().release)
    khod = Khod(vm, vm.parameters["settings"])
    shapes = msgspec.convert(vm.parameters["shapes"], list[Shape])
    held = [fd for shape in shapes for fd in made(khod, shape)]
    vm.record("registered", sizes={shape.name: shape.size for shape in shapes}, fds=len(held))
    overrides: list[str] = vm.parameters["overrides"]
    with khod.client() as client:
        try:
            client.load(vm.parameters["target"], "", vm.parameters["cmdline"])
            view = client.preflight(overrides=overrides)
        except KhodError as error:
            vm.record("blocked", said=str(error))
            vm.over()
            return
    vm.record("preflight", target=view.target, checks=msgspec.to_builtins(view.checks))
    ended = _update(vm, khod, overrides)
    if (name := _EXITS.get(ended[0])) is None:
        raise AssertionError(f"khoctl update ended with status {ended[0]}: {ended[1]}")
    with khod.client() as client:
        updates = client.history(1)
    vm.record(name, said=ended[1], update=msgspec.to_builtins(updates[0]) if updates else None)
    vm.over()


def _update(vm: Guest, khod: Khod, overrides: list[str]) -> tuple[int, str]:
    """khoctl's update, told to the host as it goes; its exit status and its last words, where it does not jump."""
    said, state = "", ""
    for line in khod.khoctl("update", "--json", *(word for name in overrides for word in ("--override", name))):
        if line.startswith(STATUS):
            status = int(line.removeprefix(STATUS))
            if state == "executing" and status in (0, 7):
                threading.Event().wait()  # the jump is next, and takes this process with it
            return status, said
        if line.startswith("{"):
            event = msgspec.json.decode(line)
            if "error" in event:
                said = str(event["error"]["message"])
            elif event.get("state", state) != state:
                state = event["state"]
                vm.record(state, message=event["message"])
    raise AssertionError("khoctl update said nothing of its end")


def after(vm: Guest) -> None:
    """In the one that was jumped to."""
    vm.record("landing", release=os.uname().release)
    khod = Khod(vm, vm.parameters["settings"])
    with khod.client() as client:
        status, update = client.status(), client.history(1)[0]
        shapes = msgspec.convert(vm.parameters["shapes"], list[Shape])
        found = {shape.name: _found(client, shape) for shape in shapes}
        problems = [*status.problems, *update.problems]
        if status.state == "restored":
            problems += _finish(client)
    vm.record(
        "landed",
        release=os.uname().release,
        state=status.state,
        reason=update.reason,
        problems=problems,
        left_behind=list(update.left_behind),
        parts=found,
        update=msgspec.to_builtins(update),
    )
    vm.over()


def _found(client: Client, shape: Shape) -> tuple[str, bool | None]:
    """An instance's state, and whether its bytes are those that it had; None when it is not handed out."""
    try:
        claim = client.claim(shape.name, lifetime="persistent")
    except KhodError as error:
        return str(error), None
    if claim.answer != "fds":
        return claim.answer, None
    fds = dict(zip(claim.names, claim.fds, strict=True))
    states = {view.name: view.state for view in client.instances()}
    whole = all(file.name in fds and _is_filled(fds[file.name], shape, file) for file in shape.files)
    for fd in claim.fds:
        os.close(fd)
    return states.get(shape.name, "claimed"), whole


def _finish(client: Client) -> list[str]:
    try:
        client.finish()
    except KhodError as error:
        return [f"finish: {error}"]
    return []


def made(khod: Khod, shape: Shape) -> list[int]:
    """A stand-in, registered; its descriptors, which stay open."""
    fds = []
    for file in shape.files:
        flags = _MFD_ALLOW_SEALING | _MFD_EXEC | (_MFD_HUGETLB if file.kind == "hugetlb" else 0)
        fd = os.memfd_create(file.name, flags)
        os.ftruncate(fd, file.size)
        _fill(fd, shape, file)
        fds.append((file.name, fd))
    options = {"carry": "yes"} if any(file.kind == "hugetlb" for file in shape.files) else {}
    with khod.client() as client:
        client.register(
            shape.name, DRIVER, fds, lifetime="persistent", required=shape.required, requires=shape.requires, options=options
        )  # fmt: skip
    return [fd for _, fd in fds]


def _contents(shape: Shape, file: File) -> Iterator[tuple[int, bytes]]:
    """Every byte of a file, chunk by chunk, holes as zeros: no two chunks of a file are alike, nor those of two files."""
    whose = zlib.crc32(f"{shape.name}/{file.name}".encode()) << 32
    for offset in range(0, file.size, CHUNK):
        length, data = min(CHUNK, file.size - offset), max(0, min(CHUNK, file.allocated - offset))
        word = (whose | offset // CHUNK | 1 << 31).to_bytes(8, "little")
        yield offset, (word * -(-data // 8))[:data].ljust(length, b"\0")


def _fill(fd: int, shape: Shape, file: File) -> None:
    if file.allocated:
        with mmap.mmap(fd, file.size) as memory:  # a file in huge pages takes no write(2)
            for offset, data in _contents(shape, file):
                if offset < file.allocated:
                    data = data[: file.allocated - offset]
                    memory[offset : offset + len(data)] = data


def _is_filled(fd: int, shape: Shape, file: File) -> bool:
    if os.fstat(fd).st_size != file.size:
        return False
    if not file.size:
        return True
    with mmap.mmap(fd, file.size, prot=mmap.PROT_READ) as memory:
        return all(memory[offset : offset + len(data)] == data for offset, data in _contents(shape, file))
