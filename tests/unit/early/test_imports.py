# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the stage imports is part of every blackout: the whole list."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
OF_THE_INTERPRETER = {
    "__future__", "__main__", "_abc", "_codecs", "_collections_abc", "_contextvars", "_frozen_importlib",
    "_frozen_importlib_external", "_imp", "_io", "_signal", "_stat", "_thread", "_types", "_warnings", "_weakref", "abc",
    "builtins", "codecs", "encodings", "encodings.aliases", "encodings.utf_8", "errno", "genericpath", "io", "itertools",
    "marshal", "os", "os.path", "posix", "posixpath", "stat", "sys", "time", "winreg", "zipimport",
}  # fmt: skip
BUDGET = {"_ctypes", "fcntl", "mmap", "select", "resource", "struct", "_struct", "_socket", "_sha2", "_sha256"}
"""All of it is written in C, but for `struct`, which is one line."""


def test_the_budget() -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import khod.early.stage, khod.early.custodian;"
        "print(*sorted(n for n in sys.modules if not n.startswith('khod')))"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - OF_THE_INTERPRETER - BUDGET == set()


def test_the_first_process_imports_what_may_fail_in_its_child_alone() -> None:
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import khod.early.stage; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    ours = {name for name in done.stdout.split() if name.startswith("khod")}
    early = {f"khod.early.{name}" for name in ("paths", "rootfs", "stage", "system")}
    assert ours == {"khod", "khod.custodian", "khod.custodian.native", "khod.early"} | early
