# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's machine with a person in it: khod runs, and a shell on the serial console is yours, in each kernel anew.

Run by ``make lab-shell``. ``exit`` switches the machine off; so does Ctrl-A x, whatever state it is in.
"""

from __future__ import annotations

import fcntl
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from khod.rehearsal.qemu import PATH, listening
from tests.vm import kernel as lab_kernel
from tests.vm.runner import HERE, ROOT, Machine, arguments, missing, prepare

JOB = """\
cd '{root}'
export PATH='{bin}':/usr/sbin:/usr/bin:/sbin:/bin KERNEL='{kernel}' TERM=dumb
export PS1='lab# ' HISTFILE=
printf 'state_directory: /run/state/khod\\nreserve: 16M\\n' >/run/khod.yaml
echo '==> starting khod'
khod --config /run/khod.yaml 2>>/run/shared/khod.log &
until [ -S /run/khod/khod.sock ] || ! kill -0 $! 2>/dev/null; do sleep 0.2; done
khoctl status
echo '==> Linux' "$(uname -r)", up "$(cut -d' ' -f1 /proc/uptime)" s. '$KERNEL is a kernel to jump to. exit switches off.'
setsid -c -w bash --norc -i </dev/ttyS0 >/dev/ttyS0 2>&1 || true
python -S -c 'import ctypes; ctypes.CDLL(None).reboot(0x01234567)'
"""
"""What PID 1 runs (see ``init``): RB_AUTOBOOT is the end of a QEMU that was told -no-reboot."""


def main() -> int:
    """Switch on, and wait for the person to be done. Returns QEMU's exit status."""
    if reason := missing():
        print(reason, file=sys.stderr)
        return 1
    with open(lab_kernel.cache() / "vm.lock", "w") as lock, tempfile.TemporaryDirectory(prefix="khod-vm-") as temporary:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("==> another machine of the lab is running; waiting for it", file=sys.stderr)
            fcntl.flock(lock, fcntl.LOCK_EX)
        directory = Path(temporary)
        machine = Machine(HERE / "shell.py")
        prepare(machine, directory)
        (directory / "shared" / "job").write_text(
            JOB.format(root=ROOT, bin=Path(sys.executable).parent, kernel=lab_kernel.kernel_directory() / "bzImage")
        )
        print("==> switching on; this is an emulated machine: give it ten seconds", file=sys.stderr)
        command = arguments(machine, directory, serial="mon:stdio")
        with listening(directory / "verdict"):
            status = subprocess.run(command, env={"PATH": PATH}, cwd=directory, check=False).returncode
        if status:
            keep = Path(tempfile.mkdtemp(prefix="khod-shell-"))
            shutil.copytree(directory / "shared", keep, dirs_exist_ok=True)
            print(f"==> QEMU ended with status {status}; logs: {keep}", file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
