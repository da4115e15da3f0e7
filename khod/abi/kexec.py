# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/uapi/linux/kexec.h and reboot.h: numbers of kexec_file_load(2) and reboot(2)."""

from __future__ import annotations

KEXEC_FILE_UNLOAD = 0x1
KEXEC_FILE_NO_INITRAMFS = 0x4

LINUX_REBOOT_MAGIC1 = 0xFEE1DEAD
LINUX_REBOOT_MAGIC2 = 672274793
LINUX_REBOOT_CMD_KEXEC = 0x45584543
