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

    class Watch:
        def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
            if report.when == "call" or report.outcome != "passed":
                outcomes[report.outcome] += 1
            if report.outcome != "passed":
                problems.append(f"{report.nodeid}\n{report.longreprtext}")
                vm.record("problem", text=problems[-1])

    arguments = ["-q", "-k", "kernel", "-p", "no:cacheprovider", "-p", "pytest_timeout", "--tb=short", "tests/contract"]
    status = pytest.main(arguments, plugins=[Watch()])
    vm.record("contract", status=int(status), outcomes=outcomes, problems=problems)
