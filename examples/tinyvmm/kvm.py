# SPDX-License-Identifier: LGPL-2.1-or-later
"""KVM by ioctls (include/uapi/linux/kvm.h, x86): a VM, its vCPUs, and all of their state in the order that restoring needs.

The TSC is carried as its offset to the host's, which runs on through a kexec: so the guest's does, and the guest can tell how
long it did not run.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import threading
from collections.abc import Mapping

from khod.abi import kvm as kvm_abi
from tinyvmm import guest

CREATE_VM, GET_VCPU_MMAP_SIZE = 0xAE01, 0xAE04
CREATE_VCPU, SET_TSS_ADDR, SET_IDENTITY_MAP_ADDR, CREATE_IRQCHIP = 0xAE41, 0xAE47, 0x4008AE48, 0xAE60
GET_IRQCHIP, SET_IRQCHIP = 0xC208AE62, 0x8208AE63
SET_USER_MEMORY_REGION2, MEM_GUEST_MEMFD = 0x40A0AE49, 4
RUN = 0xAE80
GET_TSC_KHZ, SET_TSC_KHZ = 0xAEA3, 0xAEA2
GET_SUPPORTED_CPUID, SET_CPUID2 = 0xC008AE05, 0x4008AE90
GET_MSR_INDEX_LIST, GET_MSRS, SET_MSRS = 0xC004AE02, 0xC008AE88, 0x4008AE89
SET_DEVICE_ATTR, GET_DEVICE_ATTR = 0x4018AEE1, 0x4018AEE2
CHECK_EXTENSION, CAP_XSAVE2 = 0xAE03, 208

BLOBS = {
    "mp_state": (0x8004AE98, 0x4004AE99, 4),
    "regs": (0x8090AE81, 0x4090AE82, 144),
    "sregs2": (0x8140AECC, 0x4140AECD, 320),
    "xsave": (0x9000AEA4, 0x5000AEA5, 4096),
    "xcrs": (0x8188AEA6, 0x4188AEA7, 392),
    "debugregs": (0x8080AEA1, 0x4080AEA2, 128),
    "lapic": (0x8400AE8E, 0x4400AE8F, 1024),
    "events": (0x8040AE9F, 0x4040AEA0, 64),
}
"""Requests to get and to set, and bytes. MSRs come between the local APIC and the events."""
IA32_TSC = 0x10
MOST_MSRS = 1000
"""In a list of them."""
EXIT_INTR = 10
_IMMEDIATE_EXIT = 1
"""Byte of struct kvm_run."""
_libc = ctypes.CDLL(None, use_errno=True)


def _ioctl(fd: int, request: int, argument: int) -> None:
    """fcntl.ioctl takes no argument of more than 31 bits."""
    if _libc.ioctl(ctypes.c_int(fd), ctypes.c_ulong(request), ctypes.c_ulong(argument)) < 0:
        raise OSError(ctypes.get_errno(), f"ioctl {request:#x}: {os.strerror(ctypes.get_errno())}")


def _get(fd: int, request: int, size: int, head: bytes = b"") -> bytes:
    data = bytearray(head.ljust(size, b"\0"))
    fcntl.ioctl(fd, request, data)
    return bytes(data)


class Vcpu:
    """One vCPU, and the thread that it runs in."""

    def __init__(self, vm: int, number: int, run_size: int) -> None:
        self.number = number
        self.fd = fcntl.ioctl(vm, CREATE_VCPU, number)
        self._run = mmap.mmap(self.fd, run_size)
        self._thread: threading.Thread | None = None
        self._stopping = False
        self.tsc_khz = fcntl.ioctl(self.fd, GET_TSC_KHZ, 0)
        """How fast its TSC runs. Asked now: while it runs, its ioctls wait until it does not."""
        self.failure = ""
        """Why it does not run, if that is not because it was stopped."""

    # Running.

    def start(self) -> None:
        """Run, in a thread of its own."""
        self._stopping, self._run[_IMMEDIATE_EXIT] = False, 0
        self._thread = threading.Thread(target=self._loop, name=f"vcpu-{self.number}", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Return when it does not run any more. It makes no exits by itself: a signal gets it out of the guest."""
        thread, self._thread = self._thread, None
        self._stopping, self._run[_IMMEDIATE_EXIT] = True, 1
        while thread is not None and thread.is_alive() and thread.ident:
            signal.pthread_kill(thread.ident, signal.SIGUSR1)
            thread.join(0.05)

    def _loop(self) -> None:
        while not self._stopping:
            try:
                fcntl.ioctl(self.fd, RUN, 0)
            except InterruptedError:
                continue
            except OSError as error:
                self.failure = str(error)
                return
            (reason,) = struct.unpack_from("<I", self._run, 8)
            if reason != EXIT_INTR:
                self.failure = f"exit reason {reason}"
                return

    # State.

    def set_cpuid(self, supported: bytes) -> None:
        """All that the host supports, with this vCPU's number as its APIC's."""
        data = bytearray(supported)
        for at in range(8, len(data), 40):
            if data[at : at + 4] == b"\x01\0\0\0":
                data[at + 19] = self.number  # ebx, bits 24 to 31
        fcntl.ioctl(self.fd, SET_CPUID2, data)

    def reset(self) -> None:
        """Flat 32-bit protected mode, at the guest's first instruction."""
        get, put, size = BLOBS["sregs2"]
        sregs = bytearray(_get(self.fd, get, size))
        for at, selector, kind in ((0, 8, 11), *((o, 16, 3) for o in (24, 48, 72, 96, 120))):
            struct.pack_into("<QIH8B", sregs, at, 0, 0xFFFFFFFF, selector, kind, 1, 0, 1, 1, 0, 1, 0)
        struct.pack_into("<QH", sregs, 192, guest.GDT, 23)
        struct.pack_into("<Q", sregs, 224, 0x11)  # cr0: protection on, as every x86 since the 486 has its coprocessor
        fcntl.ioctl(self.fd, put, sregs)
        registers = [0] * 18
        registers[4], registers[6] = guest.page_of(self.number), 0x8000 + 0x1000 * self.number  # rsi, rsp
        registers[16], registers[17] = guest.CODE, 2  # rip, rflags
        fcntl.ioctl(self.fd, BLOBS["regs"][1], bytearray(struct.pack("<18Q", *registers)))
        fcntl.ioctl(self.fd, BLOBS["mp_state"][1], bytearray(4))

    def save(self, msrs: list[int]) -> dict[str, str]:
        """Everything, as text. It stands still."""
        state = {name: _get(self.fd, get, size).hex() for name, (get, _, size) in BLOBS.items()}
        state["msrs"] = b"".join(self._msr(index) for index in msrs).hex()
        state["tsc_khz"] = str(self.tsc_khz)
        state["tsc_offset"] = str(self._offset())
        return state

    def restore(self, state: Mapping[str, str], supported: bytes) -> None:
        """Everything back. Raises OSError, also for an MSR that could not be set."""
        self.tsc_khz = int(state["tsc_khz"])
        fcntl.ioctl(self.fd, SET_TSC_KHZ, self.tsc_khz)
        self.set_cpuid(supported)
        for name, (_, put, _) in BLOBS.items():
            if name == "events":  # the last: setting others may raise or settle some
                self._set_msrs(bytes.fromhex(state["msrs"]))
            fcntl.ioctl(self.fd, put, bytearray.fromhex(state[name]))
        self._offset(int(state["tsc_offset"]))

    def _msr(self, index: int) -> bytes:
        data = bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, 0))
        return bytes(data[8:]) if fcntl.ioctl(self.fd, GET_MSRS, data) == 1 else b""

    def _set_msrs(self, saved: bytes) -> None:
        for index, _, value in struct.iter_unpack("<IIQ", saved):
            if index == IA32_TSC:  # its offset says more
                continue
            # KVM says that it set none, and not why. Some that can be read cannot be set; that is no loss where they are zero.
            done = fcntl.ioctl(self.fd, SET_MSRS, bytearray(struct.pack("<IIIIQ", 1, 0, index, 0, value)))
            if done != 1 and value:
                raise OSError(errno.EINVAL, f"MSR {index:#x} cannot be set to {value:#x}")

    def _offset(self, value: int | None = None) -> int:
        """KVM_VCPU_TSC_OFFSET: get it, or set it."""
        offset = ctypes.c_uint64(value or 0)
        request = GET_DEVICE_ATTR if value is None else SET_DEVICE_ATTR
        fcntl.ioctl(self.fd, request, bytearray(struct.pack("<IIQQ", 0, 0, 0, ctypes.addressof(offset))))
        return offset.value


