# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images, processes, clocks, the store: what is left of the machine."""

from __future__ import annotations

import os
from errno import EADDRNOTAVAIL, EINVAL, ENOEXEC
from pathlib import Path

import pytest

from khod import errors
from khod.abi import bzimage, kernel_image
from khod.abi.placement import place, segments
from khod.core.ports import Machine
from khod.folio.units import merged
from tests.contract.rig import Rig

MIB = 1 << 20


def test_an_image_is_opened_loaded_and_dropped(rig: Rig, host: Machine) -> None:
    image = host.kexec.open(rig.kernel_image())
    assert image.cmdline == host.kexec.running_cmdline()
    assert image.size == Path(image.kernel).stat().st_size
    assert not host.kexec.loaded()
    host.kexec.load(image)
    assert host.kexec.loaded()
    for _ in range(2):
        host.kexec.unload()
        assert not host.kexec.loaded()
    host.kexec.release(image)


def test_jumping_without_an_image(host: Machine) -> None:
    with pytest.raises(errors.NothingLoaded) as refused:
        host.kexec.execute()
    assert refused.value.errno == EINVAL


def test_files_that_are_no_kernel(host: Machine, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no kernel\n" * 1000)
    with pytest.raises(errors.NotAKernel) as refused:
        host.kexec.open(str(tmp_path / "text"))
    assert refused.value.errno == ENOEXEC
    for path in ("missing", "."):
        with pytest.raises(errors.InvalidRequest):
            host.kexec.open(str(tmp_path / path))


@pytest.mark.parametrize("cmdline", ["x" * 2017, "a\0b"])
def test_command_lines_that_the_kernel_does_not_take(rig: Rig, host: Machine, cmdline: str) -> None:
    with pytest.raises(errors.ImageInvalid) as refused:
        host.kexec.open(rig.kernel_image(), cmdline=cmdline)
    assert refused.value.errno == EINVAL


def test_an_image_that_changed(rig: Rig, host: Machine, tmp_path: Path) -> None:
    path = tmp_path / "copy"
    path.write_bytes(Path(rig.kernel_image()).read_bytes())
    image = host.kexec.open(str(path))
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(errors.Refused):
        host.kexec.load(image)
    assert not host.kexec.loaded()
    host.kexec.release(image)


def test_an_initrd_that_fits_no_scratch_area(rig: Rig, host: Machine, tmp_path: Path) -> None:
    largest = max(region.end - region.start for region in host.memory.scratch())
    with open(tmp_path / "initrd", "wb") as file:
        file.truncate(largest + 4096)
    image = host.kexec.open(rig.kernel_image(), str(tmp_path / "initrd"))
    with pytest.raises(errors.ImageTooLarge) as refused:
        host.kexec.load(image)
    assert refused.value.errno == EADDRNOTAVAIL
    assert not host.kexec.loaded()
    host.kexec.release(image)


def test_the_largest_initrd_that_can_be_placed_is_loaded_and_a_larger_one_is_not(
    rig: Rig, host: Machine, tmp_path: Path
) -> None:
    """`khod.abi.placement` says beforehand what the kernel does. Its small pieces are larger than they are: hence 2 MiB."""
    kernel, initrd, areas = Path(rig.kernel_image()), tmp_path / "initrd", host.kernel.facts().scratch
    with kernel.open("rb") as file:
        header = bzimage.parse(file.read(bzimage.HEADER_SIZE))

    def fits(size: int) -> bool:
        cmdline = len(host.kexec.running_cmdline())
        return all(placed.at for placed in place(areas, segments(header, len(areas), cmdline, size)))

    largest = max(size for size in range(0, max(area.end - area.start for area in areas), MIB) if fits(size))
    assert largest
    initrd.touch()
    for size, loaded in ((largest, True), (largest + 2 * MIB, False)):
        os.truncate(initrd, size)
        image = host.kexec.open(str(kernel), str(initrd))
        if loaded:
            host.kexec.load(image)
            host.kexec.unload()
        else:
            with pytest.raises(errors.ImageTooLarge):
                host.kexec.load(image)
        host.kexec.release(image)


def test_the_facts_of_the_kernel_agree_with_what_else_is_said_of_it(rig: Rig, host: Machine) -> None:
    facts = host.kernel.facts()
    assert facts.cmdline == host.kexec.running_cmdline()
    assert merged(area for area in facts.scratch if area.start < area.end) == host.memory.scratch()
    assert {"kho", "luo", "memfd"} <= {found.name for found in facts.formats}, facts.formats_source
    assert facts.config is not None
    assert facts.config["CONFIG_LIVEUPDATE"] == "y"
    assert (facts.machine, facts.load_disabled, facts.loads_left, facts.lacking) == ("x86-64", False, None, ())
    # Of a kernel and of its own image the same is found.
    image = kernel_image.read(Path(rig.kernel_image()).read_bytes())
    assert set(facts.formats) == set(image.formats)


def test_a_descriptor_is_taken_from_another_process(rig: Rig, host: Machine) -> None:
    with rig.client(b"guest memory") as (pid, number):
        assert pid in {process.pid for process in host.processes.listing()}
        fd = host.processes.descriptor(pid, number)
        with pytest.raises(errors.InvalidRequest):
            host.processes.descriptor(pid, 999)
    assert host.files.read(fd, 0, 12) == b"guest memory"  # its owner is gone, the file is not
    with pytest.raises(errors.InvalidRequest):
        host.processes.descriptor(pid, number)
    assert pid not in {process.pid for process in host.processes.listing()}


def test_the_store_keeps_what_was_appended(host: Machine) -> None:
    assert host.store.read() == b""
    host.store.append(b"one")
    host.store.append(b"two")
    assert host.store.read() == b"onetwo"
    host.store.cut(4)
    host.store.append(b"!")
    assert host.store.read() == b"onet!"


def test_clocks_run_forward_and_boots_do_not_change(host: Machine) -> None:
    first, second = host.clock.stamp(), host.clock.stamp()
    assert first.monotonic <= second.monotonic and first.tsc <= second.tsc
    assert first.realtime > 1_500_000_000 * 10**9
    assert host.boot.boot() == host.boot.boot()
    assert host.boot.boot().boot_id
    host.filesystems.sync()
