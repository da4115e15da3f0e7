# SPDX-License-Identifier: LGPL-2.1-or-later
"""``sabotage WHAT PATH``: the initrd that khod would build by its configuration, with something wrong in it.

WHAT is one of `POINTS` or `DRIVERS`: most have the process that restores killed when it comes there, some have something
missing.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from khod import config, driven
from khod.abi import cpio
from khod.early import paths, plan, restore
from khod.initrd import closure, contents
from khod.initrd.image import spec

DIES = """
import os as _os


def _dies(owner, name, after, count=1):
    real, left = getattr(owner, name), [count]

    def call(*words, **more):
        left[0] -= 1
        if not after and not left[0]:
            _os.kill(_os.getpid(), 9)
        result = real(*words, **more)
        if after and not left[0]:
            _os.kill(_os.getpid(), 9)
        return result

    setattr(owner, name, call)


"""
POINTS = {
    "imported": "_os.kill(_os.getpid(), 9)",
    "session": "_dies(Keeper, 'retrieve_session', True)",
    "tree": "_dies(tree, 'read', False)",
    "memory": "_dies(Keeper, 'retrieve_fd', True, 2)",
    "compared": "_dies(Restore, '_compare', True)",
    "noted": "_dies(starting, 'start', False)",
    "damaged": "sha256 = lambda data=b'': __import__('_sha2').sha256(data + b'not what was written')",
    "vmm": "",
    "module": "",
    "short": "",
    "runs": "_dies(starting, 'start', True)",
}
"""In the order of the stage; after the last one the guest runs."""
DRIVERS = {
    "driven-imported": "_os.kill(_os.getpid(), 9)",
    "driven-retrieved": "_dies(Restorer, '_compare', False)",
    "driven-made": "_dies(sys.modules[__name__], 'enter', False)",
    "driven-plugin": "plugins = lambda wanted: PluginManager()",
    "driven-entered": "_dies(Book, 'put', True, 2)",
    "driven-noted": "_dies(starting, 'start', False)",
    "driven-runs": "_dies(starting, 'start', True)",
}
"""The same of the process that has the drivers; before the last ones the book knows what was made."""


def main() -> None:
    what, path = sys.argv[1], Path(sys.argv[2])
    settings = spec(config.load())
    found = contents.members(settings)
    if broken := {**POINTS, **DRIVERS}[what]:
        module, path_of = (driven, "khod/driven.pyc") if what in DRIVERS else (restore, "khod/early/restore.pyc")
        (name,) = (name for name in found if name.endswith(path_of))
        with tempfile.NamedTemporaryFile("w", suffix=".py") as patched:
            before, main, after = Path(str(module.__file__)).read_text().partition("if __name__")
            patched.write(f"{before}{DIES}{broken}\n{main}{after}")
            patched.flush()
            found[name] = cpio.file(closure._compiled(patched.name))
    elif what == "vmm":
        del found[paths.VMM.lstrip("/") + settings.starts[0].command[0]]
    elif what == "module":
        where = paths.PLAN.lstrip("/")
        read = plan.read(found[where].content)
        found[where] = cpio.file(plan.write(plan.Plan(["/khod/modules/000-gone.ko"], read.starts)))
        del found[paths.VMM.lstrip("/") + settings.starts[0].command[0]]
    data = contents.archive(found)
    path.write_bytes(data[: len(data) // 2] if what == "short" else data)


if __name__ == "__main__":
    main()