class Vm:
    """A VM with its memory in a file, and its vCPUs."""

    def __init__(self, ram: int | None, cpus: int) -> None:
        """`ram` is a memfd of the guest's size, owned; None for a new guest_memfd, which is this VM's and nobody else's."""
        kvm = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
        if fcntl.ioctl(kvm, CHECK_EXTENSION, CAP_XSAVE2) > BLOBS["xsave"][2]:
            raise OSError(errno.EOPNOTSUPP, "this host's vCPUs have more state than KVM_GET_XSAVE knows of")
        self.fd = fcntl.ioctl(kvm, CREATE_VM, 0)
        _ioctl(self.fd, SET_TSS_ADDR, 0xFFFBD000)
        fcntl.ioctl(self.fd, SET_IDENTITY_MAP_ADDR, bytearray(struct.pack("<Q", 0xFFFBC000)))
        fcntl.ioctl(self.fd, CREATE_IRQCHIP, 0)
        if private := ram is None:
            shared = kvm_abi.GUEST_MEMFD_FLAG_MMAP | kvm_abi.GUEST_MEMFD_FLAG_INIT_SHARED
            asked = kvm_abi.create_guest_memfd(guest.SIZE, shared)
            ram = fcntl.ioctl(self.fd, kvm_abi.KVM_CREATE_GUEST_MEMFD, asked)
        self.ram = ram
        self.memory = mmap.mmap(ram, guest.SIZE)
        self._anchor = ctypes.c_char.from_buffer(self.memory)
        flags, backing = (MEM_GUEST_MEMFD, ram) if private else (0, 0)
        region = struct.pack("<IIQQQQI", 0, flags, 0, guest.SIZE, ctypes.addressof(self._anchor), 0, backing)
        fcntl.ioctl(self.fd, SET_USER_MEMORY_REGION2, bytearray(region.ljust(160, b"\0")))
        run_size = fcntl.ioctl(kvm, GET_VCPU_MMAP_SIZE, 0)
        self.vcpus = [Vcpu(self.fd, number, run_size) for number in range(cpus)]
        self._supported, self._msrs = _cpuid(kvm), _msr_list(kvm)
        os.close(kvm)
        signal.signal(signal.SIGUSR1, lambda *_: None)

    def reset(self) -> None:
        """Load the guest's program, and put all vCPUs to its beginning."""
        guest.load(self.memory)
        for vcpu in self.vcpus:
            vcpu.set_cpuid(self._supported)
            vcpu.reset()

    def start(self) -> None:
        """Run."""
        for vcpu in self.vcpus:
            vcpu.start()

    def stop(self) -> None:
        """Stand still."""
        for vcpu in self.vcpus:
            vcpu.stop()

    def save(self) -> dict[str, object]:
        """All but memory: what json can write. It stands still."""
        chips = [_get(self.fd, GET_IRQCHIP, 520, struct.pack("<I", chip)).hex() for chip in range(3)]
        return {"irqchips": chips, "vcpus": [vcpu.save(self._msrs) for vcpu in self.vcpus]}

    def restore(self, state: Mapping[str, list[object]]) -> None:
        """What `save` gave."""
        for chip in state["irqchips"]:
            fcntl.ioctl(self.fd, SET_IRQCHIP, bytearray.fromhex(str(chip)))
        for vcpu, saved in zip(self.vcpus, state["vcpus"], strict=True):
            assert isinstance(saved, dict)
            vcpu.restore(saved, self._supported)


def _cpuid(kvm: int) -> bytes:
    data = bytearray(8 + 40 * 256)
    struct.pack_into("<I", data, 0, 256)
    fcntl.ioctl(kvm, GET_SUPPORTED_CPUID, data)
    return bytes(data[: 8 + 40 * struct.unpack_from("<I", data)[0]])


def _msr_list(kvm: int) -> list[int]:
    data = bytearray(struct.pack("<I", MOST_MSRS) + bytes(4 * MOST_MSRS))  # E2BIG if there are more
    fcntl.ioctl(kvm, GET_MSR_INDEX_LIST, data)
    return [*struct.unpack_from(f"<{struct.unpack_from('<I', data)[0]}I", data, 4)]
