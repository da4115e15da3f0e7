# SPDX-License-Identifier: LGPL-2.1-or-later
"""The whole stage as process 1, in namespaces of its own: the boot goes on whatever is wrong. There is no live update here;
tests/vm/test_initrd.py has it with one."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from khod import early
from khod.early import paths, restore
from khod.initrd import closure, contents
from khod.initrd.contents import Spec, Start
from tests.unit.test_house import tool

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and chroot are root's")]

ROOT = Path(__file__).parents[3]
INIT = r"""
#include <fcntl.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	struct stat found;

	printf("%d", getpid());
	for (int i = 0; i < argc; i++)
		printf(" %s", argv[i]);
	printf(" %s", stat("/proc/self", &found) ? "bare" : "mounted");
	puts(stat("/lock", &found) || !flock(open("/lock", O_RDWR), LOCK_EX | LOCK_NB) ? "" : ", and somebody is still at work");
	return 0;
}
"""


@pytest.fixture(scope="module")
def initrd() -> bytes:
    return contents.build(Spec(starts=(Start(instance="vm-1", command=("/bin/sh", "-c", "exit 7")),)))


@pytest.fixture
def root(tmp_path: Path, initrd: bytes) -> Path:
    """The initrd, unpacked, over it a host's own."""
    place = tmp_path / "root"
    place.mkdir()
    subprocess.run([tool("cpio"), "-idm", "--quiet", "--no-absolute-filenames"], input=initrd, cwd=place, check=True)
    (tmp_path / "init.c").write_text(INIT)
    subprocess.run(["cc", "-static", "-o", place / "init", tmp_path / "init.c"], check=True)
    return place


def boot(root: Path) -> str:
    """What the host's init says, which the kernel gave two words."""
    apart = ["unshare", "--pid", "--fork", "--mount", "--propagation", "private", "chroot", str(root)]
    argv = [*apart, paths.LAUNCHER, "quiet", "single"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


WENT_ON = "1 /init quiet single bare\n"
"""Process 1, with the kernel's words, and nothing mounted that it would be refused to mount."""


def test_the_hosts_init_goes_on_with_what_the_kernel_gave(root: Path) -> None:
    assert boot(root) == WENT_ON


PLANS = {
    "empty": b"",
    "nothing of ours": b"khod-plan 1\nnothing of ours\n",
    "noise": random.Random(6).randbytes(4096),
    "none": None,
}


@pytest.mark.parametrize("data", PLANS.values(), ids=PLANS)
def test_without_a_plan(root: Path, data: bytes | None) -> None:
    path = root / paths.PLAN.lstrip("/")
    path.unlink() if data is None else path.write_bytes(data)
    assert boot(root) == WENT_ON


@pytest.mark.parametrize("module", ["custodian", "restore", "tree", "record"])
def test_without_a_module_of_its_own(root: Path, module: str) -> None:
    (found,) = root.glob(f"khod/lib/python*/khod/early/{module}.pyc")
    found.unlink()
    assert boot(root) == WENT_ON


@pytest.mark.parametrize("says", ["_os.kill(_os.getpid(), 9)", "raise RuntimeError('a bug')", "import nothing_of_the_kind"])
def test_the_end_of_the_child(root: Path, tmp_path: Path, says: str) -> None:
    (found,) = root.glob("khod/lib/python*/khod/early/restore.pyc")
    patched = tmp_path / "restore.py"
    patched.write_text(f"{Path(str(restore.__file__)).read_text()}\nimport os as _os\n{says}\n")
    found.write_bytes(closure._compiled(str(patched)))
    assert boot(root) == WENT_ON


@pytest.mark.parametrize(
    ("does", "first"),
    [
        ("print('the drivers', flush=True)", "the drivers\n"),
        ("print('begun', flush=True); os.kill(os.getpid(), 9)", "begun\n"),
        ("fcntl.flock(os.open('/lock', os.O_CREAT), fcntl.LOCK_EX); print('begun', flush=True); signal.pause()", "begun\n"),
        ("", ""),
    ],
)
def test_the_boot_goes_on_when_the_drivers_are_done_dead_or_late(root: Path, tmp_path: Path, does: str, first: str) -> None:
    (library,) = root.glob("khod/lib/python*/khod")
    written = tmp_path / "written.py"
    there_are_some = "\nRestore.run = lambda self: setattr(self, 'more', True)\n"
    for name, more in (("restore", there_are_some), ("stage", "")):
        source = (Path(str(early.__file__)).parent / f"{name}.py").read_text()
        written.write_text(source.replace("PATIENCE = 120.0", "PATIENCE = 25.0") + more)
        (library / "early" / f"{name}.pyc").write_bytes(closure._compiled(str(written)))
    if does:
        written.write_text(f"import fcntl, os, _signal as signal\n{does}\n")
        (library / "driven.pyc").write_bytes(closure._compiled(str(written)))
    assert boot(root).startswith(first + WENT_ON)


def test_without_a_loader(root: Path) -> None:
    (root / paths.LOADER.lstrip("/")).unlink()
    assert boot(root) == WENT_ON


def test_a_vmm_outlives_the_root_that_it_was_started_from(tmp_path: Path) -> None:
    """systemd moves to the root file system by pivot_root(2), and detaches the old root with all that is mounted below it."""
    place = tmp_path / "root"
    place.mkdir()
    needed = ("/usr/bin/sleep",)
    data = contents.build(Spec(starts=(Start(instance="vm-1", command=("/bin/sh",), files=needed),)))
    subprocess.run([tool("cpio"), "-idm", "--quiet", "--no-absolute-filenames"], input=data, cwd=place, check=True)
    script = f"mount --bind {place} {place} && exec {sys.executable} -m tests.unit.early.switching {place}"
    argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--propagation", "private", "sh", "-c", script]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=60, cwd=ROOT)
    assert done.stdout == "old\nnew\n", done.stderr
