# SPDX-License-Identifier: LGPL-2.1-or-later
"""``load KERNEL``: load a kernel for ``systemctl kexec`` with the running one's command line, as kexec -s would."""

from __future__ import annotations

import sys

from khod.kernel.kexec import KernelKexec

if __name__ == "__main__":
    kexec = KernelKexec()
    image = kexec.open(sys.argv[1])
    kexec.load(image)
    kexec.release(image)
