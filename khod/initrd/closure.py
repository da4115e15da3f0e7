# SPDX-License-Identifier: LGPL-2.1-or-later
"""``python -I -S closure.py DIRECTORIES [PLUGIN...]``: what the stage imports, and with plugins what `khod.driven` does, to
standard output, by marshal: for each module its name, the path of its source and its compiled code, or the path of its shared
object and b''. Directories have ":" between them.

In a process of its own, since imports are followed by importing: what the stage does at its start is what it needs. And the
same every time: what marshal writes depends on what else the interpreter has done.
"""

from __future__ import annotations

import marshal
import sys

ROOTS = ("khod.early.stage", "khod.early.custodian", "encodings.ascii", "encodings.latin_1")
"""The two that are imported by name; and what the interpreter itself may ask for."""
DRIVEN = ("khod.driven", "asyncio.threads", "concurrent.futures.thread", "khod.kernel.libc")
"""And what it imports when it comes to that."""
WITHOUT = ("_hashlib", "_ssl")
"""What hashlib and asyncio go without where it is not there: half of OpenSSL."""
FLAGS = 1
"""Of a .pyc: its source is named by a hash, which nobody checks (PEP 552)."""


def main(directories: str, *plugins: str) -> None:
    """Write them all."""
    sys.path[:0] = directories.split(":")
    before = set(sys.modules)
    for name in WITHOUT:
        sys.modules[name] = None  # type: ignore[assignment]  # whoever imports it is told that it is not there
    for root in (*ROOTS, *(DRIVEN if plugins else ()), *plugins):
        __import__(root)
    # What this module itself has imported is not for the stage.
    names = sorted(set(sys.modules) - (before & {"marshal"}) - {"__main__"})
    found = []
    for name in names:
        origin = getattr(getattr(sys.modules[name], "__spec__", None), "origin", None)
        loader = type(getattr(sys.modules[name], "__loader__", None)).__name__
        if loader == "SourceFileLoader":
            found.append((name, origin, _compiled(str(origin))))
        elif loader == "ExtensionFileLoader":
            found.append((name, origin, b""))
    sys.stdout.buffer.write(marshal.dumps(found))


def _compiled(path: str) -> bytes:
    import _imp
    from importlib._bootstrap_external import MAGIC_NUMBER

    with open(path, "rb") as f:
        source = f.read()
    # No path of the host in it: tracebacks name the module all the same.
    code = compile(source, f"/khod/{path.rpartition('/')[2]}", "exec", dont_inherit=True, optimize=2)
    digest: bytes = _imp.source_hash(int.from_bytes(MAGIC_NUMBER[:2], "little"), source)
    head: bytes = MAGIC_NUMBER + FLAGS.to_bytes(4, "little") + digest
    return head + marshal.dumps(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
