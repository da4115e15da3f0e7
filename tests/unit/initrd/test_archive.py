# SPDX-License-Identifier: LGPL-2.1-or-later
"""The initrd, judged by cpio, readelf and by running what is in it."""

from __future__ import annotations

import os
import re
import stat
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from khod.abi import cpio, elf
from khod.early import paths, plan
from khod.errors import FormatError, InvalidRequest
from khod.initrd import contents, libraries, modules
from khod.initrd.contents import Spec, Start
from khod.initrd.launcher import launcher
from tests.unit.test_house import tool


def unpacked(archive: bytes, into: Path) -> None:
    subprocess.run([tool("cpio"), "-idm", "--quiet", "--no-absolute-filenames"], input=archive, cwd=into, check=True)


def test_cpio_reads_what_we_write(tmp_path: Path) -> None:
    archive = cpio.archive(
        {"a/b/c": cpio.file(b"words", 0o750), "a/link": cpio.link("b/c"), "empty": cpio.directory(0o700), "z": cpio.file(b"")}
    )
    unpacked(archive, tmp_path)
    assert (tmp_path / "a/link").read_bytes() == b"words"
    assert stat.S_IMODE((tmp_path / "a/b/c").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "empty").stat().st_mode) == 0o700
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty", "z"]
    assert len(archive) % cpio.ALIGNMENT == 0, "another archive may follow"


