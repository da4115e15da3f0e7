# SPDX-License-Identifier: LGPL-2.1-or-later
"""The custodian with sessions of the running kernel, across a real kexec."""

from __future__ import annotations

import pytest

from tests.vm.conftest import Play

pytestmark = [pytest.mark.vm, pytest.mark.timeout(300)]


def test_whoever_is_killed_what_came_through_is_there_and_is_given_again(vm: Play) -> None:
    result = vm("custody", stage_deadline=120).require()
    deaths = result.facts("deaths")
    assert deaths["files"] >= 3
    assert deaths["sessions"] >= 3
    one = result.facts("one")
    assert one["sessions"] == ["large"]
    assert [name[:1] for name in one["store"]] == ["S"]
    assert result.facts("both")["sessions"] == 15  # all but the one that only the last part retrieves
    assert result.facts("released")["freed"] > 60 << 10  # KiB of 64 MiB; what else is in tmpfs moves a little
