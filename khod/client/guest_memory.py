# SPDX-License-Identifier: LGPL-2.1-or-later
"""Guest memory in a guest_memfd, after the jump: khod hands out a memfd with its bytes, for a guest_memfd belongs to a VM, and
the VM is new.

A VMM has two ways to go on: to give the guest that memfd as ordinary memory (KVM_SET_USER_MEMORY_REGION; no copy, and the
kernel preserves it as it is the next time), or to have a guest_memfd made of it here, in its own VM.
"""

from __future__ import annotations

import fcntl
import os

from khod.abi import kvm
from khod.core.carrying import Crew
from khod.core.refusals import refused
from khod.folio.units import PAGE_SIZE

SHARED = kvm.GUEST_MEMFD_FLAG_MMAP | kvm.GUEST_MEMFD_FLAG_INIT_SHARED
"""What khod can carry across the next jump."""


def rebuild(vm: int, carrier: int, flags: int = SHARED) -> int:
    """A new guest_memfd of the VM `vm`, as large as the memfd `carrier` and with its bytes, copied by several threads: an owned
    descriptor, close-on-exec. Both arguments are borrowed; close the carrier afterwards, or its memory stays in use as well.

    For as long as it takes there is twice the memory. Blocks: about a second a GiB and core. Raises Refused where this kernel
    makes no guest_memfds with these flags, or they cannot be mapped; OutOfMemory.
    """
    from khod.kernel.files import KernelFiles  # what asks khod has no need of it

    size = os.fstat(carrier).st_size
    with refused("guest_memfd", f"a guest_memfd of {size} bytes with flags {flags:#x}"):
        made: int = fcntl.ioctl(vm, kvm.KVM_CREATE_GUEST_MEMFD, kvm.create_guest_memfd(size, flags))
    try:
        os.set_inheritable(made, False)
        Crew().copy("rebuilding a guest_memfd", KernelFiles(), carrier, made, size, PAGE_SIZE)
    except BaseException:
        os.close(made)
        raise
    return made
