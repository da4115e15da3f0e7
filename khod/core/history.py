# SPDX-License-Identifier: LGPL-2.1-or-later
"""Updates of the past, as the journal tells them. A journal may be of an older khod: what is missing is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from khod.core import ledger
from khod.core.journal import Record
from khod.core.state import State
from khod.core.views import SpanView, UpdateView

_QUIET = frozenset({State.IDLE, State.FINISHING})
"""States after the outcome: an update that was finished is remembered as restored."""


def spans_of(record: Record) -> list[SpanView]:
    """The ledger's rows in a record."""
    return ledger.from_record(record.data.get("spans"))


def update_view(ident: str, records: Sequence[Record]) -> UpdateView:
    """One update, from its records, oldest first."""
    states = [r for r in records if r.state is not None and r.state not in _QUIET]
    last = states[-1] if states else records[-1]
    data: dict[str, Any] = {}
    for record in records:
        data.update({key: value for key, value in record.data.items() if value and (key != "spans" or record.state)})
    gaps = [span for r in records if r.event == "runs" for span in spans_of(r)]
    problems = [text for r in records for text in _strings(r.data.get("problems"))]
    releases = [r.data["release"] for r in records if isinstance(r.data.get("release"), str)]
    left = data.get("left_behind")
    return UpdateView(
        update=ident,
        started=records[0].time,
        outcome=str(last.state or last.event),
        reason=_text(last.data.get("reason")),
        from_release=releases[0] if releases else "",
        to_release=releases[-1] if len(releases) > 1 else "",
        spans=[*ledger.from_record(data.get("spans")), *gaps],
        instances=_strings(data.get("instances")) or _names(data.get("sessions")),
        left_behind=[f"{name}: {reason}" for name, reason in left.items()] if isinstance(left, Mapping) else (),
        checked=_text(data.get("checked")),
        problems=list(dict.fromkeys(problems)),
        overridden=_strings(data.get("overridden")),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _strings(value: Any) -> list[str]:
    return [v for v in value if isinstance(v, str)] if isinstance(value, list) else []


def _names(rows: Any) -> list[str]:
    return [_text(row.get("name")) for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
