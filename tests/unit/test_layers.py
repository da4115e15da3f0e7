# SPDX-License-Identifier: LGPL-2.1-or-later
"""Imports go downwards only, and the path to restored stays light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2] / "khod"
LAYERS = [
    {"errors"},
    {"folio"},
    {"abi"},
    {"config", "custodian"},
    {"early"},
    {"core"},
    {"plugin"},
    {"kernel", "simulated"},
    {"api", "inspect", "initrd"},
    {"client"},
    {"supervision"},
    {"daemon", "demo", "driven", "rehearsal"},
    {"cli"},
]
"""Lowest first. Modules of one row do not import each other."""
CLI_MAY = {"khod.core.views", "khod.core.state", "khod.core.service"}


def imports(path: Path) -> set[str]:
    """Modules of khod that a file imports anywhere, type checking included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{name.name}" for name in node.names} | {str(node.module)}
    return {name for name in found if name.startswith("khod.")}


def layer_of(module: str) -> int:
    part = module.split(".")[1]
    return next((i for i, row in enumerate(LAYERS) if part in row), -1)


def test_imports_go_down() -> None:
    up = []
    for path in sorted(ROOT.rglob("*.py")):
        own = "khod." + path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        if own in ("khod.__init__", "khod.__main__"):
            continue
        assert layer_of(own) >= 0, f"{own} is in no layer"
        for other in imports(path):
            if layer_of(other) < 0:  # a name of the package itself, such as khod.__version__
                continue
            same_row = layer_of(other) == layer_of(own) and other.split(".")[1] != own.split(".")[1]
            if layer_of(other) > layer_of(own) or same_row:
                up.append(f"{own} imports {other}")
    assert not up


def test_khoctl_knows_what_people_see_and_nothing_that_drives() -> None:
    for path in sorted((ROOT / "cli").rglob("*.py")):
        for other in imports(path):
            if other.startswith("khod.core."):
                assert any(other == may or other.startswith(may + ".") for may in CLI_MAY), f"{path.name} imports {other}"


def test_folio_and_abi_do_no_io() -> None:
    for path in [*(ROOT / "folio").rglob("*.py"), *(ROOT / "abi").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [n.name for n in node.names] if isinstance(node, ast.Import) else []
            module = str(node.module) if isinstance(node, ast.ImportFrom) else ""
            for name in [*names, module]:
                assert name.split(".")[0] not in {"os", "io", "asyncio", "socket", "subprocess", "fcntl", "mmap"}, path


def test_the_way_to_restored_imports_nothing_heavy() -> None:
    """What the daemon imports before it brings up the API, on either machine."""
    code = (
        "import sys, khod.daemon, khod.core.restore, khod.kernel.machine, khod.kernel.systemd, khod.simulated;"
        "import khod.abi.tree, khod.folio.walk, khod.plugin.manager; khod.plugin.manager.PluginManager().load();"
        "print(sorted({'numpy', 'rich', 'typer', 'asyncvarlink', 'jeepney', 'khod.api.server', 'khod.cli'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.strip() == "[]"
