# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.abi.cmdline."""

from __future__ import annotations

import pytest

from khod.abi.cmdline import memparse, parse


@pytest.mark.parametrize(
    ("text", "on"),
    [
        ("kho=on", True), ("kho=1", True), ("kho=Y", True), ("kho=true", True), ("root=/dev/vda kho=on", True),
        ("kho=off", False), ("kho=0", False), ("kho=n", False), ("", False), ("kho", False), ("kho=maybe", False),
        ("xkho=on", False), ("kho=off kho=on", True), ("kho=on kho=off", False), ("kho=on kho=maybe", True),
        ("-- kho=on", False), ('dyndbg="file a.c kho=on" x', False),
    ],
)  # fmt: skip
def test_a_flag_as_kstrtobool_has_it(text: str, on: bool) -> None:
    assert parse(text).flag("kho", default=False) is on


def test_a_default_holds_where_nothing_is_said() -> None:
    assert parse("quiet").flag("kho", default=True)
    assert not parse("kho=off").flag("kho", default=True)


def test_words_values_and_quotes() -> None:
    line = parse('console=tty0 console=ttyS0,115200n8 root=UUID=1-2 a="b c" "d=e f" kho_scratch=1M,2M,3M quiet')
    assert line.values("console") == ("tty0", "ttyS0,115200n8")
    assert line.values("root") == ("UUID=1-2",)
    assert (line.values("a"), line.values("d")) == (("b c",), ("e f",))
    assert ("quiet", None) in line.options
    assert parse("kho-scratch=1").values("kho_scratch") == ("1",)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("hugepages=8", 16 << 20),
        ("hugepagesz=1G hugepages=2", 2 << 30),
        ("hugepagesz=1G hugepages=2 hugepagesz=2M hugepages=3", (2 << 30) + (6 << 20)),
        ("default_hugepagesz=1G hugepages=1", 1 << 30),
        ("hugepages=0:4,1:4", 16 << 20),
        ("hugepages=lots", 0),
        ("", 0),
    ],
)
def test_huge_pages(text: str, size: int) -> None:
    assert parse(text).huge_pages() == size


def test_sizes() -> None:
    assert [memparse(text) for text in ("4096", "4k", "2M", "1g", "x")] == [4096, 4096, 2 << 20, 1 << 30, 0]
