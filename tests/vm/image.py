# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's host: a Debian sid root file system with systemd, and khod installed in it as an administrator would.

Built in two layers, since the second changes with every change of khod's source and takes seconds::

    python -m tests.vm.image          # build if need be; the last line is the path of the disk image

Cache layout, below ``${XDG_CACHE_HOME:-~/.cache}/khod-lab``, each entry made under a temporary name and renamed::

    image-base-<hash of the recipe, the packages and khod's dependencies>/{root/,packages}
    image-<hash of the above, khod's source, the lab's own files and the kernel>/root.img

The machine's own package sources stay untouched: their address for Debian is used with the suite sid. khod's dependencies
come as wheels for the image's Python, fetched by this host's pip.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from tests.vm import kernel as lab_kernel

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FILES = HERE / "files"
SUITE = "sid"
PACKAGES = ("systemd", "systemd-sysv", "libbpf1", "dbus", "python3", "python3-systemd")
DISK = "1536M"
KEPT = 4
"""Images of other sources that stay in the cache, newest first."""
RECIPE = 1
"""Raised when a change of this file changes what is built."""
MACHINES = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
MASKED = (
    # Nobody logs in, and nothing here is to start in the middle of a measurement.
    "getty@tty1.service", "serial-getty@ttyS0.service", "getty-static.service",
    "apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer", "systemd-tmpfiles-clean.timer",
    # What they would set up is not there, or is there already.
    "ldconfig.service", "systemd-binfmt.service", "proc-sys-fs-binfmt_misc.automount", "systemd-firstboot.service",
    "systemd-journal-catalog-update.service", "systemd-update-done.service", "systemd-pstore.service",
    "systemd-hibernate-clear.service", "systemd-machine-id-commit.service", "kmod-static-nodes.service",
    "sys-fs-fuse-connections.mount", "sys-kernel-config.mount", "sys-kernel-tracing.mount", "dev-mqueue.mount",
    "systemd-ask-password-console.path", "systemd-ask-password-wall.path", "imports.target", "modprobe@.service",
)  # fmt: skip
ENABLED = ("khod.service", "khod-lab.service", "khod-lab.socket")


def image_directory() -> Path:
    """Where the image of this checkout is, or will be once built."""
    return lab_kernel.cache() / f"image-{_key(_base_key(), lab_kernel.kernel_directory().name, *_contents())}"


def build() -> Path:
    """Build the image unless it is cached; return its directory. Two callers at once: the second waits for the first.

    Raises SystemExit when a step fails, or the kernel is not built."""
    target = image_directory()
    with open(lab_kernel.cache() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "root.img").exists():
            base = lab_kernel.cache() / f"image-base-{_base_key()}"
            if not base.exists():
                with tempfile.TemporaryDirectory(prefix="build-", dir=lab_kernel.cache()) as work:
                    _build_base(Path(work), base)
            with tempfile.TemporaryDirectory(prefix="build-", dir=lab_kernel.cache()) as work:
                _build_image(Path(work), base, target)
        os.utime(target)
        _prune(target)
    return target


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _base_key() -> str:
    return _key(str(RECIPE), SUITE, *PACKAGES, *_dependencies())


def _dependencies() -> list[str]:
    """What khod needs at run time, as its pyproject.toml says."""
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def _needed(python: str) -> list[str]:
    """What of it that Python needs: pip judges markers by the Python that it runs on, whatever it fetches for."""
    requirements = [Requirement(text) for text in _dependencies()]
    here = {"python_version": python, "python_full_version": f"{python}.0"}
    return [f"{r.name}{r.specifier}" for r in requirements if not r.marker or r.marker.evaluate(here)]


def _contents() -> Iterable[str]:
    """Names and contents of all that is put into the second layer."""
    paths = [ROOT / "pyproject.toml", HERE / "agent.py", *FILES.iterdir(), *(ROOT / "systemd").rglob("*")]
    for tree in ("khod", "plugins"):
        paths += [p for p in (ROOT / tree).rglob("*") if p.suffix in {".py", ".typed", ".varlink"}]
    for path in sorted(paths):
        if path.is_file():
            yield str(path.relative_to(ROOT))
            yield path.read_text()
    yield " ".join([*MASKED, *ENABLED, DISK])


