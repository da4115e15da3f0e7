# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl: khod's command line. A client of the API that knows nothing of how khod works.

One file a command; `khod.cli.command` is what they share, `khod.cli.show` how views look, `khod.cli.output` where they go.
"""

from __future__ import annotations

from khod.cli.application import main

__all__ = ("main",)
