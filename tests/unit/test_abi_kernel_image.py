# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.abi.kernel_image and what it is made of: images packed by the programs that kernels are packed by, the lab's own kernel
read by other means, and hostile ones."""

from __future__ import annotations

import struct
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from khod.abi import bzimage, compression, elf, formats, ikconfig, kernel_image
from khod.errors import FormatError
from tests import images
from tests.unit.test_house import tool
from tests.vm.kernel import kernel_directory

LAB = kernel_directory()
needs_lab = pytest.mark.skipif(not (LAB / "bzImage").exists(), reason="the lab's kernel is not built")


def packed(kernel: bytes, method: str) -> bytes:
    tool(images.PROGRAMS[method][0])
    return images.pack(kernel, method)


def texts(found: kernel_image.KernelImage) -> list[str]:
    return [str(f) for f in found.formats]


@pytest.mark.parametrize("method", images.PROGRAMS)
def test_every_compression_of_kernels_is_read(method: str) -> None:
    kernel = images.vmlinux()
    image = images.bzimage(kernel, method, packed=packed(kernel, method))
    found = kernel_image.read(image)
    assert (found.kind, found.machine, found.release, found.compression) == ("bzImage", "x86-64", "7.3.4", method)
    assert texts(found) == ["kho-v4", "luo-v5", "memblock-v1", "memfd-v2", "reserve-mem-v1"]
    assert found.config == {"CONFIG_KEXEC_HANDOVER": "y", "CONFIG_LIVEUPDATE": "y", "CONFIG_LIVEUPDATE_MEMFD": "y"}


@pytest.mark.parametrize("method", images.PROGRAMS)
def test_more_than_one_block_and_what_follows_the_stream(method: str) -> None:
    """Larger than the blocks of lz4 (8 MiB) and lzo (256 KiB), in part incompressible, then padding as in a patched image."""
    kernel = bytes(range(256)) * 36_000 + Random(5).randbytes(300_000)
    stream = packed(kernel, method)
    assert compression.method(stream) == method
    assert compression.decompress(stream + bytes(64), len(kernel)) == kernel


@pytest.mark.parametrize("method", images.PROGRAMS)
def test_no_more_comes_out_than_there_is_room_for(method: str) -> None:
    bomb = packed(bytes(4 << 20), method)
    with pytest.raises(FormatError, match=f"{method} stream holds more than the 1048576 bytes"):
        compression.decompress(bomb, 1 << 20)
    image = images.bzimage(bytes(4 << 20), method, packed=bomb, init_size=1 << 20)
    with pytest.raises(FormatError, match="holds more than"):
        kernel_image.read(image)


@pytest.mark.parametrize("method", images.PROGRAMS)
def test_a_stream_that_was_cut_off(method: str) -> None:
    kernel = images.vmlinux()
    stream = packed(kernel, method)
    with pytest.raises(FormatError, match=rf"{method} stream (ends before|is damaged)"):
        compression.decompress(stream[: len(stream) // 2], len(kernel))


def test_an_image_that_was_cut_off_says_so() -> None:
    image = images.bzimage(images.vmlinux())
    with pytest.raises(FormatError, match=r"cut off: its kernel ends at byte \d+, the file at 17200"):
        kernel_image.read(image[:17200])


def test_a_vmlinux_and_the_list_that_it_may_carry() -> None:
    found = kernel_image.read(images.vmlinux(release="7.5.0-rc1", config=None))
    assert (found.kind, found.release, found.config, found.header, found.listed) == ("vmlinux", "7.5.0-rc1", None, None, False)
    listed = kernel_image.read(images.vmlinux(["kho-v4"], [], versions=["luo-v6", "memfd-v3", "vfio-pci-v1"]))
    assert texts(listed) == ["kho-v4", "luo-v6", "memfd-v3", "vfio-pci-v1"]
    assert listed.listed


def test_a_list_of_versions_that_is_none() -> None:
    kernel = bytearray(images.vmlinux(versions=["luo-v5"]))
    at = kernel.index(struct.pack("<II", 0x4C565550, 1))
    kernel[at + 4] = 2
    with pytest.raises(FormatError, match="version 2, which we do not know"):
        kernel_image.read(bytes(kernel))
    kernel[at + 4] = 1
    kernel[at + 8 : at + 9] = b"\xff"
    with pytest.raises(FormatError, match="not the name of a format"):
        kernel_image.read(bytes(kernel))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "ends after 0 bytes"),
        (b"\x7fELF\x01\x01\x01" + bytes(64), "64 bits"),
        (b"\x7fELF\x02\x02\x01" + bytes(64), "little-endian"),
        (b"#!/bin/sh\n" * 4000, "no kernel header"),
        (images.bzimage(b"\x7fELF no", "gzip", packed=b"not compressed at all"), "in no way that kernels are"),
        (images.bzimage(b"#!/bin/sh\n" * 100), "no ELF file"),
    ],
)
def test_files_that_are_no_kernels(data: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        kernel_image.read(data)


def patched(kernel: bytes, at: int, value: bytes) -> bytes:
    return kernel[:at] + value + kernel[at + len(value) :]


@pytest.mark.parametrize(
    ("at", "value", "words"),
    [
        (32, b"\xff" * 8, "program headers|beyond the end"),
        (40, b"\xff" * 8, "beyond the end"),
        (54, b"\x01", "make no sense"),
        (60, b"\xff\xff", "make no sense"),
        (62, b"\xff\xff", "none of"),
        (64 + 8, b"\xff" * 8, "segment: .* beyond the end"),
    ],
)
def test_an_elf_file_whose_headers_lead_out_of_it(at: int, value: bytes, words: str) -> None:
    with pytest.raises(FormatError, match=words):
        elf.parse(patched(images.vmlinux(), at, value))


def test_a_configuration_without_an_end_or_damaged() -> None:
    with pytest.raises(FormatError, match="no end"):
        ikconfig.find(b"IKCFG_ST\x1f\x8b")
    with pytest.raises(FormatError, match="configuration: its gzip stream"):
        ikconfig.find(b"IKCFG_ST\x1f\x8bIKCFG_ED")
    assert ikconfig.find(b"nothing") is None
    assert ikconfig.parse('# CONFIG_A is not set\nCONFIG_B=m\nCONFIG_C="x y"\n') == {"CONFIG_B": "m", "CONFIG_C": "x y"}


def test_a_signature_is_seen_in_the_pe_header() -> None:
    head = bytearray(0x200)
    head[:2] = b"MZ"
    struct.pack_into("<I", head, 0x3C, 0x40)
    head[0x40:0x44] = b"PE\0\0"
    head[0x58:0x5A] = b"\x0b\x02"
    struct.pack_into("<I", head, 0x58 + 108, 6)
    assert bzimage.signature(bytes(head)) is False
    struct.pack_into("<II", head, 0x58 + 144, 0x1000, 0x800)
    assert bzimage.signature(bytes(head)) is True
    assert bzimage.signature(images.bzimage(images.vmlinux())) is None


MUTATED = (images.bzimage(images.vmlinux(fill=512)), images.vmlinux(fill=512, versions=["luo-v5", "memfd-v2"]))


@settings(max_examples=300, deadline=None)
@given(
    which=st.sampled_from(MUTATED),
    changes=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=8),
    cut=st.integers(0, 1 << 16),
)
def test_mutated_images_raise_format_errors_only(which: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    image = bytearray(which[: len(which) - cut % len(which)] if cut % 3 == 0 else which)
    for at, value in changes:
        image[at % len(image)] = value
    with suppress(FormatError):
        kernel_image.read(bytes(image))


@settings(max_examples=60, deadline=None)
@given(
    method=st.sampled_from(sorted(images.PROGRAMS)),
    changes=st.lists(st.tuples(st.integers(0, 4096), st.integers(0, 255)), min_size=1, max_size=4),
)
def test_mutated_streams_raise_format_errors_only(method: str, changes: list[tuple[int, int]]) -> None:
    stream = bytearray(STREAMS.get(method, b""))
    if not stream:
        return
    for at, value in changes:
        stream[at % len(stream)] = value
    with suppress(FormatError):
        assert len(compression.decompress(bytes(stream), 1 << 20)) <= 1 << 20


def _streams() -> Iterator[tuple[str, bytes]]:
    kernel = images.vmlinux(fill=2048)
    for method in images.PROGRAMS:
        try:
            yield method, images.pack(kernel, method)
        except FileNotFoundError:
            continue


STREAMS = dict(_streams())


@needs_lab
def test_the_lab_s_kernel_is_what_its_build_says() -> None:
    """Configuration and release against the files of the build, the payload against zstd(1), the formats against strings(1)."""
    data = (LAB / "bzImage").read_bytes()
    found = kernel_image.read(data)
    assert found.release == (LAB / "release").read_text().strip()
    assert found.config == ikconfig.parse((LAB / "config").read_text())
    assert (found.compression, found.machine) == ("zstd", "x86-64")
    assert texts(found) == ["kho-v4", "luo-v5", "memblock-v1", "memfd-v2", "reserve-mem-v1"]
    zstd = tool("zstd")
    payload = data[data.index(b"\x28\xb5\x2f\xfd") :]  # as scripts/extract-vmlinux looks for it
    done = subprocess.run([zstd, "-q", "-dc"], input=payload, capture_output=True, timeout=60)
    header = bzimage.parse(data)
    ours = compression.decompress(bzimage.payload(data, header), header.init_size)
    assert done.stdout == ours


@needs_lab
def test_the_lab_s_kernel_with_another_format(tmp_path: Path) -> None:
    """As its own test kernels are made: one string changed in the uncompressed kernel, then packed again."""
    data = (LAB / "bzImage").read_bytes()
    header = bzimage.parse(data)
    kernel = compression.decompress(bzimage.payload(data, header), header.init_size)
    other = kernel.replace(b"\0luo-v5\0", b"\0luo-v9\0").replace(b"memfd-v2\0", b"memfd-v7\0")
    found = kernel_image.read(images.bzimage(other, "lz4", packed=packed(other, "lz4"), release="7.3.4"))
    assert texts(found) == ["kho-v4", "luo-v9", "memblock-v1", "memfd-v7", "reserve-mem-v1"]
    compared = {c.name: c.outcome for c in formats.compare_all(kernel_image.read(data).formats, found.formats)}
    assert (compared["kho"], compared["luo"], compared["memfd"]) == ("fine", "panic", "dead")
