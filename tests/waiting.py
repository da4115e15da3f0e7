# SPDX-License-Identifier: LGPL-2.1-or-later
"""Waiting for descriptors, of whatever number: select(2) knows those below 1024 alone."""

from __future__ import annotations

import select
from typing import Any


def readable(*files: Any, seconds: float) -> list[Any]:
    """Those of `files` (descriptors, or what has one) that can be read or are at their end, after `seconds` at most."""
    poll = select.poll()
    by_fd = {file if isinstance(file, int) else file.fileno(): file for file in files}
    for fd in by_fd:
        poll.register(fd, select.POLLIN)
    return [by_fd[fd] for fd, _ in poll.poll(max(0.0, seconds) * 1000)]
