# SPDX-License-Identifier: LGPL-2.1-or-later
"""Words for whoever reads standard error: the journal, or khod's own log."""

from __future__ import annotations

import os

ERROR, WARNING, INFO = 3, 4, 6
"""Priorities of syslog, as sd-daemon(3) writes them."""


def say(text: str, priority: int = INFO) -> None:
    """One line."""
    prefix = f"<{priority}>" if os.environ.get("JOURNAL_STREAM") else "khod-custodian: "
    try:
        os.write(2, f"{prefix}{text}\n".encode())
    except OSError:
        pass  # nobody reads; what is held is held all the same
