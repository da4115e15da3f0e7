# SPDX-License-Identifier: LGPL-2.1-or-later
"""The custodian with sessions of the running kernel, across a real kexec."""

from __future__ import annotations

import pytest

from tests.vm.conftest import Play
from tests.vm.host import Host

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


def test_a_real_systemd_lets_the_twin_go_on_and_gives_back_what_it_keeps(boot: type[Host]) -> None:
    unit = "khod-custodian.service"

    def show(host: Host, name: str) -> str:
        return host.run("systemctl", "show", "--value", "-p", name, unit).out.strip()

    def twins(host: Host) -> list[str]:
        return host.program("custody", "twins").out.split()

    with boot() as host:
        host.programs("custody")
        assert show(host, "ActiveState") == "active"
        host.program("custody", "keep", "unit", "one")
        host.program("custody", "keep", "unit", "two")
        assert "unitA" in host.run("systemd-analyze", "fdstore", unit).out
        serving, sleeping = twins(host)
        assert show(host, "MainPID") == serving
        for victim in (0, 1):
            before = twins(host)
            host.run("sh", "-c", f"kill -KILL {before[victim]}")
            assert host.program("custody", "read", "unit").out == "two\n"
            after = twins(host)
            assert before[victim] not in after
            assert len(after) == 2
            assert (show(host, "MainPID"), show(host, "NRestarts")) == (after[0], "0")
        assert sleeping in before
        # Both at once; then a stop, which SIGTERM is enough for.
        host.run("systemctl", "kill", "--kill-whom=all", "-s", "KILL", unit)
        host.run("systemctl", "start", unit)
        assert host.program("custody", "read", "unit").out == "two\n"
        host.run("systemctl", "stop", unit)
        assert show(host, "Result") == "success"
        host.run("systemctl", "start", unit)
        assert host.program("custody", "read", "unit").out == "two\n"
        assert "unit" in host.program("custody", "names").out.split()
        judged = host.run("systemd-analyze", "verify", "--man=no", unit)
        assert judged.out + judged.err == ""
