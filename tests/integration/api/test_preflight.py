# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl preflight, and overriding, over the socket."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.api.served import Served
from tests.integration.api.test_khoctl import khoctl


def test_a_table_and_a_status(khod: Served) -> None:
    ran = khoctl(khod, "preflight")
    assert ran.status == 3
    assert ran.out.startswith("from 7.3.4 to no kernel yet: blocker\n")
    assert "image   blocker  no kernel is named  khoctl load" in ran.out
    khod.run(khod.service.load("/boot/bzImage"))
    ran = khoctl(khod, "preflight", "--json")
    assert ran.status == 0
    assert ran.json["checks"][1]["evidence"] == "/boot/bzImage"
    assert ran.json["verdict"] == "unknown"


def test_another_kernel(khod: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = khoctl(khod, "preflight", "--kernel", "vmlinuz", "--initrd", "initrd", "--append", "quiet", "--json")
    assert (ran.status, ran.json["target"]) == (0, "7.4.0")
    assert [c["evidence"] for c in ran.json["checks"]] == [f"[{tmp_path}/initrd] [quiet]", f"{tmp_path}/vmlinuz"]
    assert "[] [None]" in khoctl(khod, "preflight", "--kernel", "/vmlinuz").out
    ran = khoctl(khod, "preflight", "--initrd", "initrd")
    assert (ran.status, "name it with --kernel" in ran.err) == (2, True)


def test_overrides_are_named_one_by_one(khod: Served) -> None:
    ran = khoctl(khod, "preflight", "--override", "image")
    assert ran.status == 0
    assert "blocker, overridden" in ran.out
    khod.run(khod.service.load("/boot/bzImage"))
    assert khoctl(khod, "update", "--override", "scratch", "--override", "format:kho").status == 0
    assert khod.service.overrides == ["scratch", "format:kho"]
    assert khoctl(khod, "update", "--dry-run", "--override", "scratch").status == 2
