# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel fails to freeze the second of two files, in the middle of its own serialization: the jump comes back with
everything as it was, and a second one succeeds."""

from __future__ import annotations

import json
from zlib import crc32

from khod.errors import KexecFailed
from khod.kernel.machine import machine
from tests.vm.guest import Guest

SIZE = 1 << 20


def before(vm: Guest) -> None:
    ports = machine(vm.state)
    session = ports.liveupdate.create_session("khod.freeze")
    memfds = [ports.files.memfd(f"ram{i}", SIZE) for i in range(2)]
    for i, fd in enumerate(memfds):
        ports.files.write(fd, 0, bytes([i + 1]) * SIZE)
        ports.liveupdate.preserve_fd(session, fd, i)
    image = ports.kexec.open(str(vm.kernel))
    ports.kexec.load(image)
    vm.ask("arm")
    try:
        ports.kexec.execute()
    except KexecFailed as e:
        vm.record("came back", error=type(e).__name__, errno=e.errno)
    # Undone: the memory takes writes, the image is still loaded, and more can be preserved.
    ports.files.write(memfds[1], 0, b"written after")
    assert ports.kexec.loaded()
    late = ports.files.memfd("late", 4096)
    ports.files.write(late, 0, b"late")
    ports.liveupdate.preserve_fd(session, late, 2)
    ports.store.append(json.dumps([crc32(ports.files.read(fd, 0, SIZE)) for fd in (*memfds, late)]).encode())
    ports.kexec.execute()


def after(vm: Guest) -> None:
    ports = machine(vm.state)
    session = ports.liveupdate.retrieve_session("khod.freeze")
    fds = [ports.liveupdate.retrieve_fd(session, token) for token in range(3)]
    found = [crc32(ports.files.read(fd, 0, SIZE)) for fd in fds]
    vm.record("second", stage=vm.stage, same=found == json.loads(ports.store.read()))
