# SPDX-License-Identifier: LGPL-2.1-or-later
"""arch/x86/include/uapi/asm/bootparam.h and setup_data.h: the header of a bzImage, and what a boot loader passes on.

Offsets are those of the file (Documentation/arch/x86/boot.rst).
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

HEADER_BYTES = 0x264
"""As much of the file as `decode` looks at."""
XLF_KERNEL_64 = 1 << 0
XLF_CAN_BE_LOADED_ABOVE_4G = 1 << 1
SETUP_KEXEC_KHO = 10

_KHO_DATA = Struct("=4Q")  # struct kho_data: fdt_addr, fdt_size, scratch_addr, scratch_size


@dataclass(frozen=True, slots=True)
class SetupHeader:
    """What kexec_file_load looks at in ``struct setup_header``."""

    protocol: int
    """Version of the boot protocol, 0x20f for 2.15."""
    xloadflags: int
    cmdline_size: int
    """The longest command line in bytes, without its NUL."""
    init_size: int
    """Bytes of contiguous memory that the kernel needs to unpack itself."""

    @property
    def objection(self) -> str:
        """Why kexec_file_load will not take it; '' when it will (arch/x86/kernel/kexec-bzimage64.c, bzImage64_probe)."""
        if self.protocol < 0x20C:
            return f"boot protocol {self.protocol >> 8}.{self.protocol & 0xFF:02} is older than 2.12"
        if not self.xloadflags & XLF_KERNEL_64:
            return "it is not a 64-bit kernel"
        if not self.xloadflags & XLF_CAN_BE_LOADED_ABOVE_4G:
            return "it cannot be loaded above 4 GiB (built without CONFIG_RELOCATABLE=y)"
        return ""


def decode(head: bytes) -> SetupHeader:
    """The header in the first `HEADER_BYTES` of a file. Raises ValueError when that is no bzImage."""
    if len(head) < HEADER_BYTES:
        raise ValueError(f"it ends after {len(head)} bytes, before the end of a kernel's header")
    if head[0x1FE:0x200] != b"\x55\xaa" or head[0x202:0x206] != b"HdrS":
        raise ValueError("it has no kernel header (no HdrS at 0x202)")
    if not head[0x211] & 1:
        raise ValueError("it is a zImage, not a bzImage")
    (protocol,) = Struct("<H").unpack_from(head, 0x206)
    (xloadflags,) = Struct("<H").unpack_from(head, 0x236)
    (cmdline_size,) = Struct("<I").unpack_from(head, 0x238)
    (init_size,) = Struct("<I").unpack_from(head, 0x260)
    return SetupHeader(protocol, xloadflags, cmdline_size, init_size)


def scratch_array(kho_data: bytes) -> tuple[int, int]:
    """Physical address and bytes of the array of scratch areas named by a setup_data of type `SETUP_KEXEC_KHO`.

    Raises ValueError when it is too short."""
    if len(kho_data) < _KHO_DATA.size:
        raise ValueError(f"struct kho_data is {_KHO_DATA.size} bytes, not {len(kho_data)}")
    _, _, address, size = _KHO_DATA.unpack_from(kho_data)
    return address, size
