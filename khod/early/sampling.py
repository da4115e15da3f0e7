# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which pages of an instance are compared across a jump (decision 22): it follows from the update's id alone.

By SHA-256, which the caller brings: hashlib loads half of OpenSSL, and the interpreter has one of its own.
"""

from __future__ import annotations

PAGE = 4096
ORDER_SHIFT = 52
"""In a recorded frame the page's pfn is below this bit, the order of its folio above."""

TYPE_CHECKING = False  # typing takes longer to import than all that is done here
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Protocol

    class Hash(Protocol):
        """What of a hash is needed."""

        def digest(self) -> bytes:
            """The digest."""
            ...


def choose(
    update: str, instance: str, sizes: Sequence[int], count: int, sha256: Callable[[bytes], Hash]
) -> list[tuple[int, int]]:
    """At most `count` pages, as (index of the descriptor, page index in it), all different; `sizes` in bytes."""
    pages = [-(-size // PAGE) for size in sizes]
    total = sum(pages)
    if total <= count:
        chosen = list(range(total))
    else:
        numbers: dict[int, None] = {}
        turn = 0
        while len(numbers) < count:
            word = sha256(f"{update}/{instance}/{turn}".encode()).digest()
            numbers[int.from_bytes(word[:8], "little") % total] = None
            turn += 1
        chosen = list(numbers)
    return [_locate(number, pages) for number in chosen]


def _locate(number: int, pages: Sequence[int]) -> tuple[int, int]:
    for index, count in enumerate(pages):
        if number < count:
            return index, number
        number -= count
    raise AssertionError("a page beyond the last file")
