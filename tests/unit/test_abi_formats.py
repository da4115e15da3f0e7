# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.abi.formats: names, where they are found, and what comes of a difference."""

from __future__ import annotations

import pytest

from khod.abi import formats
from khod.abi.formats import Format, Match, Outcome, compare, compare_all, parse
from khod.errors import FormatError
from tests import images


def test_a_name_and_its_parts() -> None:
    assert parse("kho-v4") == Format("kho-v4")
    composite = parse("kho-v4;radix-v1;vmalloc-v2")
    assert (composite.name, composite.base, composite.subs) == ("kho", "kho-v4", ("radix-v1", "vmalloc-v2"))
    assert str(composite) == "kho-v4;radix-v1;vmalloc-v2"
    assert parse("reserve-mem-v1").name == "reserve-mem"


@pytest.mark.parametrize(
    "text", ["", "kho", "kho-v", "kho-v4;", ";kho-v4", "Kho-v4", "kho-v4 ", "kho-v4\n", "kho-v4;radix", "-v1"]
)
def test_what_is_no_name(text: str) -> None:
    with pytest.raises(FormatError, match="not the name of a format"):
        parse(text)


def found(kernel: bytes) -> list[str]:
    return [str(f) for f in formats.find(kernel)]


def test_plain_strings_are_found_whole_and_nowhere_else() -> None:
    assert found(b"\0kho-v4\0luo-v5;block-v1;vmalloc-v1\0") == ["kho-v4", "luo-v5;block-v1;vmalloc-v1"]
    # A longer word, a text that goes on, a property, and a version that is missing.
    assert found(b"\0xkho-v4\0kho-v4 is old\0kho-v4;radix\0kho-v\0memfd-v2\0") == []
    assert found(b"kho-v3\0kho-v4\0") == ["kho-v3", "kho-v4"]


def test_handlers_are_found_by_the_struct_that_they_stand_in() -> None:
    """A device tree's compatible looks the same, but stands beside no pointer into the kernel, or not alone in its field."""
    assert found(images.handler("memfd-v2") + images.handler("vfio-pci-v1")) == ["memfd-v2", "vfio-pci-v1"]
    assert found(b"\0memfd-v2\0" + bytes(64)) == []
    assert found(images.handler("memfd-v2")[:40]) == []
    dirty = bytearray(images.handler("memfd-v2"))
    dirty[40] = 1
    assert found(bytes(dirty)) == []


def all_of(*names: str) -> list[Format]:
    return [parse(name) for name in names]


OURS = all_of("kho-v4", "luo-v5", "memfd-v2", "memblock-v1", "reserve-mem-v1")


@pytest.mark.parametrize(
    ("reads", "name", "outcome", "words"),
    [
        (("kho-v9", "luo-v5", "memfd-v2"), "kho", Outcome.COLD, "kho-v4 is written, kho-v9 is read"),
        (("luo-v5", "memfd-v2"), "kho", Outcome.COLD, "knows no kho format"),
        (("kho-v4", "luo-v9", "memfd-v2"), "luo", Outcome.PANIC, "luo-v5 is written, luo-v9 is read"),
        (("kho-v4", "memfd-v2"), "luo", Outcome.DEAD, "knows no luo format"),
        (("kho-v4", "luo-v5", "memfd-v1"), "memfd", Outcome.DEAD, "memfd-v2 is written, memfd-v1 is read"),
        (("kho-v4", "luo-v5", "memfd-v2", "memblock-v2", "reserve-mem-v1"), "memblock", Outcome.PARTLY, "memblock-v2"),
    ],
)
def test_what_a_difference_leads_to(reads: tuple[str, ...], name: str, outcome: Outcome, words: str) -> None:
    compared = {c.name: c for c in compare_all(OURS, all_of(*reads))}
    assert (compared[name].match, compared[name].outcome) == (Match.INCOMPATIBLE, outcome)
    assert words in compared[name].reason
    assert outcome.sentence


def test_a_kernel_reads_what_it_writes() -> None:
    assert {c.match for c in compare_all(OURS, OURS)} == {Match.COMPATIBLE}
    assert formats.worst(compare_all(OURS, OURS)) is Outcome.FINE


def test_of_several_versions_one_that_is_read_will_do() -> None:
    (kho,) = compare_all(all_of("kho-v3", "kho-v4"), all_of("kho-v4"))
    assert kho.match is Match.COMPATIBLE


@pytest.mark.parametrize(
    ("writes", "reads", "words"),
    [
        ("kho-v4", "kho-v4;radix-v1", "no radix is written, radix-v1 is read"),
        ("kho-v4;radix-v1", "kho-v4", "radix-v1 is written, no radix is read"),
        ("kho-v4;radix-v1;vmalloc-v1", "kho-v4;radix-v2;vmalloc-v1", "kho: radix-v1 is written, radix-v2 is read"),
    ],
)
def test_the_part_that_differs_is_named(writes: str, reads: str, words: str) -> None:
    compared = compare("kho", parse(writes), [parse(reads)])
    assert compared.match is Match.INCOMPATIBLE
    assert words in compared.reason
    assert "vmalloc" not in compared.reason


def test_what_is_not_known_is_neither() -> None:
    assert compare("kho", None, OURS).match is Match.UNKNOWN
    assert "running kernel" in compare("kho", None, OURS).reason
    assert compare("kho", OURS[0], None).match is Match.UNKNOWN
    assert {c.match for c in compare_all(OURS, None)} == {Match.UNKNOWN}


def test_the_worst_of_a_jump() -> None:
    """A kernel that takes nothing over looks at nothing else: with another KHO it boots cold, whatever its LUO."""
    assert formats.worst(compare_all(OURS, all_of("kho-v9", "luo-v9"))) is Outcome.COLD
    assert formats.worst(compare_all(OURS, all_of("kho-v4", "luo-v9", "memfd-v9"))) is Outcome.PANIC
    assert formats.worst(compare_all(OURS, all_of("kho-v4", "luo-v5", "memfd-v9"))) is Outcome.DEAD
    assert formats.worst([]) is Outcome.UNKNOWN
