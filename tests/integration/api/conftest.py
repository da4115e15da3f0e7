# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.api.client import Client, connect
from tests.integration.api.served import Served, served


@pytest.fixture
def khod(tmp_path: Path) -> Iterator[Served]:
    with served(tmp_path / "run" / "khod.sock") as here:
        yield here


@pytest.fixture
def client(khod: Served) -> Iterator[Client]:
    with connect(khod.path, timeout=10) as made:
        yield made
