# SPDX-License-Identifier: LGPL-2.1-or-later
"""include/linux/kho/abi/kexec_metadata.h: what a kernel tells its successor about itself."""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct

VERSION = 1
_LAYOUT = Struct("=I65sI")  # u32 version, char previous_release[65], u32 kexec_count; packed


@dataclass(frozen=True, slots=True)
class KexecMetadata:
    """``struct kho_kexec_metadata``."""

    previous_release: str
    kexec_count: int
    """Kexecs since the last cold boot, this one included."""


def decode(blob: bytes) -> KexecMetadata | None:
    """The metadata in `blob`; None when it is of a version that we do not know, or cut short."""
    if len(blob) < _LAYOUT.size:
        return None
    version, release, count = _LAYOUT.unpack_from(blob)
    if version != VERSION:
        return None
    return KexecMetadata(release.split(b"\0", 1)[0].decode("utf-8", "replace"), count)
