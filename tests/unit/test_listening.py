# SPDX-License-Identifier: LGPL-2.1-or-later
"""Sockets that are listened on, and who can reach them."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from khod.api.listening import listen


@pytest.mark.parametrize(("everybody", "mode"), [(False, 0o600), (True, 0o666)])
def test_who_can_reach_it_does_not_depend_on_the_umask(tmp_path: Path, everybody: bool, mode: int) -> None:
    path = tmp_path / "run" / "khod.sock"
    before = os.umask(0o077)  # as the unit has it
    try:
        listen(path, everybody=everybody).close()
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o755


def test_a_directory_that_is_there_keeps_its_mode(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir(mode=0o710)
    listen(tmp_path / "run" / "khod.sock").close()
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o710
