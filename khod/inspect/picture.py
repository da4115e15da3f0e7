# SPDX-License-Identifier: LGPL-2.1-or-later
"""Physical memory as a picture: rows of cells, a cell so many bytes, in the colour of what most of it is.

SVG with a legend and what each run of cells is; PNG with the cells alone.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np

from khod.errors import InvalidRequest
from khod.folio.units import PAGE_SIZE
from khod.inspect.views import Inspection, Span

COLUMNS, MAX_ROWS, CELL = 128, 160, 6
"""Cells of a row, rows at most, pixels of a cell."""
_NO_RAM, _REST, _SCRATCH = "no RAM", "rest", "scratch"
_FIXED = {
    _NO_RAM: "#ffffff",
    _REST: "#d8dde3",
    _SCRATCH: "#f2c14e",
    "kernel": "#8d6cab",
    "unknown": "#7f7f7f",
    "khod": "#d1495b",
}
_OWNERS = ("#00798c", "#3d9a50", "#e07a2f", "#2e4a9e", "#b0468e", "#6b8e23", "#20b2aa", "#8b4513", "#4682b4", "#c71585")


@dataclass(frozen=True, slots=True)
class Picture:
    """Cells, and what their numbers mean."""

    cells: list[int]
    """Row by row, of `Inspection.ram` from its first byte to its last."""
    names: list[str]
    colours: list[str]
    start: int
    cell: int
    """Bytes of a cell."""


def draw(inspection: Inspection) -> Picture:
    """The picture. Raises InvalidRequest where there is no RAM to draw."""
    if not inspection.ram:
        raise InvalidRequest("nothing is known of this machine's memory, so there is nothing to draw")
    end = max(e for _, e in inspection.ram)
    cell = PAGE_SIZE
    while end > cell * COLUMNS * MAX_ROWS:
        cell *= 2
    count = -(-end // cell)
    layers: dict[str, list[Span]] = {_REST: [*inspection.ram], _SCRATCH: [*inspection.scratch]}
    if inspection.outgoing:
        for one in inspection.outgoing.owners:
            layers.setdefault(one.owner, []).extend(one.ranges)
    elif inspection.khod_map:
        layers["khod"] = [*inspection.khod_map]
    names = [_NO_RAM, *layers]
    # What is preserved is drawn over what is not, wherever there is any of it: a page in a gibibyte can be seen.
    best, share = np.zeros(count, np.int64), np.zeros(count, np.float64)
    for number, (name, spans) in enumerate(layers.items(), 1):
        bytes_of = _bytes(spans, cell, count)
        wins = (bytes_of > 0) & ((bytes_of > share) | (best <= 2) if name not in (_REST, _SCRATCH) else bytes_of > 0)
        best[wins], share[wins] = number, bytes_of[wins]
    colours, free = [], iter(_OWNERS * (len(names) // len(_OWNERS) + 1))
    for name in names:
        colours.append(_FIXED.get(name) or next(free))
    return Picture(best.tolist(), names, colours, 0, cell)


def _bytes(spans: Sequence[Span], cell: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """How many bytes of each cell these are."""
    out = np.zeros(count, np.float64)
    for start, end in spans:
        first, last = start // cell, min((end - 1) // cell, count - 1)
        if first > last:
            continue
        if first == last:
            out[first] += end - start
        else:
            out[first] += (first + 1) * cell - start
            out[first + 1 : last] += cell
            out[last] += min(end, (last + 1) * cell) - last * cell
    return out


def svg(picture: Picture) -> str:
    """As SVG."""
    rows = -(-len(picture.cells) // COLUMNS)
    used = sorted(set(picture.cells))
    left, line = 110, 16
    width, height = left + COLUMNS * CELL + 10, rows * CELL + 30 + line * len(used)
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="monospace" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
    ]
    for row in range(0, rows, 8):
        address = picture.start + row * COLUMNS * picture.cell
        out.append(f'<text x="4" y="{row * CELL + 12}">{address:#x}</text>')
    for row, column, length, number in _runs(picture.cells):
        if number:
            first = picture.start + (row * COLUMNS + column) * picture.cell
            title = f"{picture.names[number]}: {first:#x}-{first + length * picture.cell:#x}"
            out.append(
                f'<rect x="{left + column * CELL}" y="{row * CELL + 4}" width="{length * CELL}" height="{CELL}" '
                f'fill="{picture.colours[number]}"><title>{escape(title)}</title></rect>'
            )
    for line_number, number in enumerate(used):
        y = rows * CELL + 20 + line * line_number
        out.append(f'<rect x="{left}" y="{y - 9}" width="10" height="10" fill="{picture.colours[number]}" stroke="#000000"/>')
        out.append(f'<text x="{left + 16}" y="{y}">{escape(picture.names[number])}</text>')
    out.append("</svg>")
    return "\n".join(out) + "\n"


def _runs(cells: Sequence[int]) -> Iterator[tuple[int, int, int, int]]:
    """Row, column, cells, number: neighbours of one number in one row."""
    at = 0
    while at < len(cells):
        row_end = min((at // COLUMNS + 1) * COLUMNS, len(cells))
        end = at + 1
        while end < row_end and cells[end] == cells[at]:
            end += 1
        yield at // COLUMNS, at % COLUMNS, end - at, cells[at]
        at = end


def png(picture: Picture) -> bytes:
    """As PNG (RFC 2083): a palette, eight bits a pixel."""
    rows = -(-len(picture.cells) // COLUMNS)
    numbers = np.zeros(rows * COLUMNS, np.uint8)
    numbers[: len(picture.cells)] = np.minimum(picture.cells, 255)
    pixels = numbers.reshape(rows, COLUMNS).repeat(CELL, 0).repeat(CELL, 1)
    lines = np.concatenate((np.zeros((pixels.shape[0], 1), np.uint8), pixels), 1)  # each begins with its filter: none
    palette = b"".join(bytes.fromhex(colour[1:]) for colour in picture.colours[:256])
    head = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"PLTE", palette), (b"IDAT", zlib.compress(lines.tobytes(), 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