@pytest.mark.parametrize("path", ["", "/etc", "a/../b", "a//b", "./a", "a/", "a\0b"])
def test_no_member_leaves_the_archive(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        cpio.archive({path: cpio.file(b"")})


def test_the_launcher_is_the_last_that_is_unpacked() -> None:
    archive = contents.build(Spec())
    assert archive.rfind(b"khod/init\0") > archive.rfind(b"sys\0")


def test_a_file_is_no_directory() -> None:
    with pytest.raises(ValueError, match="no directory"):
        cpio.archive({"a": cpio.file(b""), "a/b": cpio.file(b"")})


@pytest.mark.parametrize("program", ["/bin/sh", os.path.realpath(sys.executable)])
def test_linkage_is_what_readelf_says(program: str) -> None:
    said = subprocess.run(["readelf", "-dl", "-W", program], capture_output=True, text=True, check=True).stdout
    data = Path(program).read_bytes()
    found = elf.linkage(data)
    assert list(found.needed) == re.findall(r"\(NEEDED\).*\[(.*)\]", said)
    assert found.interpreter is not None
    at, size = found.interpreter
    assert data[at : at + size - 1].decode() == re.search(r"program interpreter: (.*)\]", said)[1]  # type: ignore[index]


def test_linkage_of_what_is_broken() -> None:
    data = Path("/bin/sh").read_bytes()
    with pytest.raises(FormatError):
        elf.linkage(b"#!/bin/sh")
    for size in range(0, 4096, 64):
        with pytest.raises(FormatError):
            elf.linkage(data[:size])
    # Every byte of the headers, wrong: an answer or an error, and nothing else.
    for at in range(4, 64 + 56 * 12):
        damaged = bytearray(data[:65536])
        damaged[at] ^= 0xFF
        with suppress(FormatError):
            elf.linkage(bytes(damaged))


def test_the_loader_finds_the_libraries_that_we_find() -> None:
    program = os.path.realpath(sys.executable)
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    wanted = {name: os.path.realpath(path) for name, path in re.findall(r"(\S+) => (/\S+)", said)}
    found = libraries.closure([program])
    assert os.path.realpath(found.pop("")) == os.path.realpath(re.search(r"^\s*(/\S*ld-linux\S*)", said, re.M)[1])  # type: ignore[index]
    found.pop("ld-linux-x86-64.so.2", None)
    assert {name: os.path.realpath(path) for name, path in found.items()} == wanted


def test_a_library_that_is_nowhere_is_named(tmp_path: Path) -> None:
    source, library, program = tmp_path / "a.c", tmp_path / "libgone.so", tmp_path / "program"
    source.write_text("int gone(void) { return 0; }")
    subprocess.run(["cc", "-shared", "-o", library, source], check=True)
    (tmp_path / "b.c").write_text("int gone(void); int main(void) { return gone(); }")
    subprocess.run(["cc", "-o", program, tmp_path / "b.c", f"-L{tmp_path}", "-lgone"], check=True)
    with pytest.raises(InvalidRequest, match=r"program needs libgone\.so, which is nowhere"):
        libraries.closure([str(program)])
    subprocess.run(["cc", "-o", program, tmp_path / "b.c", f"-L{tmp_path}", "-lgone", "-Wl,-rpath,$ORIGIN"], check=True)
    assert libraries.closure([str(program)])["libgone.so"] == str(library)


def test_the_launcher_executes_with_its_words_the_time_and_the_kernels_words(tmp_path: Path) -> None:
    program = tmp_path / "launcher"
    program.write_bytes(launcher(["/bin/sh", "-c", 'echo "$W" "$@"', "name"], "/bin/false"))
    program.chmod(0o755)
    done = subprocess.run([program, "a b", "c"], capture_output=True, text=True, check=True, env={"W": "kept"})
    kept, time, *rest = done.stdout.split()
    assert (kept, rest) == ("kept", ["a", "b", "c"])
    from khod.early.stage import _time

    now = int(float(Path("/proc/uptime").read_text().split()[0]) * 1e9)
    assert re.fullmatch("[a-p]{32}", time)
    assert abs(now - _time(time)) < 60e9


def test_the_launcher_becomes_the_hosts_init_where_there_is_no_loader(tmp_path: Path) -> None:
    program = tmp_path / "launcher"
    program.write_bytes(launcher(["/nowhere", "x"], "/bin/echo"))
    program.chmod(0o755)
    done = subprocess.run([program, "quiet", "single"], capture_output=True, text=True, check=True)
    assert done.stdout == "quiet single\n"


def test_the_same_host_the_same_bytes(tmp_path: Path) -> None:
    spec = Spec(starts=(Start(instance="vm-1", command=("/bin/sh", "-c", "true"), files=(str(tmp_path),)),))
    (tmp_path / "b").write_text("2")
    (tmp_path / "a").write_text("1")
    one = contents.build(spec)
    assert contents.build(spec, b"behind") == one + b"behind"


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot is root's")
def test_what_is_in_it_runs_by_itself(tmp_path: Path) -> None:
    unpacked(contents.build(Spec(starts=(Start(instance="vm-1", command=("/bin/sh", "-c", "exit 7")),))), tmp_path)
    done = subprocess.run(["chroot", tmp_path, paths.LAUNCHER], capture_output=True, text=True, check=False)
    assert "is the first process of a kernel" in done.stderr, "the stage was reached, and says that this is no place for it"
    vmm = subprocess.run(["chroot", tmp_path / paths.VMM.lstrip("/"), "/bin/sh", "-c", "exit 7"], check=False)
    assert vmm.returncode == 7
    (start,) = plan.read((tmp_path / paths.PLAN.lstrip("/")).read_bytes()).starts
    assert (start.owner, start.name, start.command) == ("user:root", "vm-1", ["/bin/sh", "-c", "exit 7"])


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot is root's")
def test_with_several_instances_there_are_the_drivers_and_nothing_of_openssl(tmp_path: Path) -> None:
    alone, several = (Start(instance="vm-1", command=("/bin/true",), also=also) for also in ((), ("edu", "mappings")))
    assert not any("khod/core" in name for name in contents.members(Spec(starts=(alone,))))
    found = contents.members(Spec(starts=(several,), restoring=(7.5, 1 << 20)))
    assert not any("crypto" in name or "numpy" in name or "/rich/" in name for name in found)
    unpacked(contents.archive(found), tmp_path)
    code = (
        "import asyncio, sys; from khod import driven; from khod.core.blocking import blocking; from khod.early import plan;"
        "wanted = plan.read(open('/khod/plan', 'rb').read());"
        "print(*driven.plugins(wanted).names(), *wanted.restoring, *wanted.starts[0].also, asyncio.run(blocking(len, 'four')))"
    )
    inside = ["chroot", str(tmp_path), *paths.INTERPRETER]
    done = subprocess.run([*inside, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "guestmemfd iommu vfio 7.5 1048576 edu mappings 4\n", done.stderr
    # Where nobody serves it starts nobody, and says so to whoever waits for it.
    (program,) = tmp_path.glob("khod/lib/python*/khod/driven.pyc")
    assert subprocess.run([*inside, f"/{program.relative_to(tmp_path)}"], check=False).returncode == 1


@pytest.mark.parametrize(
    ("start", "says"),
    [
        (Start(instance="v", command=("/nowhere/vmm",)), "/nowhere/vmm"),
        (Start(instance="v", command=("vmm",)), "absolute path"),
        (Start(instance="v", command=("/bin/sh",), files=("/nowhere",)), "/nowhere"),
        (Start(instance="v", command=("/bin/sh", "a\nb")), "end of a line"),
    ],
)
def test_a_vmm_that_cannot_be_there_is_no_initrd(start: Start, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        contents.build(Spec(starts=(start,)))


def test_modules_in_the_order_of_loading(tmp_path: Path) -> None:
    tree = tmp_path / "7.3.4"
    tree.mkdir()
    (tree / "modules.dep").write_text(
        "kernel/vfio-pci.ko.zst: kernel/vfio-pci-core.ko.zst kernel/vfio.ko.zst\n"
        "kernel/vfio-pci-core.ko.zst: kernel/vfio.ko.zst\n"
        "kernel/vfio.ko.zst:\n"
    )
    (tree / "modules.builtin").write_text("kernel/iommufd.ko\n")
    found = modules.order(["vfio_pci", "iommufd"], "7.3.4", tmp_path)
    assert [p.name for p in found] == ["vfio.ko.zst", "vfio-pci-core.ko.zst", "vfio-pci.ko.zst"]
    with pytest.raises(InvalidRequest, match="no module 'nvme'"):
        modules.order(["nvme"], "7.3.4", tmp_path)
    with pytest.raises(InvalidRequest, match=r"7\.9"):
        modules.order(["vfio"], "7.9", tmp_path)
