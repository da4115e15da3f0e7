# SPDX-License-Identifier: LGPL-2.1-or-later
"""Events with a MESSAGE_ID: one table, from which the catalog and the page are made; systemd reads both sides."""

from __future__ import annotations

import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from khod.core.alerts import AT_START, OF_STATE, Alert, alert, alert_start, catalog, table
from khod.core.state import State
from khod.supervision import UNANSWERABLE
from tests.unit.test_house import ROOT, run, tool

PAGE = ROOT / "docs/systemd.md"
CATALOG = ROOT / "systemd/khod.catalog"


def test_the_page_and_the_catalog_are_made_of_the_table() -> None:
    text = PAGE.read_text()
    before, rest = text.split("<!-- alerts -->\n")
    _, after = rest.split("\n<!-- /alerts -->")
    written = f"{before}<!-- alerts -->\n{table()}\n<!-- /alerts -->{after}"
    if os.environ.get("KHOD_WRITE_DOCS"):
        PAGE.write_text(written)
        CATALOG.write_text(catalog())
    assert (text, CATALOG.read_text()) == (written, catalog()), "KHOD_WRITE_DOCS=1 pytest tests/unit/core/test_alerts.py"


def test_no_identity_is_used_twice_or_not_at_all() -> None:
    assert all(re.fullmatch(r"[0-9a-f]{32}", kind.ident) for kind in Alert)
    assert len({kind.ident for kind in Alert}) == len(Alert)
    sources = "\n".join(path.read_text() for path in (ROOT / "khod").rglob("*.py"))
    assert [kind.name for kind in Alert if not re.search(rf"\bAlert\.{kind.name}\b", sources)] == []


def test_systemd_explains_each_by_the_catalog(tmp_path: Path) -> None:
    (tmp_path / "usr/lib/systemd/catalog").mkdir(parents=True)
    (tmp_path / "var/lib/systemd/catalog").mkdir(parents=True)
    shutil.copy(CATALOG, tmp_path / "usr/lib/systemd/catalog")
    run(tool("journalctl"), f"--root={tmp_path}", "--update-catalog")
    said = run(tool("journalctl"), f"--root={tmp_path}", "--dump-catalog")
    for kind in Alert:
        assert f"-- {kind.ident}\nSubject: {kind.subject}\nDefined-By: khod\n\n{kind.text}\n" in said


def test_the_journal_gets_the_identity_and_the_fields() -> None:
    journal = pytest.importorskip("systemd.journal")
    sent: list[dict[str, Any]] = []
    handler = journal.JournalHandler(sender_function=lambda MESSAGE, **fields: sent.append({"MESSAGE": MESSAGE, **fields}))
    logger = logging.Logger("khod.test")
    logger.addHandler(handler)
    alert(logger, Alert.ORPHAN, "orphan: %s", "vm", KHOD_INSTANCE="vm")
    (entry,) = sent
    assert entry["MESSAGE"] == "orphan: vm"
    assert entry["MESSAGE_ID"] == Alert.ORPHAN.ident
    assert (entry["PRIORITY"], entry["KHOD_INSTANCE"]) == ("4", "vm")
    assert entry["CODE_FILE"] == __file__


def test_whatever_keeps_guests_from_starting_is_an_alert(caplog: pytest.LogCaptureFixture) -> None:
    assert UNANSWERABLE - {State.RESTORING} <= set(AT_START)
    assert {State.PREPARING, State.EXECUTING, State.ABORTED, State.FAILED} == set(OF_STATE)
    logger = logging.getLogger("khod.test")
    for state, problems in ((State.UNREACHABLE, []), (State.RESTORED, ["vm differs"]), (State.IDLE, ["x"])):
        alert_start(logger, state, "1234", problems)
    kinds = [getattr(record, "MESSAGE_ID", "") for record in caplog.records]
    assert kinds == [Alert.UNREACHABLE.ident, Alert.RESTORED_WITH_PROBLEMS.ident, ""]
    assert [record.levelno for record in caplog.records] == [logging.CRITICAL, logging.ERROR, logging.WARNING]
