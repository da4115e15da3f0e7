# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/uapi/linux/kvm.h: numbers and structs of /dev/kvm's ioctls, as far as khod uses them."""

from __future__ import annotations

import struct

KVM_CREATE_VM = 0xAE01
KVM_CREATE_GUEST_MEMFD = 0xC040AED4

GUEST_MEMFD_FLAG_MMAP = 1
GUEST_MEMFD_FLAG_INIT_SHARED = 2

_CREATE_GUEST_MEMFD = struct.Struct("<QQ48x")


def create_guest_memfd(size: int, flags: int) -> bytearray:
    """struct kvm_create_guest_memfd; the ioctl wants to be able to write to it."""
    return bytearray(_CREATE_GUEST_MEMFD.pack(size, flags))
