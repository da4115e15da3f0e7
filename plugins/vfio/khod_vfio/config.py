# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which registers of a configuration space are the software's, to be written back: pure.

Not among them: identity and status, which the device has; the command register, which comes first and last; MSI and MSI-X,
which VFIO sets up by itself when a client asks for interrupts.
"""

from __future__ import annotations

from collections.abc import Iterator

from khod.abi import vfio

_HEADER = (
    *((vfio.PCI_CACHE_LINE_SIZE, 1), (vfio.PCI_CACHE_LINE_SIZE + 1, 1)),
    *((offset, 4) for offset in range(vfio.PCI_BASE_ADDRESS_0, vfio.PCI_CARDBUS_CIS, 4)),
    *((vfio.PCI_ROM_ADDRESS, 4), (vfio.PCI_INTERRUPT_LINE, 1)),
)
_EXPRESS = ((vfio.PCI_EXP_DEVCTL, 2), (vfio.PCI_EXP_LNKCTL, 2), (vfio.PCI_EXP_DEVCTL2, 2))
_MOST_CAPABILITIES = 48
"""Of at least 4 bytes each there are no more, behind a header of 64 in 256."""


def writable(config: bytes) -> Iterator[tuple[int, bytes]]:
    """Offset and saved value of each. Follows the list of capabilities, however it is linked."""
    places = list(_HEADER)
    at = config[vfio.PCI_CAPABILITY_LIST] if config[vfio.PCI_STATUS] & vfio.PCI_STATUS_CAP_LIST else 0
    for _ in range(_MOST_CAPABILITIES):
        if at < 64 or at + 2 > len(config):
            break
        if config[at] == vfio.PCI_CAP_ID_EXP:
            places += [(at + offset, width) for offset, width in _EXPRESS]
        at = config[at + 1] & ~3
    for offset, width in places:
        if offset + width <= len(config):
            yield offset, config[offset : offset + width]
