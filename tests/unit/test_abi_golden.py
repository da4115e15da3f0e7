# SPDX-License-Identifier: LGPL-2.1-or-later
"""Readers of handovers on what a real kernel wrote: pages captured in the lab, with their provenance.

``KHOD_WRITE_GOLDEN=1 pytest -m full tests/vm/test_inspect.py`` captures them anew, for the lab's kernel as it is."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from khod.abi import fdt_door, formats, kexec_handover, kexec_metadata, luo, memblock, memfd, radix_tree
from khod.folio.units import Folio
from khod.inspect.inspection import Look
from khod.inspect.preserved import of_radix_tree
from khod.inspect.views import KERNEL
from tests.handover import PAGE, Made, Memory
from tests.unit.test_inspect import Shown

GOLDEN = sorted((Path(__file__).parents[1] / "golden").glob("*.json"))
FILES = 70


def memory_of(pages: dict[str, str]) -> Memory:
    memory = Memory()
    memory.pages = {int(at, 16): bytearray(bytes.fromhex(data).ljust(PAGE, b"\0")) for at, data in pages.items()}
    return memory


def check_first(first: dict[str, Any]) -> None:
    """The old kernel, before the jump: root, map, blobs."""
    memory = memory_of(first["pages"])
    page = memory.read(first["root"], PAGE)
    root = kexec_handover.decode(page[: fdt_door.blob_size(page)])
    assert (root.format.base, root.map) == ("kho-v4", first["map"])
    assert kexec_handover.map_of(bytes.fromhex(first["cut"])) == first["map"], "as debugfs shows it, cut off"
    blobs = {one.name: memory.read(one.phys, one.size or 0) for one in root.blobs}
    assert set(blobs) == {"LUO", "kexec-metadata", "memblock"}
    header = luo.decode(blobs["LUO"])
    assert (header.format.base, header.number, header.sessions) == ("luo-v5", 1, 0)
    metadata = kexec_metadata.decode(blobs["kexec-metadata"])
    assert metadata
    assert (metadata.previous_release, metadata.kexec_count) == (first["release"], 1)
    assert [(r.name, r.size) for r in memblock.decode(blobs["memblock"])] == [("log", 2 << 20)]
    listed = {folio for leaf in radix_tree.walk(memory, root.map) for folio in leaf.folios()}
    assert listed >= {Folio(pfn, 0) for frames in first["frames"] for pfn in frames}
    assert listed >= {Folio(at >> 12, 0) for at in (first["root"], *(one.phys for one in root.blobs))}
    preserved = of_radix_tree(memory, root.map)
    assert {t.order: t.folios for t in preserved.totals()} == radix_tree.totals(memory, root.map)


def check_second(second: dict[str, Any], frames: list[list[int]]) -> None:
    """The new kernel, before the device was opened: what came."""
    blob = bytes.fromhex(second["fdt"])
    root = kexec_handover.decode(blob[: fdt_door.blob_size(blob)])
    assert {one.name for one in root.blobs} == {"LUO", "kexec-metadata", "memblock"}
    metadata = kexec_metadata.decode(bytes.fromhex(second["metadata"]))
    assert metadata
    assert metadata.kexec_count == 1
    reserved = bytes.fromhex(second["reserved"])
    assert [r.name for r in memblock.decode(reserved)] == ["log"]
    memory = memory_of(second["pages"])
    (session,) = luo.sessions(memory, luo.Header(formats.parse("luo-v5"), 1, second["sessions"], 0))
    assert (session.name, session.count) == (b"golden", FILES)
    files = list(luo.files(memory, session))
    assert [file.token for file in files] == list(range(FILES))
    for file, pfns in zip(files, frames, strict=True):
        found = memfd.decode(str(file.compatible), memory, file.data)
        assert (str(file.compatible), found.size) == ("memfd-v2", PAGE * len(pfns))
        assert [(r.pfn, r.flags, r.page) for r in memfd.folios(memory, found)] == [
            (pfn, memfd.DIRTY | memfd.UPTODATE, n) for n, pfn in enumerate(pfns)
        ]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_what_a_real_kernel_wrote(path: Path) -> None:
    golden = json.loads(path.read_text())
    assert golden["provenance"]["kernel"].startswith(f"Linux version {golden['first']['release']} ")
    check_first(golden["first"])
    check_second(golden["second"], golden["first"]["frames"])


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_inspect_finds_a_real_root_by_itself(path: Path) -> None:
    first = json.loads(path.read_text())["first"]
    made = Made.__new__(Made)
    made.memory = memory_of(first["pages"])
    out = Look(Shown(made)).inspection().outgoing
    assert out
    assert (out.address, out.map, out.kexec_count) == (first["root"], first["map"], 1)
    assert sum(o.bytes for o in out.owners) == sum(t.bytes for t in out.totals)


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_between_serialising_and_the_jump_everything_is_there(path: Path) -> None:
    """Both captures in one memory, as a dump made then would have them: the blocks are in the pages that were preserved for
    them, and the header leads there. The page of FLBs was not captured, which costs nothing else."""
    golden = json.loads(path.read_text())
    first, second = golden["first"], golden["second"]
    made = Made.__new__(Made)
    made.memory = memory_of({**second["pages"], **first["pages"]})
    page = made.memory.read(first["root"], PAGE)
    (header,) = [b.phys for b in kexec_handover.decode(page[: fdt_door.blob_size(page)]).blobs if b.name == "LUO"]
    made.memory.set(header + 16, second["sessions"])
    view = Look(Shown(made)).inspection()
    out = view.outgoing
    assert out
    assert "what files share" in [m.what for m in view.missing]
    assert [(m.session, m.by) for m in out.memfds] == [("golden", KERNEL)] * FILES
    assert [[pfn + n for _, pfn, count in m.extents for n in range(count)] for m in out.memfds] == first["frames"]
    unknown = sum(o.bytes for o in out.owners if o.owner == "unknown")
    assert unknown == 4 * PAGE, "a block of sessions, two of files, a page of FLBs"


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_dtc_reads_the_same_root(path: Path, tmp_path: Path) -> None:
    if not shutil.which("fdtget"):
        pytest.skip("no fdtget (Debian: device-tree-compiler)")
    blob = bytes.fromhex(json.loads(path.read_text())["second"]["fdt"])
    (tmp_path / "root.dtb").write_bytes(blob)
    said = subprocess.run(
        ["fdtget", "-t", "x", tmp_path / "root.dtb", "/", kexec_handover.MAP], capture_output=True, text=True, check=True
    )
    cells = b"".join(int(cell, 16).to_bytes(4, "big") for cell in said.stdout.split())
    assert int.from_bytes(cells, "little") == kexec_handover.decode(blob[: fdt_door.blob_size(blob)]).map
