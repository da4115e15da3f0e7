# SPDX-License-Identifier: LGPL-2.1-or-later
"""A guest_memfd and a hugetlb memfd, which Linux does not preserve, carried through two live updates."""

from __future__ import annotations

import fcntl
import mmap
import os
import time

from khod.abi import kvm
from khod.client import guest_memory
from khod.errors import KhodError
from tests.vm.content import chunks, filled
from tests.vm.driving import Khod
from tests.vm.guest import Guest

SIZE = 256 << 20
HUGE = 4 << 20
SHARED = kvm.GUEST_MEMFD_FLAG_MMAP | kvm.GUEST_MEMFD_FLAG_INIT_SHARED
MFD_HUGE_2MB = 21 << 26


def new_vm() -> int:
    device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    return fcntl.ioctl(device, kvm.KVM_CREATE_VM, 0)


def guest_memfd(flags: int, size: int = SIZE) -> int:
    fd: int = fcntl.ioctl(new_vm(), kvm.KVM_CREATE_GUEST_MEMFD, kvm.create_guest_memfd(size, flags))
    return fd


def fill_mapped(fd: int, size: int) -> None:
    with mmap.mmap(fd, size) as memory:
        for offset, chunk in chunks(size):
            memory[offset : offset + len(chunk)] = bytes(chunk)


def filled_mapped(fd: int, size: int) -> bool:
    with mmap.mmap(fd, size, prot=mmap.PROT_READ) as memory:
        return all(memory[offset : offset + len(chunk)] == chunk for offset, chunk in chunks(size))


def register(khod: Khod, name: str, fd: int, **options: str) -> str:
    with khod.client() as client:
        try:
            client.register(name, "guestmemfd", [("ram", fd)], lifetime="persistent", options=options)
        except KhodError as error:
            return f"{error}; {error.hint}"
    return ""


def seen(khod: Khod) -> dict[str, list[str]]:
    with khod.client() as client:
        return {i.name: [i.state, i.strategy, i.continuity, i.detail.get("ram", ""), i.problem] for i in client.instances()}


def claim(khod: Khod, name: str) -> int:
    with khod.client() as client:
        answer = client.claim(name)
    assert answer.answer == "fds", answer
    return answer.fds[0]


def jump(vm: Guest, khod: Khod) -> None:
    khod.ctl("load", str(vm.kernel), "--reuse-cmdline")
    with khod.client() as client:
        events = client.update("frozen")
        while next(events).kind != "held":
            pass
        vm.record(f"frozen {vm.stage}", seen=seen(khod))
        with khod.client() as other:
            other.proceed()
        list(events)


def before(vm: Guest) -> None:
    khod = Khod(vm)
    ram, huge = guest_memfd(SHARED), os.memfd_create("huge", os.MFD_HUGETLB | MFD_HUGE_2MB | os.MFD_ALLOW_SEALING)
    os.ftruncate(huge, HUGE)
    fill_mapped(ram, SIZE)
    fill_mapped(huge, HUGE)
    vm.record(
        "refused",
        private=register(khod, "private", guest_memfd(0, HUGE)),
        unseen=register(khod, "unseen", guest_memfd(kvm.GUEST_MEMFD_FLAG_MMAP, HUGE)),
        huge=register(khod, "huge", huge),
    )
    vm.record("taken", ram=register(khod, "ram", ram), huge=register(khod, "huge", huge, carry="yes"))
    jump(vm, khod)


def after(vm: Guest) -> None:
    khod = Khod(vm)
    states = seen(khod)
    carrier, huge = claim(khod, "ram"), claim(khod, "huge")
    began = time.monotonic()
    rebuilt = guest_memory.rebuild(new_vm(), carrier)
    vm.record(
        "came through",
        states=states,
        carrier=filled(carrier, SIZE),
        rebuilt=filled_mapped(rebuilt, SIZE),
        seconds=time.monotonic() - began,
        huge=filled_mapped(huge, HUGE),
        page_size=os.fstatvfs(huge).f_bsize,
    )
    khod.ctl("finish")
    # The VMM goes on in the new one; "ram" is the carrier, and that one Linux preserves.
    vm.record("taken again", ram=register(khod, "rebuilt", rebuilt))
    os.pwrite(carrier, b"second", 8)
    jump(vm, khod)


def after2(vm: Guest) -> None:
    khod = Khod(vm)
    vm.record(
        "again",
        states=seen(khod),
        carrier=os.pread(claim(khod, "ram"), 6, 8).decode(),
        rebuilt=filled(claim(khod, "rebuilt"), SIZE),
        huge=filled_mapped(claim(khod, "huge"), HUGE),
    )
