# SPDX-License-Identifier: LGPL-2.1-or-later
"""What parts of a kernel hand over beside folios, each by the name of its child of the root."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from khod.abi import kexec_metadata, luo, luo_older, memblock
from khod.abi.kexec_handover import Blob, Root
from khod.errors import FormatError
from khod.inspect import roots
from khod.inspect.source import Source
from khod.inspect.views import BlobInfo, FileInfo, LuoInfo, ReservationInfo

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
            out["luo"] = luo_info(self._source, roots.blob(self._source, one))
        else:
            self._miss(f"{one.name} ({self._directory})", "nothing here reads it")


def luo_info(source: Source, data: bytes) -> LuoInfo:
    """Any version. Raises FormatError."""
    if data.startswith(luo.VERSION.encode()):
        header = luo.decode(data)
        rows = [(session.name, list(luo.files(source, session))) for session in luo.sessions(source, header)]
        flbs = list(luo.flbs(source, header))
        text, number = str(header.format), header.number
    else:
        older = luo_older.decode(source, data)
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


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
