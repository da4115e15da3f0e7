# SPDX-License-Identifier: LGPL-2.1-or-later
"""arch/x86/include/uapi/asm/setup_data.h: what a boot loader, or a kernel before its jump, passes on to a kernel."""

from __future__ import annotations

from struct import Struct

SETUP_KEXEC_KHO = 10

_KHO_DATA = Struct("=4Q")  # struct kho_data: fdt_addr, fdt_size, scratch_addr, scratch_size


def scratch_array(kho_data: bytes) -> tuple[int, int]:
    """Physical address and bytes of the array of scratch areas named by a setup_data of type `SETUP_KEXEC_KHO`.

    Raises ValueError when it is too short."""
    if len(kho_data) < _KHO_DATA.size:
        raise ValueError(f"struct kho_data is {_KHO_DATA.size} bytes, not {len(kho_data)}")
    _, _, address, size = _KHO_DATA.unpack_from(kho_data)
    return address, size
