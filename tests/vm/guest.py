# SPDX-License-Identifier: LGPL-2.1-or-later
"""What scenarios are given: khod's own, which rehearsals are played with as well."""

from __future__ import annotations

from khod.rehearsal.guest import Guest

__all__ = ["Guest"]
