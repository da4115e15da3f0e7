# SPDX-License-Identifier: LGPL-2.1-or-later
"""Images, processes, clocks, the store: what is left of the machine."""

from __future__ import annotations

from errno import EADDRNOTAVAIL, EINVAL, ENOEXEC
from pathlib import Path

import pytest

from khod import errors
from khod.core.ports import Machine
from tests.contract.rig import Rig


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


@pytest.mark.parametrize("cmdline", ["x" * 2048, "a\0b"])
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
