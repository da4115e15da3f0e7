# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl inspect across a real kexec: out of the kernel's own structures, the same frames that its pagemap shows."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from khod.inspect.views import KHOD
from tests.unit.test_abi_golden import check_first, check_second
from tests.vm.conftest import Play

pytestmark = [pytest.mark.vm, pytest.mark.full, pytest.mark.timeout(600)]
RESERVE = "reserve_mem=2M:4096"
OWN = {"khod, its folio map", "khod, its handover tree"}


def test_inspect_lists_the_frames_that_pagemap_does(vm: Play) -> None:
    result = vm("inspection", cmdline=(f"{RESERVE}:khodlog",), stage_deadline=150, deadline=350).require()
    for name in ("cold", "again"):
        seen = result.facts(name)
        assert seen["format"].startswith("kho-v4"), seen
        assert seen["balanced"], seen
        assert seen["unknown"] < 16, seen
        compared = result.facts(f"{name} compared")
        assert set(compared["names"]) == {"ram", "odd", "thp", *OWN}, compared
        assert all(compared["equal"].values()), compared
        assert set(compared["by"].values()) == {KHOD}
        assert compared["map_lists"]
        assert compared["sessions"] == 4, "one an instance, and khod's own"
    addr = result.facts("addr")
    assert (addr["preserved"], addr["order"], addr["head"]) == (True, 0, True)
    assert any(said.startswith("ram of ") for said in addr["owners"]), addr
    assert result.facts("cold compared")["huge"] == {"9": 2}
    assert "sessions and files" in result.facts("cold")["missing"]
    assert result.facts("cold")["reservations"] == ["khodlog"]
    landed = result.facts("landed")
    assert landed["incoming"]["kexec_count"] == 1
    assert "incoming map of preserved folios" in landed["missing"]
    assert all(result.facts("in place")["equal"].values())
    assert result.facts("in place")["listed"]


def test_the_kernel_still_writes_what_was_captured_of_it(vm: Play) -> None:
    result = vm("golden", cmdline=(f"{RESERVE}:log",), stage_deadline=150, deadline=300).require()
    first, second = result.facts("first"), result.facts("second")
    if os.environ.get("KHOD_WRITE_GOLDEN"):
        write(first, second)
    check_first(first)
    check_second(second, first["frames"])


def write(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Into the directory that tests/unit/test_abi_golden.py reads."""
    provenance = {
        "kernel": first["version"],
        "captured": datetime.now(UTC).date().isoformat(),
        "by": f"tests/vm/scenarios/golden.py, cmdline {RESERVE}:log",
        "arch": "x86-64, pages of 4096 bytes",
    }
    golden = {"provenance": provenance, "first": first, "second": second}
    (Path(__file__).parents[1] / "golden" / f"linux-{first['release']}.json").write_text(json.dumps(golden, indent=0) + "\n")
