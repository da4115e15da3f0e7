# SPDX-License-Identifier: LGPL-2.1-or-later
"""The lab's kernel: Debian's kernel source, our configuration, built once and cached.

Debian builds its own kernels without CONFIG_KEXEC_HANDOVER, so the lab builds one from ``linux-source-X.Y`` of the
suite ``trixie-backports``. The machine's own package sources stay untouched: a private apt root in the cache takes their
address and keys at run time and replaces the suite.

Standard library only, so that it runs before any virtual environment exists::

    python3 tests/vm/kernel.py [VERSION...]     # build if need be; a line for each: the path of its bzImage

Cache layout, below ``${XDG_CACHE_HOME:-~/.cache}/khod-lab``, each entry made under a temporary name and renamed::

    kernel-<version>-<hash of configuration and recipe>/{bzImage,System.map,config,release}
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
DEFCONFIG = HERE / "khod_lab_defconfig"
SUITE = "trixie-backports"
DEFAULT_VERSION = "7.3"
RECIPE = 1
"""Raised when a change of this file changes what is built."""
BUILD_PACKAGES = (
    "gcc", "make", "flex", "bison", "bc", "libelf-dev", "libssl-dev", "rsync", "zstd", "cpio", "xz-utils", "kmod", "perl",
)  # fmt: skip


def cache() -> Path:
    """The lab's cache directory; made if it is not there."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(base) / "khod-lab"
    path.mkdir(parents=True, exist_ok=True)
    return path


def kernel_directory(version: str = DEFAULT_VERSION) -> Path:
    """Where the kernel of this version and of today's configuration is, or will be once built."""
    key = hashlib.sha256(DEFCONFIG.read_bytes() + f"{version} {SUITE} {RECIPE}".encode()).hexdigest()[:16]
    return cache() / f"kernel-{version}-{key}"


def build(version: str = DEFAULT_VERSION) -> Path:
    """Build the kernel unless it is cached; return its directory. Two callers at once: the second waits for the first."""
    target = kernel_directory(version)
    if (target / "bzImage").exists():
        return target
    with open(cache() / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (target / "bzImage").exists():
            with tempfile.TemporaryDirectory(prefix="build-", dir=cache()) as work:
                _build(version, Path(work), target)
    return target


def _build(version: str, work: Path, target: Path) -> None:
    say(f"building the lab's kernel {version}: about 7 minutes on 2 cores, then cached in {target}")
    _run([HERE.parents[1] / "tools/apt-missing", *BUILD_PACKAGES])
    archive = _download(f"linux-source-{version}", work)
    say(f"unpacking {archive.name}")
    _run(["dpkg-deb", "-x", archive, work / "package"])
    (tarball,) = (work / "package/usr/src").glob("linux-source-*.tar.*")
    source, out, ready = work / "source", work / "out", work / "ready"
    for directory in (source, out, ready):
        directory.mkdir()
    _run(["tar", "-xf", tarball, "-C", source, "--strip-components=1"])
    shutil.copy(DEFCONFIG, out / ".config")
    make: list[str | Path] = ["make", "-s", "-C", source, f"O={out}", "KBUILD_BUILD_USER=khod", "KBUILD_BUILD_HOST=lab"]
    _run([*make, "olddefconfig"])
    say("compiling")
    _run([*make, f"-j{os.cpu_count()}", "bzImage"], log=work / "make.log")
    for name, at in {"bzImage": "arch/x86/boot/bzImage", "System.map": "System.map", "config": ".config"}.items():
        shutil.copy(out / at, ready / name)
    shutil.copy(out / "include/config/kernel.release", ready / "release")
    ready.rename(target)


def _download(package: str, work: Path) -> Path:
    """The .deb of `package` from the backports suite, by an apt of its own beside the machine's."""
    root = work / "apt"
    for directory in ("lists/partial", "cache/archives/partial", "sources"):
        (root / directory).mkdir(parents=True)
    (root / "status").touch()
    (root / "sources/lab.sources").write_text(_sources())
    apt = [
        "apt-get", "-q", "-o", f"Dir::Etc::sourceparts={root}/sources", "-o", "Dir::Etc::sourcelist=/dev/null",
        "-o", f"Dir::State::lists={root}/lists", "-o", f"Dir::Cache={root}/cache", "-o", f"Dir::State::status={root}/status",
        "-o", "Acquire::Check-Valid-Until=false", "-o", "APT::Sandbox::User=root", "-o", "Debug::NoLocking=1",
    ]  # fmt: skip
    say(f"fetching {package} from {SUITE}")
    _run([*apt, "update"])
    _run([*apt, "download", package], cwd=work)
    (archive,) = work.glob(f"{package}_*.deb")
    return archive


def _sources() -> str:
    """A deb822 source for the lab's suite: address and keyring as the machine's own sources name them for Debian."""
    uri, keyring = debian_mirror()
    signed = f"Signed-By: {keyring}\n" if keyring else ""
    return f"Types: deb\nURIs: {uri}\nSuites: {SUITE}\nComponents: main\n{signed}"


def debian_mirror(etc: Path = Path("/etc/apt")) -> tuple[str, str]:
    """The machine's Debian mirror, and the keyring it is signed by ('' when its sources name none).

    Raises SystemExit when no source offers a Debian release suite: there is nothing to take the address from.
    """
    release = dict(re.findall(r'^(\w+)="?([^"\n]*)', Path("/etc/os-release").read_text(), re.M)).get("VERSION_CODENAME", "")
    for path in sorted((etc / "sources.list.d").glob("*.sources")):
        for stanza in re.split(r"\n\s*\n", path.read_text()):
            field = dict(re.findall(r"^([\w-]+):[ \t]*(.*)$", stanza, re.M))
            if release in field.get("Suites", "").split():
                return field["URIs"].split()[0], field.get("Signed-By", "")
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list"))]:
        text = path.read_text() if path.exists() else ""
        for options, uri, suite in re.findall(r"^deb\s+(?:\[([^\]]*)\]\s+)?(\S+)\s+(\S+)", text, re.M):
            if suite == release:
                signed = re.search(r"signed-by=(\S+)", options or "")
                return uri, signed[1] if signed else ""
    raise SystemExit(f"kernel.py: no apt source of this machine offers the suite {release!r}: cannot find a Debian mirror")


def _run(argv: Sequence[str | Path], *, cwd: Path | None = None, log: Path | None = None) -> None:
    """Run a command to its end; its output goes to our standard error, or into `log`, whose end is shown on failure."""
    with open(log, "wb") if log else os.fdopen(os.dup(2), "wb") as out:
        status = subprocess.run([str(a) for a in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out, cwd=cwd).returncode
    if status:
        if log:
            sys.stderr.write(log.read_text(errors="replace")[-4000:])
        raise SystemExit(f"kernel.py: {argv[0]} failed with status {status}")


def say(text: str) -> None:
    """A line of progress, on standard error: standard output carries the result alone."""
    print(f"==> {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    for wanted in sys.argv[1:] or [DEFAULT_VERSION]:
        print(build(wanted) / "bzImage")
