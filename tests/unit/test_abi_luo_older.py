# SPDX-License-Identifier: LGPL-2.1-or-later
"""LUO before luo-v5, made by the layouts of its header: every version says the same sessions and files."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from khod.abi import luo_older
from khod.abi.fdt_door import RawNode, flatten
from khod.errors import FormatError
from tests.handover import Memory, block, luo_file, u64


def flat_files(memory: Memory, tokens: range) -> int:
    return memory.new(b"".join(luo_file(token, compatible=b"memfd-v1") for token in tokens))


def entry(memory: Memory, name: bytes, tokens: range, *, oldest: bool = False) -> bytes:
    files = flat_files(memory, tokens) if tokens else 0
    if oldest:
        return struct.pack("<64sQQQ", name, files, 2 if files else 0, len(tokens))
    return struct.pack("<64sQQ", name, files, len(tokens))


def rows(memory: Memory, *, oldest: bool = False) -> list[bytes]:
    return [entry(memory, b"vm-1", range(30), oldest=oldest), entry(memory, b"empty", range(0), oldest=oldest)]


def array(memory: Memory, entries: list[bytes]) -> int:
    return memory.new(u64(len(entries)) + b"".join(entries))


def flbs(memory: Memory) -> int:
    return memory.new(struct.pack("<QQ48sQQ", 1, 1, b"iommu-v1", 0x7000, 2))


def v1(memory: Memory, *, oldest: bool = False, version: str = "") -> bytes:
    kind = version or ("luo-session-v1" if oldest else "luo-session-v2")
    header = u64(array(memory, rows(memory, oldest=oldest)))
    sessions = RawNode("luo-session", {"compatible": kind.encode() + b"\0", "luo-session-header": header})
    shared = RawNode("luo-flb", {"compatible": b"luo-flb-v1\0", "luo-flb-header": u64(flbs(memory))})
    return flatten(RawNode("", {"compatible": b"luo-v1\0", "liveupdate-number": u64(4)}, (sessions, shared)))


def v2(memory: Memory) -> bytes:
    header = memory.new(struct.pack("<QQQ", 4, array(memory, rows(memory)), flbs(memory)))
    return flatten(RawNode("", {"compatible": b"luo-v2\0", "luo-abi-header": u64(header)}))


def v3(memory: Memory) -> bytes:
    return b"luo-v3\0\0" + struct.pack("<QQQ", 4, array(memory, rows(memory)), flbs(memory))


def v4(memory: Memory) -> bytes:
    first, second = rows(memory)
    return b"luo-v4\0\0" + struct.pack("<QQQ", 4, block(memory, [first], block(memory, [second])), flbs(memory))


VERSIONS: dict[str, Callable[[Memory], bytes]] = {
    "oldest v1": lambda memory: v1(memory, oldest=True), "v1": v1, "v2": v2, "v3": v3, "v4": v4,
}  # fmt: skip


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_says_the_same(version: str) -> None:
    memory = Memory()
    found = luo_older.decode(memory, VERSIONS[version](memory))
    assert found.format.base == f"luo-{version[-2:]}"
    assert found.number == 4
    assert [(s.name, [f.token for f in s.files]) for s in found.sessions] == [(b"vm-1", list(range(30))), (b"empty", [])]
    assert {str(f.compatible) for s in found.sessions for f in s.files} == {"memfd-v1"}
    assert [(str(f.compatible), f.users) for f in found.flbs] == [("iommu-v1", 2)]


def test_before_reboot_they_lead_nowhere() -> None:
    found = luo_older.decode(Memory(), b"luo-v3\0\0" + struct.pack("<QQQ", 1, 0, 0))
    assert (found.sessions, found.flbs) == ((), ())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda m: b"luo-v5\0\0" + bytes(24), "luo-v5"),
        (lambda m: b"luo-v3\0\0" + bytes(8), "8 bytes"),
        (lambda m: b"luo", "none-v0"),
        (lambda m: flatten(RawNode("", {"compatible": b"luo-v7\0"})), "luo-v7"),
        (lambda m: v1(m, version="luo-session-v3"), "luo-session-v3"),
        (lambda m: b"luo-v3\0\0" + struct.pack("<QQQ", 1, 0x1001, 0), "no address of a page"),
        (lambda m: b"luo-v3\0\0" + struct.pack("<QQQ", 1, m.new(u64(1 << 40)), 0), "sessions, of at most"),
        (lambda m: b"luo-v3\0\0" + struct.pack("<QQQ", 1, array(m, [entry(m, b"", range(1))]), 0), "name"),
        (
            lambda m: b"luo-v3\0\0" + struct.pack("<QQQ", 1, array(m, [struct.pack("<64sQQ", b"a", 0x1000, 129)]), 0),
            "129 files",
        ),
        (lambda m: b"luo-v3\0\0" + struct.pack("<QQQ", 1, array(m, [struct.pack("<64sQQ", b"a", 0, 1)]), 0), "1 files at 0x0"),
        (
            lambda m: b"luo-v3\0\0" + struct.pack("<QQQ", 1, array(m, [struct.pack("<64sQQ", b"a", 0x900000, 1)]), 0),
            "no memory",
        ),
    ],
)
def test_those_that_are_none(make: Callable[[Memory], bytes], words: str) -> None:
    memory = Memory()
    with pytest.raises(FormatError, match=words):
        luo_older.decode(memory, make(memory))
