# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import pytest

from khod.core.driver import Declaration
from khod.core.registry import ROOT, Entry, Registry, dependents, order, users
from khod.errors import InvalidRequest, Refused


def entry(name: str, *requires: str) -> Entry:
    return Entry(name, None, "driver", ROOT, True, requires, {}, Declaration("x", ()), {})


@pytest.mark.parametrize("name", ["", ".vm", "-vm", "a/b", "a b", "ü", "a" * 49, "vm\n", "@x"])
def test_names_that_are_not_allowed(name: str) -> None:
    with pytest.raises(InvalidRequest, match="name"):
        Registry().add(entry(name))


@pytest.mark.parametrize("name", ["a", "9", "vm-1.guest_ram@host", "a" * 48])
def test_names_that_are_allowed(name: str) -> None:
    registry = Registry()
    registry.add(entry(name))
    assert registry.get((ROOT, name)).name == name


def test_a_name_is_taken_once_and_free_again_after_removal() -> None:
    registry = Registry()
    registry.add(first := entry("vm"))
    with pytest.raises(Refused, match="vm"):
        registry.add(entry("vm"))
    registry.remove(first)
    registry.add(entry("vm"))


def test_what_another_requires_stays() -> None:
    registry = Registry()
    registry.add(memory := entry("memory"))
    registry.add(device := entry("device", "memory"))
    with pytest.raises(Refused, match="device"):
        registry.check_removable(memory)
    registry.remove(device)
    registry.check_removable(memory)


def test_a_dependency_must_exist() -> None:
    with pytest.raises(InvalidRequest, match="nothing-there"):
        Registry().add(entry("device", "nothing-there"))


def test_generations_hold_what_can_go_at_once() -> None:
    entries = [entry("vfio", "iommu", "ram"), entry("iommu", "ram"), entry("ram"), entry("other")]
    assert [[e.name for e in g] for g in order(entries)] == [["other", "ram"], ["iommu"], ["vfio"]]


def test_a_circle_is_refused_by_name() -> None:
    with pytest.raises(Refused, match=r"a -> .*b|b -> .*a"):
        order([entry("a", "b"), entry("b", "a")])


def test_dependents_are_found_through_others() -> None:
    ram, iommu, vfio, other = entry("ram"), entry("iommu", "ram"), entry("vfio", "iommu"), entry("other")
    known = users([ram, iommu, vfio, other])
    assert {e.name for e in dependents(ram, known)} == {"iommu", "vfio"}
    assert dependents(vfio, known) == []


def test_dependents_of_a_circle_are_the_others_in_it() -> None:
    a, b = entry("a", "b"), entry("b", "a")
    assert dependents(a, users([a, b])) == [b]
