# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

from pathlib import Path

import pytest

from tests.orchestration.world import World


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)
