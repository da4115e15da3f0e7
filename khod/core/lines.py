# SPDX-License-Identifier: LGPL-2.1-or-later
"""Records one a line that say themselves whether they are whole: ``<crc32, 8 hex digits> <JSON object>\\n``."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any


def encode(body: Mapping[str, Any]) -> bytes:
    """One line."""
    text = json.dumps(body, separators=(",", ":"), sort_keys=True).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def whole(line: bytes) -> bool:
    """Whether a line, without its newline, is as it was written."""
    return len(line) > 9 and line[8:9] == b" " and line[:8] == b"%08x" % zlib.crc32(line[9:])


def decode(line: bytes) -> Any:
    """What a whole line says. Raises ValueError, RecursionError for what was not written by `encode`."""
    return json.loads(line[9:])
