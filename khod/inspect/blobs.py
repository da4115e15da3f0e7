# SPDX-License-Identifier: LGPL-2.1-or-later
"""What parts of a kernel hand over beside folios, each by the name of its child of the root."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, TypeVar

from khod.abi import kexec_metadata, luo, luo_older, memblock
from khod.abi.kexec_handover import Blob, Root
from khod.errors import FormatError
from khod.folio.units import PhysicalMemory
from khod.inspect import roots
from khod.inspect.source import Source
from khod.inspect.views import BlobInfo, FileInfo, LuoInfo, ReservationInfo

T = TypeVar("T")
_METADATA, _MEMBLOCK, _LUO = "kexec-metadata", "memblock", "LUO"


class Reader:
    """Of one handover's; `miss` is told what cannot be had, and why."""

    def __init__(self, source: Source, directory: str, miss: Callable[[str, object], None]) -> None:
        self._source, self._directory, self._miss = source, directory, miss

    def read(self, root: Root, gone: Collection[str]) -> dict[str, Any]:
        """Fields of a HandoverInfo. Those in `gone` are named and not read: their pages are something else by now."""
        out: dict[str, Any] = {
            "blobs": [BlobInfo(name=one.name, address=one.phys, size=one.size or 0) for one in root.blobs],
            "previous_release": "", "kexec_count": 0, "reservations": (), "luo": None,
        }  # fmt: skip
        for one in root.blobs:
            if one.name in gone:
                continue
            try:
                self._one(one, out)
            except FormatError as error:
                self._miss(f"{one.name} ({self._directory})", error)
        return out

    def _one(self, one: Blob, out: dict[str, Any]) -> None:
        if one.name == _METADATA:
            found = kexec_metadata.decode(roots.blob(self._source, one))
            if found is None:
                raise FormatError("its version is none that we read")
            out["previous_release"], out["kexec_count"] = found.previous_release, found.kexec_count
        elif one.name == _MEMBLOCK:
            regions = memblock.decode(roots.blob(self._source, one))
            out["reservations"] = [ReservationInfo(name=r.name, start=r.start, size=r.size) for r in regions]
        elif one.name == _LUO:
            out["luo"] = luo_info(self._source, roots.blob(self._source, one), self._miss)
        else:
            self._miss(f"{one.name} ({self._directory})", "nothing here reads it")


def luo_info(memory: PhysicalMemory, data: bytes, miss: Callable[[str, object], None]) -> LuoInfo:
    """Any version. Of luo-v5, what one session lacks is missed, and no other's loss. Raises FormatError."""
    if data.startswith(luo.VERSION.encode()):
        header = luo.decode(data)
        text, number = str(header.format), header.number
        rows = [
            (session.name, _had(partial(luo.files, memory, session), f"files of session {_text(session.name)!r}", miss))
            for session in _had(partial(luo.sessions, memory, header), "sessions", miss)
        ]
        flbs = _had(partial(luo.flbs, memory, header), "what files share", miss)
    else:
        older = luo_older.decode(memory, data)
        rows, flbs = [(session.name, list(session.files)) for session in older.sessions], list(older.flbs)
        text, number = str(older.format), older.number
    return LuoInfo(
        format=text,
        number=number,
        sessions=[_text(name) for name, _ in rows],
        files=[
            FileInfo(session=_text(name), token=file.token, compatible=str(file.compatible), data=file.data)
            for name, files in rows
            for file in files
        ],
        flbs=[str(flb.compatible) for flb in flbs],
    )


def _had(walk: Callable[[], Iterator[T]], what: str, miss: Callable[[str, object], None]) -> list[T]:
    """All that comes before an error, and the error to who asks what is missing."""
    out: list[T] = []
    try:
        for one in walk():
            out.append(one)
    except FormatError as error:
        miss(what, error)
    return out


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
