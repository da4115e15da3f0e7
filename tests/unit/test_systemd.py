# SPDX-License-Identifier: LGPL-2.1-or-later
"""The units, judged by systemd itself, and what is installed of them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from khod.kernel.facts import CAPABILITIES
from tests.unit.test_house import ROOT, run, tool

UNITS = ROOT / "systemd"
PAGE = ROOT / "docs/systemd.md"
SINCE = {
    "RestartMode": 254,
    "FileDescriptorStorePreserve": 254,
}
"""Settings that older systemds do not know, and ignore with a warning; the virtual machine's knows them all."""


def copies(directory: Path) -> list[Path]:
    """The units as this host's systemd can judge them: khod need not be installed, any program will do."""
    known = int(run(tool("systemctl"), "--version").split()[1])
    made = []
    for unit in sorted(UNITS.glob("*.*")):
        if unit.suffix not in (".service", ".socket", ".target"):
            continue
        text = re.sub(r"^ExecStart=\S+", f"ExecStart={sys.executable}", unit.read_text(), flags=re.M)
        for key, since in SINCE.items():
            if known < since:
                text = re.sub(rf"^{key}=.*\n", "", text, flags=re.M)
        copy = directory / unit.name
        copy.write_text(text)
        made.append(copy)
    return made


def verify(*units: Path) -> str:
    """What systemd-analyze complains of, warnings included."""
    command = [tool("systemd-analyze"), "verify", "--man=no", "--recursive-errors=no", *map(str, units)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done.stderr + ("" if done.returncode == 0 else f"exit status {done.returncode}")


def test_systemd_understands_every_line(tmp_path: Path) -> None:
    units = copies(tmp_path)
    assert {"khod.service", "khod.socket", "khod-restored.target"} <= {unit.name for unit in units}
    assert verify(*units) == ""
    service = tmp_path / "khod.service"
    service.write_text(service.read_text() + "[Service]\nKillMod=process\n")
    assert "KillMod" in verify(service), "the judge sleeps"


def test_khod_is_found_wherever_it_was_installed() -> None:
    """pip and `make install` know /usr and /usr/local; systemd looks into both for a program without a path."""
    assert "\nExecStart=khod\n" in (UNITS / "khod.service").read_text()


def test_the_unit_grants_what_the_preflight_asks_for() -> None:
    granted = re.findall(r"^CapabilityBoundingSet=(.*)$", (UNITS / "khod.service").read_text(), re.M)
    assert set(CAPABILITIES) <= set(granted[0].split())


def test_nothing_that_is_ordered_after_the_target_ends_with_khod() -> None:
    """Requires= on the way would take every guest down with `systemctl restart khod`."""
    text = (UNITS / "khod-restored.target").read_text()
    assert re.findall(r"^(\w+)=(?:khod|/run)\S*$", text, re.M) == ["Wants", "After", "AssertPathExists"]


def test_no_line_hides_the_hosts_mounts_from_khod() -> None:
    """It writes out every file system before the jump: in a mount namespace of its own it might miss one (decision 15)."""
    text = (UNITS / "khod.service").read_text()
    hiding = (
        "Private(Tmp|Devices|Mounts|Network|Users)|Protect(System|Home|Kernel|ControlGroups|Proc)|(ReadOnly|Inaccessible)Paths"
    )
    assert re.findall(rf"^(?:{hiding}).*$", text, re.M) == []


def test_the_hardening_is_what_the_page_says(tmp_path: Path) -> None:
    copies(tmp_path)
    page = PAGE.read_text()
    for unit in sorted(UNITS.glob("*.service")):
        found = re.search(rf"^\| `{re.escape(unit.name)}` \| (\d+\.\d) \|", page, re.M)
        assert found, f"{unit.name} has no figure in {PAGE.name}"
        run(
            *(tool("systemd-analyze"), "security", "--offline=true", "--no-pager"),
            *(f"--threshold={round(float(found[1]) * 10)}", tmp_path / unit.name),
        )


def test_sysusers_and_tmpfiles_do_what_the_units_rely_on(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    run(tool("systemd-sysusers"), f"--root={tmp_path}", UNITS / "sysusers.d/khod.conf")
    assert re.search(r"^khod:", (tmp_path / "etc/group").read_text(), re.M)
    run(tool("systemd-tmpfiles"), f"--root={tmp_path}", "--create", UNITS / "tmpfiles.d/khod.conf")
    assert (tmp_path / "run/khod").stat().st_mode & 0o7777 == 0o755
    assert (tmp_path / "var/lib/khod").stat().st_mode & 0o7777 == 0o700


def everything(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_is_installed_runs_and_is_removed_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "usr/lib/systemd/system").mkdir(parents=True)
    (tmp_path / "usr/lib/systemd/system/other.service").write_text("[Service]\nExecStart=true\n")
    before = everything(tmp_path)
    interpreter = "/usr/bin/python3"
    # This environment's packages, less our own editable install.
    packages = run(sys.executable, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    make = ("make", f"PYTHON={sys.executable}", f"DESTDIR={tmp_path}", "PREFIX=/usr", f"INTERPRETER={interpreter}")
    run(*make, "install")
    there = everything(tmp_path) - before
    assert {f"usr/lib/systemd/system/{unit.name}" for unit in copies(tmp_path.parent) if unit.name.startswith("khod")} <= there
    assert {"usr/bin/khod", "usr/bin/khoctl", "usr/lib/sysusers.d/khod.conf", "usr/lib/tmpfiles.d/khod.conf"} <= there
    for program, option, said in (("khod", "--version", "khod 0."), ("khoctl", "--help", "Usage: khoctl")):
        launcher = (tmp_path / f"usr/bin/{program}").read_text()
        assert launcher.startswith(f"#!{interpreter} -I\n")
        code = f"import sys; sys.path.append({packages!r}); sys.argv = ['/usr/bin/{program}', '{option}']\n{launcher}"
        code = code.replace('"/usr/lib/khod"', f'"{tmp_path}/usr/lib/khod"')
        assert said in run(sys.executable, "-I", "-S", "-c", code)
    run(*make, "uninstall")
    assert everything(tmp_path) == before


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_file_of_somebody_elses_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "usr/bin").mkdir(parents=True)
    (tmp_path / "usr/bin/khoctl").write_text("mine")
    before = everything(tmp_path)
    make = ["make", f"PYTHON={sys.executable}", f"DESTDIR={tmp_path}", "PREFIX=/usr", "install"]
    done = subprocess.run(make, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode != 0
    assert f"{tmp_path}/usr/bin/khoctl is there already" in done.stderr
    assert everything(tmp_path) == before
    assert (tmp_path / "usr/bin/khoctl").read_text() == "mine"
