# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handover tree and the folio map in force, for people."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from khod.abi.tree import HandoverTree
from khod.abi.tree_source import to_source
from khod.core.incoming import Incoming
from khod.core.views import InspectionView, OrderView

if TYPE_CHECKING:
    from khod.core.outgoing import Outgoing


class Total(Protocol):
    """What both the tracker and the validated map tell of one order."""

    @property
    def folios(self) -> int:
        """How many."""
        ...

    @property
    def bitmaps(self) -> int:
        """In how many blocks."""
        ...

    @property
    def bytes(self) -> int:
        """Of memory."""
        ...


def inspect_outgoing(outgoing: Outgoing) -> InspectionView:
    """What an update under way has written."""
    assert outgoing.tree is not None
    return _view("outgoing", outgoing.tree, outgoing.tracker.totals())


def inspect_incoming(incoming: Incoming) -> InspectionView:
    """What brought us here, until it is finished."""
    assert incoming.tree is not None
    return _view("incoming", incoming.tree, incoming.map.totals() if incoming.map is not None else {})


def inspect_nothing() -> InspectionView:
    """Nothing is preserved."""
    return InspectionView(source="none", tree="", map_address=0, map_pages=0, map_sha256="", orders=())


def _view(source: str, tree: HandoverTree, totals: Mapping[int, Total]) -> InspectionView:
    return InspectionView(
        source=source,
        tree=to_source(tree),
        map_address=tree.map_address,
        map_pages=tree.map_pages,
        map_sha256=tree.map_sha256.hex(),
        orders=[OrderView(order=o, folios=t.folios, bitmaps=t.bitmaps, bytes=t.bytes) for o, t in totals.items()],
    )
