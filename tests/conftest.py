# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where tests run side by side, those of the virtual machine are one worker's: one machine runs at a time."""
    for item in items:
        if item.get_closest_marker("vm"):
            item.add_marker(pytest.mark.xdist_group("vm"))


@pytest.fixture(autouse=True)
def switched_off() -> Iterator[None]:
    """No simulated machine outlives its test: thousands of them in one process would have all its descriptors."""
    yield
    world = sys.modules.get("tests.orchestration.world")
    if world is not None:
        world.World.switch_off()
