# SPDX-License-Identifier: LGPL-2.1-or-later
"""`khoctl demo` as a newcomer runs it, on a host of 16 GiB instead of 1 TiB."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from typing import Any

import pytest

from khod.demo import human

KHOCTL = [sys.executable, "-c", "from khod.cli import main; main()", "demo"]


def demo(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*KHOCTL, *words], capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL)


def test_all_that_was_registered_survives_and_nothing_else() -> None:
    done = demo("--memory", "16G", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert report["state"] == "restored"
    assert report["registered"] == report["survived"] == 8
    assert report["unregistered_pages"] == 256
    assert report["unregistered_survived"] == 0
    assert report["witness"]["bytes"] == "khod demo: this page belongs to guest-000"
    assert "then all 66" in report["checked"], "900 folios of the guests, 65,536 pages of the hypervisor's; tree and map"
    assert {"preparing", "freezing", "between", "blackout", "restoring"} <= {span["phase"] for span in report["spans"]}
    assert 0 < report["resident"] < 1 << 30


def test_people_see_progress_a_timeline_and_what_became_of_memory() -> None:
    done = demo("--memory", "16G")
    assert done.returncode == 0, done.stdout + done.stderr
    for said in ("A host of 16 GiB", "reboot(LINUX_REBOOT_CMD_KEXEC)", "A new kernel, jump number 1; khod is restored"):
        assert said in done.stdout
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert any(line.startswith("preparing 0.") and line.endswith("…") for line in lines), "a long line is cropped"
    assert "4 guests 14.1 GiB 16 MiB 4 of 4" in lines
    assert "the hypervisor's own 256 MiB 4 KiB 4 of 4" in lines
    assert "not registered 4 MiB 4 KiB 0 of 256 pages looked at" in lines
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.full
def test_a_tebibyte_takes_less_than_thirty_seconds_and_a_gibibyte() -> None:
    started = time.monotonic()
    done = demo("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - started < 30
    report = json.loads(done.stdout)
    assert (report["memory"], report["registered"], report["survived"]) == (1 << 40, 116, 116)
    assert report["resident"] < 1 << 30


@pytest.mark.parametrize("size", ["8G", "17G", "2T", "much"])
def test_a_host_that_cannot_be_is_refused(size: str) -> None:
    done = demo("--memory", size)
    assert done.returncode == 2
    assert size in done.stderr


def test_sizes_for_people() -> None:
    assert [human(n) for n in (1, 4096, 9 << 30, 7_945_689_498, 1 << 40, 5 << 50)] == [
        "1 bytes", "4 KiB", "9 GiB", "7.4 GiB", "1 TiB", "5120 TiB",
    ]  # fmt: skip
