# SPDX-License-Identifier: LGPL-2.1-or-later
"""``keeper BYTES``: a service whose memory comes through a jump in its unit's descriptor store, by systemd alone.

It goes on writing the time stamp counter behind its memory until it is told to end; so who finds it in the next kernel knows
for how long nobody wrote. This is the measure of khod's own updates.
"""

from __future__ import annotations

import os
import signal
import sys

from khod.kernel.tsc import reader
from tests.vm.content import fill, filled
from tests.vm.programs.inside import notify, stored, tell


def main() -> None:
    size, read_tsc = int(sys.argv[1]), reader()
    assert read_tsc
    began, ram = read_tsc(), stored().get("ram")
    if ram is None:
        ram = os.memfd_create("ram", 0x10)  # MFD_EXEC
        os.ftruncate(ram, size + 4096)
        fill(ram, size)
        notify("FDSTORE=1\nFDNAME=ram", ram)
        notify("READY=1")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit())
        while True:
            os.pwrite(ram, read_tsc().to_bytes(8, "little"), size)
            signal.sigtimedwait([], 0.001)
    held, last = read_tsc(), int.from_bytes(os.pread(ram, 8, size), "little")
    equal = filled(ram, size)
    tell("held", last=last, began=began, held=held, compared=read_tsc(), equal=equal)
    notify("READY=1")
    signal.pause()


if __name__ == "__main__":
    main()
