# SPDX-License-Identifier: LGPL-2.1-or-later
"""Formats of others, and of the handover tree: bytes on one side, frozen values on the other; no I/O."""
