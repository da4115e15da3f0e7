# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is registered on a host, and stand-ins for it that fit into a smaller machine: as many instances and files, of the same
kinds, all smaller by one factor."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from khod.core.views import InstanceView
from khod.folio.units import PAGE_SIZE

DRIVER = "guestmemfd"
"""The driver whose instances are memory, of which stand-ins can be made."""
HUGE = 2 << 20
"""The size of the huge pages that stand in for those of any size."""
MOST = 64
"""Stand-ins that are made: each costs an emulated machine a tenth of a second at every step."""
# What the driver says of a file to people; a test holds it to that.
_SAID = re.compile(r"(memfd|hugetlb|guest_memfd), (\d+) bytes, (?:(\d+) allocated|in pages of (\d+))")


@dataclass(frozen=True, slots=True)
class File:
    """One descriptor of an instance."""

    name: str
    kind: str
    """'memfd' or 'hugetlb'."""
    size: int
    allocated: int
    """Bytes that are no hole."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One instance."""

    name: str
    files: tuple[File, ...]
    required: bool = True
    requires: tuple[str, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(file.size for file in self.files)

    @property
    def cost(self) -> int:
        """Bytes of memory that an update takes for it: holes are filled, and what is in huge pages is copied."""
        return sum(file.size * (2 if file.kind == "hugetlb" else 1) for file in self.files)


EXAMPLE = Shape("stand-in", (File("ram", "memfd", 64 << 20, 48 << 20),))
"""Where nothing is registered."""


def shapes(views: Sequence[InstanceView]) -> tuple[list[Shape], dict[str, str]]:
    """Shapes of the instances that stand-ins can be made of, the largest first; and the others, each with the reason."""
    found: list[Shape] = []
    others: dict[str, str] = {}
    for view in sorted(views, key=lambda v: (-v.size, v.owner, v.name)):
        files = [_file(name, view.detail.get(name, "")) for name in view.fds]
        label = f"{view.owner}/{view.name}"
        if view.grade == "opaque":
            others[label] = "its contents are unknown"
        elif view.driver != DRIVER:
            others[label] = f"there is no stand-in for what the driver {view.driver} holds"
        elif any(file is None for file in files):
            others[label] = "there is no stand-in for its kind of memory"
        elif len(found) == MOST:
            others[label] = f"{MOST} stand-ins are made, of the largest"
        else:
            made = tuple(file for file in files if file is not None)
            found.append(Shape(view.name, made, view.required, tuple(view.requires)))
    return _distinct(found), others


def _file(name: str, said: str) -> File | None:
    """None for a guest_memfd, which takes a VM, and for what the driver says nothing of."""
    if not (match := _SAID.match(said)) or match[1] == "guest_memfd":
        return None
    size = int(match[2])
    return File(name, match[1], size, min(size, int(match[3])) if match[3] else size)


def _distinct(found: Sequence[Shape]) -> list[Shape]:
    """Names are unique for each owner, and the stand-ins have one. Requirements on what has no stand-in are dropped."""
    names = {shape.name for shape in found}
    taken: set[str] = set()
    made = []
    for shape in found:
        name = next(n for n in _candidates(shape.name) if n not in taken and (n == shape.name or n not in names))
        taken.add(name)
        kept = tuple(other for other in shape.requires if other in names)
        made.append(Shape(name, shape.files, shape.required, kept))
    return made


def _candidates(name: str) -> Iterator[str]:
    yield name
    number = 2
    while True:
        yield f"{name[:40]}.{number}"
        number += 1


def scaled(found: Sequence[Shape], budget: int) -> list[Shape]:
    """The same, all smaller by one factor, so that they cost at most about `budget` bytes; nothing gets larger, and nothing
    smaller than a page of its kind."""
    cost = sum(shape.cost for shape in found)
    factor = min(1.0, budget / cost) if cost else 1.0
    return [
        Shape(shape.name, tuple(_smaller(file, factor) for file in shape.files), shape.required, shape.requires)
        for shape in found
    ]


def _smaller(file: File, factor: float) -> File:
    page = HUGE if file.kind == "hugetlb" else PAGE_SIZE
    size = min(file.size, max(page, int(file.size * factor) // page * page)) if file.size else 0
    if page == HUGE:
        size = -(-size // page) * page
        return File(file.name, file.kind, size, size)
    share = file.allocated / file.size if file.size else 0
    return File(file.name, file.kind, size, min(size, int(size * share) // page * page))


def huge_pages(made: Sequence[Shape]) -> int:
    """Huge pages that these take."""
    return sum(file.size // HUGE for shape in made for file in shape.files if file.kind == "hugetlb")
