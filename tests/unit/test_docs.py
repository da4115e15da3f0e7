# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the documentation says of the code is compared with the code."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

from khod import errors
from khod.cli.application import COMMANDS
from khod.core.state import State
from khod.folio import layout, units
from khod.plugin import hookspecs

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
EXAMPLE = ROOT / "examples/ringlog"


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.M | re.S)


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.strip()]


def test_the_tutorial_is_the_example_word_for_word() -> None:
    assert lines("\n".join(blocks("plugins.md", "python"))) == lines((EXAMPLE / "khod_ringlog.py").read_text())
    assert lines("\n".join(blocks("plugins.md", "toml"))) == lines((EXAMPLE / "pyproject.toml").read_text())


def test_the_client_of_the_documentation_is_the_one_that_a_test_runs() -> None:
    code = (ROOT / "examples/client.py").read_text().partition("\n")[2].strip()
    assert blocks("integrating.md", "python")[0].strip() == code


def test_every_hook_is_documented_with_its_arguments() -> None:
    hooks = [
        f"{name}({', '.join(inspect.signature(value).parameters)})"
        for name, value in vars(hookspecs).items()
        if name.startswith("khod_")
    ]
    assert len(hooks) == 11
    assert re.findall(r"^### (khod_.*)$", (DOCS / "plugins.md").read_text(), re.M) == hooks


def test_the_runbook_knows_every_state_and_every_exit_status() -> None:
    text = (DOCS / "runbook.md").read_text()
    rows = dict(re.findall(r"^\| `([a-z]+)` \| (.+?) \|", text, re.M))
    assert set(rows) == set(State)
    statuses = {int(number) for number in re.findall(r"^\| (\d) \|", text, re.M)}
    classes = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.KhodError)]
    assert statuses == {0, 9} | {found.exit_status for found in classes}


def test_the_folio_map_is_the_one_that_is_written() -> None:
    """The table of the page that the code cites, against the structures that the code packs."""
    text = (DOCS / "folio-map.md").read_text()
    table = re.findall(r"^\| (\d+)(?: \+ 16·i)? \| (u32|u64) \|", text, re.M)
    size = {"u32": 4, "u64": 8}
    fields = [(int(offset), size[kind]) for offset, kind in table]
    assert [kind for _, kind in fields] == [4, 4, 8, 8, 8]
    assert [offset for offset, _ in fields] == [0, 4, 8, layout.HEADER.size, layout.HEADER.size + 8]
    assert sum(width for _, width in fields[:3]) == layout.HEADER.size
    assert sum(width for _, width in fields[3:]) == layout.ELEMENT.size
    quantities = dict(re.findall(r"^\| ([^|]+?) \| `?(\d+)`?(?: [^|]*)?\|$", text, re.M))
    assert int(quantities["bits in one bitmap"]) == layout.BLOCK_BITS
    assert int(quantities["bytes of one bitmap"]) == layout.BITMAP_BYTES
    assert int(quantities["elements of one chunk, at most"]) == layout.CHUNK_ELEMENTS
    assert int(quantities["largest order"]) == units.MAX_ORDER
    assert int(quantities["bits of a physical address"]) == units.PHYS_BITS


def test_commands_that_the_documentation_names_exist() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md"), ROOT / "tests/vm/README.md"]
    text = "\n".join(page.read_text() for page in pages)
    commands = {name for name, _ in COMMANDS}
    named = set(re.findall(r"(?:`|lab# |^ {4}|; )(?:\.venv/bin/)?khoctl ([a-z]+)", text, re.M))
    assert named - commands - {"COMMAND"} == set()
    assert {"register", "load", "update", "claim", "finish", "history"} <= named
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.M))
    asked = set(re.findall(r"(?:`|^ {4}|&& |: )make ([a-z-]+)", text, re.M))
    assert {"demo", "test", "setup"} <= asked
    assert asked - targets == set()