def _build_base(work: Path, target: Path) -> None:
    """Debian, and khod's dependencies."""
    say(f"building the lab's host: Debian {SUITE}, half a minute, then cached in {target}")
    uri, keyring = lab_kernel.debian_mirror()
    root = work / "ready" / "root"
    root.parent.mkdir()
    _run(
        ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(PACKAGES)}",
         "--aptopt=Acquire::Check-Valid-Until \"false\"", *([f"--keyring={keyring}"] if keyring else []), SUITE, root, uri]
    )  # fmt: skip
    python = _inside(root, "python3", "-c", "import sys; print('%d.%d' % sys.version_info[:2])").strip()
    wheels = root / "wheels"
    say(f"fetching khod's dependencies for Python {python}")
    _run(
        [*_pip(), "download", "-d", wheels, "--python-version", python, *(f"--platform={m}" for m in MACHINES),
         "--only-binary=:all:", "pip", *(need := _needed(python))]
    )  # fmt: skip
    _install(root, *need)
    for wheel in wheels.iterdir():
        if not wheel.name.startswith("pip-"):
            wheel.unlink()
    (root.parent / "packages").write_text(_inside(root, "dpkg-query", "-W"))
    root.parent.rename(target)


def _build_image(work: Path, base: Path, target: Path) -> None:
    """khod's wheel and units, and the lab's own files, on a copy of the base; all of it in a file system."""
    say(f"building the lab's image: a few seconds, then cached in {target}")
    root, ready = work / "root", work / "ready"
    ready.mkdir()
    _run(["cp", "-a", base / "root", root])
    _run([*_pip(), "wheel", "--no-deps", "-w", root / "wheels", _source(work)])
    _install(root, "--no-deps", "khod")
    shutil.rmtree(root / "wheels")
    units = root / "usr/lib/systemd/system"
    for unit in FILES.glob("khod-lab.*"):
        shutil.copy(unit, units)
    (root / "usr/lib/khod-lab").mkdir()
    shutil.copy(HERE / "agent.py", root / "usr/lib/khod-lab")
    (root / "etc/khod").mkdir()
    shutil.copy(FILES / "khod.yaml", root / "etc/khod")
    shutil.copy(lab_kernel.kernel_directory() / "bzImage", root / "boot")
    (root / "etc/hostname").write_text("khod-lab\n")
    (root / "etc/machine-id").write_text(_key("machine")[:16] * 2 + "\n")
    # The journal is the host's memory of the last kernel.
    (root / "var/log/journal").mkdir(exist_ok=True)
    _inside(root, "systemd-sysusers")
    _inside(root, "systemctl", "--quiet", "mask", *MASKED)
    _inside(root, "systemctl", "--quiet", "enable", *ENABLED)
    _inside(root, "systemctl", "--quiet", "set-default", "multi-user.target")
    _run(["mke2fs", "-q", "-t", "ext4", "-d", root, ready / "root.img", DISK])
    ready.rename(target)


def _source(work: Path) -> Path:
    """A copy of what the wheel is made of: building in the checkout would leave traces there."""
    source = work / "source"
    source.mkdir()
    for name in ("khod", "plugins", "systemd"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "COPYING"):
        shutil.copy(ROOT / name, source)
    return source


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def _install(root: Path, *what: str) -> None:
    """Install from /wheels where Debian's own packages go, by the pip that lies there: the image has none."""
    (pip,) = (root / "wheels").glob("pip-*.whl")
    _inside(
        root, "env", "DEB_PYTHON_INSTALL_LAYOUT=deb_system", f"PYTHONPATH=/wheels/{pip.name}", "PIP_CONFIG_FILE=/dev/null",
        "python3", "-m", "pip", "--quiet", "install", "--no-index", "--find-links=/wheels", "--break-system-packages",
        "--root-user-action=ignore", *what,
    )  # fmt: skip


def _inside(root: Path, *argv: str) -> str:
    """Run a command in the file system; what it says. Raises SystemExit with its words if it fails."""
    done = subprocess.run(
        ["chroot", str(root), *argv],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False, timeout=300,
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"image.py: {' '.join(argv)} failed in the image:\n{done.stdout}{done.stderr}")
    return done.stdout


def _prune(keep: Path) -> None:
    """Remove the images that were not used for longest. A machine that runs on one has it open."""
    images = [p for p in lab_kernel.cache().glob("image-*") if not p.name.startswith("image-base-") and p != keep]
    for old in sorted(images, key=lambda p: p.stat().st_mtime, reverse=True)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)


def _run(argv: Sequence[str | Path]) -> None:
    """Run a command of this host to its end; raises SystemExit with what it said if it fails."""
    environment = dict(os.environ, PATH=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    words = [str(a) for a in argv]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"image.py: {words[0]} failed with status {done.returncode}:\n{done.stdout}{done.stderr}")


def say(text: str) -> None:
    """A line of progress, on standard error: standard output carries the result alone."""
    print(f"==> {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    print(build() / "root.img")
