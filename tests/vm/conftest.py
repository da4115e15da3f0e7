# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fixture `vm`: play a scenario in the lab's virtual machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.vm import runner

SCENARIOS = Path(__file__).with_name("scenarios")
Play = Callable[..., runner.Result]


@pytest.fixture
def vm() -> Play:
    """``vm("NAME", **fields of runner.Machine)`` plays scenarios/NAME.py and gives the `Result`, whatever the outcome.

    Skips where no machine can be run, and fails there instead when KHOD_REQUIRE names "vm"."""
    if reason := runner.missing():
        if "vm" in os.environ.get("KHOD_REQUIRE", "").split(","):
            pytest.fail(f"KHOD_REQUIRE=vm, and {reason}")
        pytest.skip(reason)

    def play(name: str, **fields: Any) -> runner.Result:
        return runner.run(runner.Machine(SCENARIOS / f"{name}.py", **fields))

    return play
