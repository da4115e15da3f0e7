# SPDX-License-Identifier: LGPL-2.1-or-later
"""Files of every kind, as small as there are, to try on them what the running kernel does with such files."""

from __future__ import annotations

import fcntl
import os

from khod.abi import kvm
from khod.core.refusals import refusal
from khod.folio.units import PAGE_SIZE


def specimen(kind: str) -> int:
    """See `khod.core.ports.Files.specimen`."""
    try:
        match kind:
            case "hugetlb":
                return os.memfd_create("khod-probe", os.MFD_CLOEXEC | os.MFD_HUGETLB)  # without pages: needs no pool
            case "guest_memfd":
                return _guest_memfd()
            case "iommufd":
                return os.open("/dev/iommu", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise refusal("specimen", error.errno or 0, f"a {kind} to try things on: {error}")
    raise ValueError(f"nothing here makes a {kind}")


def _guest_memfd() -> int:
    device = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    try:
        machine = fcntl.ioctl(device, kvm.KVM_CREATE_VM, 0)
    finally:
        os.close(device)
    try:
        fd: int = fcntl.ioctl(machine, kvm.KVM_CREATE_GUEST_MEMFD, kvm.create_guest_memfd(PAGE_SIZE, 0))
    finally:
        os.close(machine)
    os.set_inheritable(fd, False)
    return fd
