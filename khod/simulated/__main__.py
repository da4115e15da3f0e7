# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -m khod.simulated DIR [--memory SIZE [--systemd]] --init COMMAND...``: run a command on a simulated machine.

With ``--memory`` the machine is made first. The command runs again after each jump, with KHOD_SIMULATED set to DIR.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from khod.errors import KhodError
from khod.simulated import create, power

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


def _size(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper())
    return int(text[:-1]) * unit if unit else int(text)


def main() -> int:
    """The exit status is init's."""
    parser = argparse.ArgumentParser(prog="python -m khod.simulated", description="Run a simulated machine.")
    parser.add_argument("directory", type=Path, metavar="DIR", help="where the machine lives")
    parser.add_argument("--memory", type=_size, metavar="SIZE", help="make the machine first, with so much memory (1T)")
    parser.add_argument("--systemd", action="store_true", help="with --memory: PID 1 is a systemd, which can jump")
    parser.add_argument("--kernel", type=int, metavar="FD", help=argparse.SUPPRESS)
    parser.add_argument("--init", nargs=argparse.REMAINDER, required=True, metavar="COMMAND", help="what runs on it")
    options = parser.parse_args()
    if options.kernel is not None:
        from khod.simulated import serve  # numpy lives in kernels only

        status = serve.run(options.directory, options.init, options.kernel)
        sys.stderr.flush()
        os._exit(status)
    if options.memory:
        create(options.directory, memory=options.memory, systemd=options.systemd)
    return power.run(options.directory, options.init)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KhodError as error:
        print(f"khod.simulated: {error}", file=sys.stderr)  # noqa: T201
        sys.exit(error.exit_status)
