# SPDX-License-Identifier: LGPL-2.1-or-later
"""The scenarios on the simulated machine, each kernel a process of its own. The lab plays them around a real kexec."""

from __future__ import annotations

import json
import sys

import pytest

from khod.simulated import create, power
from tests.contract.play import OUTCOME
from tests.contract.scenarios import SCENARIOS

Outcome = dict[str, str]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """What came of each scenario: '' or a traceback."""
    directory = tmp_path_factory.mktemp("scenarios")
    create(directory / "machine", memory=512 << 20)
    status = power.run(directory / "machine", [sys.executable, "-m", "tests.contract.play", str(directory)])
    assert status == 0
    found = json.loads((directory / OUTCOME).read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("name", [scenario.name for scenario in SCENARIOS])
def test_across_a_jump(outcome: Outcome, name: str) -> None:
    assert outcome[name] == "", outcome[name]


def test_a_process_of_the_machine_needs_no_numpy(outcome: Outcome) -> None:
    assert outcome["imports numpy"] == "False"


def test_each_half_is_there(outcome: Outcome) -> None:
    assert set(outcome) == {*(scenario.name for scenario in SCENARIOS), "imports numpy"}
