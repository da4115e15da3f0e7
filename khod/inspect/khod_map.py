# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod's folio map, walked by physical address as its next reader would."""

from __future__ import annotations

import numpy as np

from khod.core.views import InspectionView
from khod.errors import FormatError
from khod.folio.bulk import read_map
from khod.folio.units import MAX_ORDER, PAGE_SHIFT
from khod.inspect.preserved import joined
from khod.inspect.source import Source
from khod.inspect.views import Span


def spans(source: Source, view: InspectionView) -> tuple[Span, ...]:
    """What it lists. Raises FormatError for a map that is not the one that khod tells of."""
    try:
        digest = bytes.fromhex(view.map_sha256)
    except ValueError:
        raise FormatError(f"khod tells {view.map_sha256[:80]!r} of its map, which is no SHA-256")
    found = read_map(
        source, view.map_address, view.map_pages, digest,
        ram=source.ram(), scratch=source.scratch(), max_order=MAX_ORDER,
    )  # fmt: skip
    out: list[Span] = []
    for order, pfns in found.arrays():
        size = 1 << order
        cuts = np.flatnonzero(np.diff(pfns) != size) + 1
        starts, ends = np.concatenate(([0], cuts)), np.concatenate((cuts, [pfns.size]))
        out += [
            (int(pfns[start]) << PAGE_SHIFT, int(pfns[end - 1]) + size << PAGE_SHIFT)
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
            if end > start
        ]
    return joined(out)
