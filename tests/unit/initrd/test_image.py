# SPDX-License-Identifier: LGPL-2.1-or-later
"""The port Kexec with the stage in front: which initrd, which command line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from khod.abi import cpio
from khod.config import Config, Initrd
from khod.core.ports import Kexec
from khod.early import paths
from khod.errors import InvalidRequest, NotAKernel, Refused
from khod.initrd import contents
from khod.initrd.image import FILE, JumpImages, spec, with_stage, without_stage
from khod.kernel.kexec import KernelKexec
from khod.simulated.image import build

STAGE = "rdinit=/khod/init"


@pytest.fixture
def kernel(tmp_path: Path) -> str:
    path = tmp_path / "bzImage"
    path.write_bytes(build())
    return str(path)


def packed(early: bytes, files: dict[str, bytes]) -> bytes:
    """An initrd as distributions make them: an archive that is read early, and a compressed one."""
    first = cpio.archive({"kernel/x86/microcode": cpio.file(early)})
    second = cpio.archive({name: cpio.file(content) for name, content in files.items()})
    return first + bytes(512) + gzip.compress(second)


def images(use: str, tmp_path: Path) -> Kexec:
    return JumpImages(KernelKexec(), Config(initrd=Initrd(use=use)), tmp_path / "state")


def test_words_of_the_init_stay_the_last() -> None:
    assert with_stage("root=/dev/vda quiet -- single") == f"root=/dev/vda quiet {STAGE} -- single"
    assert with_stage("") == STAGE
    assert without_stage(with_stage("a -- b")) == "a -- b"


def test_not_asked_for_nothing_is_built(tmp_path: Path, kernel: str) -> None:
    kexec = images("none", tmp_path)
    image = kexec.open(kernel, "", f"root=/dev/vda {STAGE}")
    assert (image.initrd, image.cmdline) == ("", f"root=/dev/vda {STAGE}"), "what somebody says stays as he says it"
    kexec.release(image)
    assert not (tmp_path / "state").exists()


def test_built_in_front_of_the_hosts_own(tmp_path: Path, kernel: str) -> None:
    own = tmp_path / "own"
    own.write_bytes(b"the host's own")
    kexec = images("build", tmp_path)
    image = kexec.open(kernel, str(own), "root=UUID=1 -- single")
    assert image.cmdline == f"root=UUID=1 {STAGE} -- single"
    built = Path(image.initrd).read_bytes()
    assert built == contents.build(spec(Config(), "7.3.0")) + b"the host's own"
    assert image.size == len(built) + Path(kernel).stat().st_size
    again = kexec.open(kernel, str(own), image.cmdline)
    assert again.cmdline == image.cmdline, "named once"
    assert again.sha256 == image.sha256
    kexec.release(again)
    kexec.release(image)
    assert [p.name for p in (tmp_path / "state").iterdir()] == [FILE]


def test_without_an_initrd_the_stage_must_find_the_root_by_itself(tmp_path: Path, kernel: str) -> None:
    kexec = images("build", tmp_path)
    for root in ("", "root=UUID=0815", "root=/dev/nfs0 root=LABEL=x"):
        with pytest.raises(Refused, match="cannot go on with the boot"):
            kexec.open(kernel, "", f"quiet {root}")
    for root in ("/dev/vda1", "PARTUUID=0815-01", "254:1"):
        kexec.release(kexec.open(kernel, "", f"root={root}"))


def test_what_is_no_kernel_is_found_before_anything_is_built(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("text")
    kexec = images("build", tmp_path)
    with pytest.raises(NotAKernel):
        kexec.open(str(tmp_path / "text"), "", "root=/dev/vda")
    with pytest.raises(InvalidRequest):
        kexec.open(str(tmp_path / "absent"), "", "root=/dev/vda")
    assert not (tmp_path / "state").exists()


def test_an_initrd_that_has_the_stage_is_only_named(tmp_path: Path, kernel: str) -> None:
    own = tmp_path / "own"
    own.write_bytes(packed(b"microcode", {"khod/init": b"", "init": b""}))
    kexec = images("host", tmp_path)
    image = kexec.open(kernel, str(own), "root=UUID=1")
    assert (image.initrd, image.cmdline) == (str(own), f"root=UUID=1 {STAGE}")
    kexec.release(image)
    with pytest.raises(Refused, match="no initrd is named"):
        kexec.open(kernel, "", "root=UUID=1")


@pytest.mark.parametrize("data", [b"", b"text", b"070701", b"\x1f\x8b" + bytes(20)])
def test_an_initrd_without_the_stage_is_refused(tmp_path: Path, kernel: str, data: bytes) -> None:
    own = tmp_path / "own"
    for content in (data, packed(b"microcode", {"init": b"x"})):
        own.write_bytes(content)
        with pytest.raises(Refused, match=r"stage|no initrd whose contents"):
            images("host", tmp_path).open(kernel, str(own), "root=UUID=1")


def test_the_path_is_the_launchers() -> None:
    assert f"rdinit={paths.LAUNCHER}" == STAGE
