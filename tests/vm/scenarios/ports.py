# SPDX-License-Identifier: LGPL-2.1-or-later
"""A whole live update by khod.kernel's ports alone, without khod: the same bytes, in the same frames, of the same orders.

The frames are compared with what /proc/self/pagemap says to a reader of this file's own.
"""

from __future__ import annotations

import json
import os
from array import array

from khod.folio.units import Folio
from khod.kernel.libc import Mapping
from khod.kernel.machine import machine
from tests.vm.guest import Guest

SIZE = 64 << 20
PAGES = SIZE // 4096
SESSION = "khod.ports"
TOKEN = 7


def contents() -> bytes:
    """Every page begins with its own index. Made whole, by C: a loop over pages takes seconds under emulation."""
    words = array("Q", bytes(SIZE))
    words[::512] = array("Q", range(PAGES))
    return words.tobytes()


def pagemap(fd: int) -> list[int]:
    with Mapping(fd, 0, SIZE) as mapping, open("/proc/self/pagemap", "rb", buffering=0) as f:
        mapping.populate()
        return [entry & (1 << 55) - 1 for entry in array("Q", os.pread(f.fileno(), PAGES * 8, mapping.address // 512))]


def before(vm: Guest) -> None:
    ports = machine(vm.state)
    ports.liveupdate.probe()
    assert not ports.boot.boot().handover
    fd = ports.files.memfd("guest-ram", SIZE)
    ports.files.write(fd, 0, contents())
    session = ports.liveupdate.create_session(SESSION)
    assert ports.liveupdate.session_name(session) == SESSION
    assert ports.files.stat(session).kind == "session"
    ports.liveupdate.preserve_fd(session, fd, TOKEN)
    (window,) = ports.frames.windows(fd)
    frames = pagemap(fd)
    assert [p + i for p, o in zip(window.pfns, window.orders, strict=True) for i in range(1 << o)] == frames
    scratch = ports.memory.scratch()
    assert scratch
    assert not any(r.start <= frame * 4096 < r.end for frame in frames for r in scratch)
    assert int.from_bytes(ports.memory.read(frames[5] * 4096, 8), "little") == 5
    image = ports.kexec.open(str(vm.kernel))
    ports.kexec.load(image)
    assert ports.kexec.loaded()
    stamp = ports.clock.stamp()
    told = {
        "frames": frames,
        "orders": list(window.orders),
        "boot": ports.boot.boot().boot_id,
        "scratch": [str(r) for r in scratch],
        "tsc": stamp.tsc,
        "khz": stamp.tsc_khz,
    }
    ports.store.append(json.dumps(told).encode())
    ports.filesystems.sync()
    vm.record("jump", tsc=stamp.tsc, khz=stamp.tsc_khz)
    ports.kexec.execute()


def after(vm: Guest) -> None:
    ports = machine(vm.state)
    stamp = ports.clock.stamp()
    boot = ports.boot.boot()
    session = ports.liveupdate.retrieve_session(SESSION)
    fd = ports.liveupdate.retrieve_fd(session, TOKEN)
    told = json.loads(ports.store.read())
    # Told before anything is compared: figures help to see why a comparison fails.
    vm.record("landed", tsc=stamp.tsc, realtime=stamp.realtime)
    assert pagemap(fd) == told["frames"]
    heads = [sum(1 << o for o in told["orders"][:i]) for i in (0, 1, 777)]
    found = ports.frames.pages(fd, heads)
    assert found == [
        (told["frames"][i], Folio(told["frames"][i], told["orders"][j])) for i, j in zip(heads, (0, 1, 777), strict=True)
    ]
    assert ports.files.read(fd, 0, SIZE) == contents()
    assert [str(r) for r in ports.memory.scratch()] == told["scratch"]
    ports.liveupdate.finish(session)
    assert (boot.handover, boot.kexec_count, boot.previous_release) == (True, 1, boot.release)
    assert boot.boot_id != told["boot"]
