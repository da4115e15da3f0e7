# SPDX-License-Identifier: LGPL-2.1-or-later
"""The house: style, types, licences, links, units and packages, each judged by the tool that is made for it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SPDX = "SPDX-License-Identifier: LGPL-2.1-or-later"
SKIPPED = {".git", ".venv", "build", "dist", "out", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}


def files(*suffixes: str) -> Iterator[Path]:
    """The project's own files."""
    for directory, names, found in os.walk(ROOT):
        names[:] = [n for n in names if n not in SKIPPED and not n.endswith(".egg-info")]
        yield from (Path(directory, f) for f in found if f.endswith(suffixes))


def tool(name: str) -> str:
    """Where a tool is. Skips the test where it is missing, and fails it there when KHOD_REQUIRE names the tool."""
    path = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None and name in os.environ.get("KHOD_REQUIRE", "").split(","):
        pytest.fail(f"KHOD_REQUIRE names {name}, which is not installed")
    if path is None:
        pytest.skip(f"no {name} here")
    return path


def run(*argv: str | Path, timeout: float = 300, cwd: Path = ROOT) -> str:
    """What a command says; it must succeed."""
    done = subprocess.run(argv, capture_output=True, text=True, cwd=cwd, timeout=timeout, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_ruff_has_nothing_to_say() -> None:
    ruff = tool("ruff")
    run(ruff, "check", ".")
    run(ruff, "format", "--check", ".")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_mypy_has_nothing_to_say() -> None:
    run(tool("mypy"))


def test_every_file_names_its_licence() -> None:
    without = [
        str(path.relative_to(ROOT))
        for path in [*files(".py", ".sh", ".service", ".c", ".toml"), ROOT / "Makefile", *(ROOT / "tools").iterdir()]
        if path.is_file() and SPDX not in "".join(path.read_text().splitlines(keepends=True)[:3])
    ]
    assert not without


def test_links_of_the_documentation_lead_somewhere() -> None:
    broken, seen = [], 0
    for page in files(".md"):
        for target in re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", page.read_text()):
            if re.match(r"[a-z]+:", target):
                continue
            seen += 1
            path, _, _anchor = target.partition("#")
            if path and not (page.parent / path).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert seen > 10
    assert not broken


def test_pages_that_code_names_exist() -> None:
    named = {(path, page) for path in files(".py") for page in re.findall(r"docs/[a-z-]+\.md", path.read_text())}
    assert named
    assert not [f"{path.relative_to(ROOT)}: {page}" for path, page in named if not (ROOT / page).exists()]


def test_modules_can_be_held_in_one_sitting() -> None:
    long = {str(p.relative_to(ROOT)): n for p in files(".py") if (n := len(p.read_text().splitlines())) > 550}
    assert not long


def test_every_package_is_shipped() -> None:
    """A package that setup does not list is missing from the wheel and from the editable install."""
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "khod").rglob("__init__.py")}
    bundled = {p.parent.name for p in (ROOT / "plugins").glob("*/*/__init__.py")}
    assert listed == there | bundled


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is in the checkout, as pip builds it; fetches the build's own requirement."""
    work = tmp_path_factory.mktemp("wheel")
    source = work / "source"
    source.mkdir()
    for name in ("khod", "plugins", "systemd", "pyproject.toml", "README.md", "COPYING"):
        at = ROOT / name
        if at.is_dir():
            shutil.copytree(at, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
        else:
            shutil.copy(at, source / name)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", work, source, cwd=work)
    (built,) = work.glob("*.whl")
    return built


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel_has_everything_and_works_alone(wheel: Path, tmp_path: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {str(p.relative_to(ROOT)) for p in (ROOT / "khod").rglob("*") if p.is_file() and "__pycache__" not in p.parts}
    assert {"khod/py.typed", "khod/rehearsal/init"} <= shipped
    assert shipped | {"khod_guestmemfd/__init__.py"} <= names
    units = {p.name for p in (ROOT / "systemd").glob("*.*") if p.is_file()}
    assert units <= {Path(n).name for n in names if ".data/data/lib/" in n}
    assert not [n for n in names if n.startswith(("tests", "bench", "examples"))]

    # The dependencies are borrowed from this environment, by path and without the metadata of our own editable install.
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env")
    python = tmp_path / "env/bin/python"
    target = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    run(sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", "--no-index", wheel, cwd=tmp_path)
    here = Path(run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    for entry in here.iterdir():
        ours = entry.name.lower().startswith(("khod", "__editable__"))
        if not ours and entry.suffix != ".pth" and not (target / entry.name).exists():
            (target / entry.name).symlink_to(entry)

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(tmp_path / "env/bin/khod", "--version", cwd=tmp_path).strip() == f"khod {version}"
    assert "Usage: khoctl" in run(tmp_path / "env/bin/khoctl", "--help", cwd=tmp_path)
    code = (
        "import khod, khod_guestmemfd; from khod.plugin.manager import PluginManager; manager = PluginManager();"
        "assert manager.load() == []; print(khod.__file__, *manager.names())"
    )
    where, *plugins = run(python, "-I", "-c", code, cwd=tmp_path).split()
    assert Path(where).is_relative_to(tmp_path)
    assert plugins == ["guestmemfd", "iommu", "vfio"]


def test_versions_agree() -> None:
    from khod import __version__

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == __version__
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
