# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.client.attended import Guest
from tests.integration.client.scripted import ScriptedKhod


@pytest.fixture
def khod(tmp_path: Path) -> Iterator[ScriptedKhod]:
    made = ScriptedKhod(tmp_path / "khod.sock")
    yield made
    made.close()


@pytest.fixture
def guest() -> Guest:
    return Guest()
