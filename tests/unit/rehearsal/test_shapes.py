# SPDX-License-Identifier: LGPL-2.1-or-later
"""Stand-ins: as many, of the same kinds, smaller by one factor."""

from __future__ import annotations

import re
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from khod.core.views import InstanceView
from khod.rehearsal.shapes import HUGE, MOST, File, Shape, huge_pages, scaled, shapes

MIB, GIB = 1 << 20, 1 << 30


def view(name: str, said: str, **more: Any) -> InstanceView:
    size = int(found[1]) if (found := re.search(r"(\d+) bytes", said)) else 0
    fields: dict[str, Any] = {
        "driver": "guestmemfd", "compatible": "guestmemfd-v2", "owner": "user:root", "required": True, "requires": (),
        "state": "registered", "size": size, "fds": ["ram"], "detail": {"ram": said}, **more,
    }  # fmt: skip
    return InstanceView(name=name, **fields)


def test_what_the_driver_says_of_memory_is_what_stand_ins_are_made_by() -> None:
    found, others = shapes(
        [
            view("small", "memfd, 4096 bytes, 0 allocated"),
            view(
                "large", f"memfd, {4 * GIB} bytes, {3 * GIB} allocated, sealed grow", required=False, requires=("small", "gone")
            ),
            view("huge", f"hugetlb, {2 * GIB} bytes, in pages of 1073741824, copied in freeze"),
        ]
    )
    assert not others
    assert [shape.name for shape in found] == ["large", "huge", "small"]
    assert found[0] == Shape("large", (File("ram", "memfd", 4 * GIB, 3 * GIB),), False, ("small",))
    assert found[1].files == (File("ram", "hugetlb", 2 * GIB, 2 * GIB),)
    assert found[1].cost == 4 * GIB, "it is copied"


def test_what_has_no_stand_in_is_left_out_with_the_reason() -> None:
    found, others = shapes(
        [
            view("gpu", "", driver="vfio"),
            view("guest", f"guest_memfd, {MIB} bytes, in pages of 4096"),
            view("opaque", "", grade="opaque", driver=""),
            view("strange", "a new kind of memory"),
        ]
    )
    assert not found
    assert "driver vfio" in others["user:root/gpu"]
    assert "kind of memory" in others["user:root/guest"]
    assert "unknown" in others["user:root/opaque"]
    assert "kind of memory" in others["user:root/strange"]


def test_the_largest_are_taken_where_there_are_many_and_names_stay_apart() -> None:
    many = [view(f"vm-{n}", f"memfd, {(n + 1) * MIB} bytes, 0 allocated") for n in range(MOST + 3)]
    found, others = shapes(many)
    assert len(found) == MOST
    assert set(others) == {"user:root/vm-0", "user:root/vm-1", "user:root/vm-2"}
    same = [view("vm", "memfd, 4096 bytes, 0 allocated", owner=f"user:{who}") for who in ("a", "b", "c")]
    names = [shape.name for shape in shapes([*same, view("vm.2", "memfd, 0 bytes, 0 allocated")])[0]]
    assert len(set(names)) == 4
    assert {"vm", "vm.2"} <= set(names)


def test_pools_are_for_what_is_in_huge_pages() -> None:
    made = scaled(
        shapes(
            [
                view("huge", f"hugetlb, {8 * GIB} bytes, in pages of 2097152"),
                view("ram", f"memfd, {8 * GIB} bytes, 0 allocated"),
            ]
        )[0],
        96 * MIB,
    )
    assert huge_pages(made) * HUGE == made[0].files[0].size == 32 * MIB
    assert made[1].files[0] == File("ram", "memfd", 32 * MIB, 0)


kinds = st.sampled_from(["memfd", "hugetlb"])
files = st.builds(
    lambda kind, pages, share: File("ram", kind, pages * 4096, int(pages * share) * 4096),
    kinds, st.integers(0, 1 << 28), st.floats(0, 1),
)  # fmt: skip


@given(st.lists(files, max_size=MOST), st.integers(64 * MIB, 16 * GIB))
def test_nothing_grows_and_all_of_it_fits(given: list[File], budget: int) -> None:
    whole = [File(f.name, f.kind, -(-f.size // HUGE) * HUGE, 0) if f.kind == "hugetlb" else f for f in given]
    found = [Shape(f"vm-{n}", (file,)) for n, file in enumerate(whole)]
    made = scaled(found, budget)
    assert [shape.name for shape in made] == [shape.name for shape in found]
    for was, now in zip(found, made, strict=True):
        assert now.size <= was.size
        assert (now.size > 0) == (was.size > 0)
        assert 0 <= now.files[0].allocated <= now.size
        assert now.size % (HUGE if now.files[0].kind == "hugetlb" else 4096) == 0
    # A page is the least of everything: what that adds is known.
    assert sum(shape.cost for shape in made) <= max(budget, 0) + 2 * HUGE * len(made)
    if sum(shape.cost for shape in found) <= budget:
        assert [shape.size for shape in made] == [shape.size for shape in found]
