# SPDX-License-Identifier: LGPL-2.1-or-later
"""The guest of examples/tinyvmm: its bytes are those that an assembler makes of the comments beside them."""

from __future__ import annotations

import mmap
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tinyvmm import guest

SOURCE = Path(guest.__file__)


@pytest.mark.skipif(not (shutil.which("as") and shutil.which("objcopy")), reason="no assembler here")
def test_the_program_is_what_its_comments_say(tmp_path: Path) -> None:
    lines = re.findall(r'^    "[0-9a-f]+"  # (.*)$', SOURCE.read_text(), re.M)
    text = "\n".join(lines).replace("; ", "\n").replace(": ", ":\n")
    source = f".intel_syntax noprefix\n.code32\n.set PATTERN, {guest.PATTERN}\n{text}\n"
    subprocess.run(["as", "--32", "-o", tmp_path / "o", "-"], input=source, text=True, check=True, timeout=20)
    subprocess.run(["objcopy", "-O", "binary", "-j", ".text", tmp_path / "o", tmp_path / "bin"], check=True, timeout=20)
    assert (tmp_path / "bin").read_bytes() == guest.PROGRAM


def test_what_a_vcpu_left_is_read_where_the_program_puts_it() -> None:
    with mmap.mmap(-1, guest.SIZE) as memory:
        guest.load(memory)
        at = guest.page_of(1)
        for offset, value in ((0, 7), (8, 1 << 40), (0x20, 1 << 33), (0x40, 2), (0x48, 3)):
            memory[at + offset : at + offset + 8] = value.to_bytes(8, "little")
        assert guest.seen(memory, 1) == guest.Seen(counter=7, tsc=1 << 40, gap=1 << 33, backwards=2, broken=3)
        guest.forget_gap(memory, 1)
        assert guest.seen(memory, 1).gap == 0
        assert guest.seen(memory, 0) == guest.Seen(0, 0, 0, 0, 0)
        assert memory[guest.PATTERN + 4 : guest.PATTERN + 8] == (0x9E3779B1).to_bytes(4, "little")
