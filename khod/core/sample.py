# SPDX-License-Identifier: LGPL-2.1-or-later
"""The bounded sample of frames and bytes that is compared across the jump (decision 22).

Which pages are looked at follows from the update's id alone, so that both kernels look at the same ones and nobody can know
them before. A page of an instance is numbered through all its memory descriptors, in token order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from khod.core.ports import Files, Frames
from khod.early import sampling
from khod.early.sampling import ORDER_SHIFT
from khod.folio.units import PAGE_SHIFT, PAGE_SIZE, Folio


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen of one instance."""

    frames: tuple[int, ...]
    """Of every chosen page: pfn and folio order, packed."""
    checked: int
    """How many of the chosen pages `digest` covers: the first ones, as many as the budget allowed."""
    digest: bytes
    """SHA-256 over the bytes of those pages, in the order in which they were chosen."""


def packed(pfn: int, folio: Folio) -> int:
    """A page's frame and its folio's order, as recorded in the handover tree."""
    return pfn | folio.order << ORDER_SHIFT


def unpacked(value: int) -> tuple[int, Folio]:
    """The page's frame, and the folio that it belongs to."""
    pfn, order = value & ((1 << ORDER_SHIFT) - 1), value >> ORDER_SHIFT
    return pfn, Folio(pfn >> order << order, order)


def choose(update: str, instance: str, sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """At most `count` pages, as (index of the descriptor, page index in it), all different; `sizes` in bytes."""
    return sampling.choose(update, instance, sizes, count, hashlib.sha256)


def take(
    files: Files,
    frames: Frames,
    fds: Sequence[int],
    chosen: Sequence[tuple[int, int]],
    enough: Callable[[int], bool] = lambda _: False,
) -> Sample:
    """Look at the chosen pages: at all frames, and at bytes until `enough(pages hashed)` says to stop."""
    return Sample(locations(frames, fds, chosen), *digest(files, fds, chosen, enough))


def locations(frames: Frames, fds: Sequence[int], chosen: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The packed frame of each chosen page; one call a descriptor."""
    wanted: dict[int, list[int]] = {}
    for index, page in chosen:
        wanted.setdefault(index, []).append(page)
    found: Mapping[tuple[int, int], int] = {
        (index, page): packed(*where)
        for index, pages in wanted.items()
        for page, where in zip(pages, frames.pages(fds[index], pages), strict=True)
    }
    return tuple(found[place] for place in chosen)


def digest(
    files: Files, fds: Sequence[int], chosen: Sequence[tuple[int, int]], enough: Callable[[int], bool]
) -> tuple[int, bytes]:
    """How many pages were hashed, and the hash."""
    hashed = hashlib.sha256()
    done = 0
    for index, page in chosen:
        if enough(done):
            break
        hashed.update(files.read(fds[index], page << PAGE_SHIFT, PAGE_SIZE))
        done += 1
    return done, hashed.digest()


def content_digest(files: Files, fds: Sequence[int], sizes: Sequence[int], chunk: int = 1 << 22) -> bytes:
    """SHA-256 over every byte of the descriptors, one after the other."""
    hashed = hashlib.sha256()
    for fd, size in zip(fds, sizes, strict=True):
        for offset in range(0, size, chunk):
            hashed.update(files.read(fd, offset, min(chunk, size - offset)))
    return hashed.digest()
