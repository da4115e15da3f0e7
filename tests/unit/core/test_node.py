# SPDX-License-Identifier: LGPL-2.1-or-later
"""An instance's node: what is left out, what is read back, and what contradicts itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from khod.abi import cells
from khod.core.callers import Kind, Lifetime, Owner
from khod.core.driver import Continuity, Strategy
from khod.core.node import Carried, from_node, to_node
from khod.core.registry import ROOT, Grade
from khod.core.sample import Sample
from khod.errors import TreeError

PLAIN = Carried(
    name="vm-1", driver="guestmemfd", compatible="khod,guestmemfd-v1", owner=ROOT, required=True, requires=("net",),
    options={"a": "b=c"}, session="khod.u.1", fds=("ram", "rom"), memory=(0,), sizes=(4096, 8192), states=("cpu",),
    bounds=(64,), frames=(bytes(32), bytes(32)), sample=Sample((1, 2), 1, bytes(32)),
)  # fmt: skip
FULL = replace(
    PLAIN, owner=Owner(Kind.UNIT, "vmm@1.service"), lifetime=Lifetime.PROCESS, bulk=("cpu",), made=("dev",),
    strategy=Strategy.CARRIED, continuity=Continuity.REBUILT, client_states=("cpu",),
    shares={"rom": ((ROOT, "other"), "image")}, shareable=True,
)  # fmt: skip
OPAQUE = replace(PLAIN, grade=Grade.OPAQUE, fds=(), memory=(), sizes=(), states=(), bounds=(), frames=())


@pytest.mark.parametrize("carried", [PLAIN, FULL, OPAQUE], ids=["plain", "full", "opaque"])
def test_what_is_written_is_read(carried: Carried) -> None:
    assert from_node(to_node(1, carried)) == carried


def test_what_goes_without_saying_is_not_said_and_an_earlier_khods_node_is_read() -> None:
    node = to_node(1, PLAIN)
    first = (
        "driver owner required requires options session fds memory sizes states bounds frames-sha256 sample-frames"
        " sample-checked sample-sha256 content-sha256"
    )
    assert set(node.properties) == {f"khod,{name}" for name in first.split()}, "the properties of the first version"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("khod,owner", cells.string("nobody")),
        ("khod,grade", cells.string("best")),
        ("khod,strategy", cells.string("hope")),
        ("khod,continuity", cells.string("")),
        ("khod,lifetime", cells.string("for ever")),
        ("khod,shares", cells.strings(("rom", "user:root", "other"))),
        ("khod,shares", cells.strings(("ram", "user:root", "other", "image"))),
        ("khod,shares", cells.strings(("none", "user:root", "other", "image"))),
        ("khod,bulk", cells.strings(("gpu",))),
        ("khod,made", cells.strings(("ram",))),
        ("khod,client-states", cells.strings(("gpu",))),
        ("khod,grade", cells.string("opaque")),
    ],
)
def test_what_contradicts_is_an_error_that_names_node_and_property(name: str, value: bytes) -> None:
    node = to_node(7, FULL)
    with pytest.raises(TreeError, match=f"instance@7.*{name}"):
        from_node(replace(node, properties={**node.properties, name: value}))
