# SPDX-License-Identifier: LGPL-2.1-or-later
"""The contract suite of tests/contract on the running kernel."""

from __future__ import annotations

import os
from collections import Counter

from tests.vm.guest import Guest


def before(vm: Guest) -> None:
    os.environ |= {"KHOD_BZIMAGE": str(vm.kernel), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    import pytest  # seconds, under emulation

    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    seconds: dict[str, float] = {}

    class Watch:
        def pytest_collection_modifyitems(self, items: list[pytest.Function]) -> None:
            """The simulated machine is the same on every host: nothing of it here."""
            items[:] = [item for item in items if hasattr(item, "callspec") and item.callspec.params.get("rig") == "kernel"]
            vm.record("collected", tests=len(items))

        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            seconds[f"{report.when} of {report.nodeid}"] = report.duration
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.outcome] += 1
            if report.outcome != "passed":
                problems.append(f"{report.nodeid}\n{report.longreprtext}")
                vm.record("problem", text=problems[-1])

    vm.record("pytest")
    # Asserts as Python has them: to rewrite them takes seconds here. `-l` tells what a failed one was about.
    arguments = ["-q", "-l", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--assert=plain", "--tb=short", "tests/contract"]
    status = pytest.main(arguments, plugins=[Watch()])
    vm.record("slowest", **dict(sorted(seconds.items(), key=lambda item: -item[1])[:20]), all=sum(seconds.values()))
    vm.record("contract", status=int(status), outcomes=outcomes, problems=problems)
