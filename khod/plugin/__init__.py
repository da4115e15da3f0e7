# SPDX-License-Identifier: LGPL-2.1-or-later
"""What driver authors write against: the marker, the value types, and the hooks in `khod.plugin.hookspecs`."""

from __future__ import annotations

import pluggy

from khod.core.driver import (
    Continuity,
    Declaration,
    Instance,
    Preserve,
    Probe,
    Request,
    StateArea,
    StateBound,
    Strategy,
)

hookimpl = pluggy.HookimplMarker("khod")

__all__ = (
    "Continuity",
    "Declaration",
    "Instance",
    "Preserve",
    "Probe",
    "Request",
    "StateArea",
    "StateBound",
    "Strategy",
    "hookimpl",
)
