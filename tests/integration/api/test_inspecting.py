# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl inspect of dumps and of earlier inspections, and what it says of requests that make no sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.handover import Made, raw_dump
from tests.integration.api.served import Served
from tests.integration.api.test_khoctl import khoctl


def test_inspect_a_dump_draws_it_tells_of_an_address_and_compares(khod: Served, tmp_path: Path) -> None:
    made = Made(serialised=True)
    raw_dump(made, tmp_path / "dump").close()
    dump = ["inspect", "--dump", str(tmp_path / "dump"), "--base", "0x100000"]
    ran = khoctl(khod, *dump, "--picture", str(tmp_path / "memory.svg"))
    assert "format       kho-v4\n" in ran.out
    assert any(line.split()[:5] == ["kernel", "blob", "LUO", "4", "KiB"] for line in ran.out.splitlines())
    assert (tmp_path / "memory.svg").read_text().startswith("<svg")
    earlier = khoctl(khod, *dump, "--json")
    assert [m["session"] for m in earlier.json["outgoing"]["memfds"]] == ["vm-1", "vm-1"]
    (tmp_path / "before.json").write_text(earlier.out)
    told = khoctl(khod, *dump, "--addr", "0x4001000", "--json").json
    assert (told[0]["preserved"], told[0]["order"]) == (True, 9)
    again = khoctl(khod, "inspect", "--read", str(tmp_path / "before.json"), "--addr", "0x4001000")
    assert "preserved  yes\n" in again.out
    assert khoctl(khod, *dump, "--diff", str(tmp_path / "before.json")).out == "nothing that is handed over differs\n"
    made.memory.set(made.structs[0] + 32, 0x900000)  # where its list of folios is
    raw_dump(made, tmp_path / "dump").close()
    assert "memfd of token 0" in khoctl(khod, *dump).out


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (["--base", "0"], 2, "belongs to a dump"),
        (["--dump", "/dev/null"], 5, "no ELF file"),
        (["--dump", "/none"], 2, "No such file"),
        (["--dump", "/dev/null", "--base", "1"], 2, "no address"),
        (["--read", "/dev/null"], 5, "no inspection"),
        (["--read", "/none"], 2, "No such file"),
        (["--read", "/x", "--dump", "/x"], 2, "give one"),
        (["--diff", "/dev/null"], 5, "no inspection"),
        (["--addr", "memory"], 2, "no address"),
        (["--addr", "0x10000000000000"], 2, "below 2**52"),
        (["--picture", "x.jpeg"], 2, ".svg or .png"),
        (["--bitmaps", "1"], 2, "512 or 4096"),
        (["--seconds", "0"], 2, "above 0"),
    ],
)
def test_inspect_says_what_is_wrong_with_a_request(khod: Served, words: list[str], status: int, said: str) -> None:
    ran = khoctl(khod, "inspect", *words)
    assert (ran.status, said in ran.err) == (status, True), ran


def test_names_of_sessions_do_nothing_to_a_terminal(khod: Served, tmp_path: Path) -> None:
    made = Made(serialised=True)
    entries = next(at for at, page in made.memory.pages.items() if page[16:21] == b"vm-1\0")
    made.memory.pages[entries][16:25] = b"\x1b[2Jvm\n1\0"
    raw_dump(made, tmp_path / "dump").close()
    out = khoctl(khod, "inspect", "--dump", str(tmp_path / "dump"), "--base", "0x100000").out
    assert r"\x1b[2Jvm\n1" in out
    assert "\x1b" not in out
