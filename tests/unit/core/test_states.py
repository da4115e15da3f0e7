# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

from pathlib import Path

from khod.core.state import HOLDABLE, TRANSITIONS, State


def test_every_state_is_in_the_table_and_leads_somewhere() -> None:
    assert set(TRANSITIONS) == set(State)
    assert all(TRANSITIONS.values())


def test_every_state_can_be_reached_and_leads_back_to_idle() -> None:
    for start in State:
        seen, todo = {start}, [start]
        while todo:
            new = TRANSITIONS[todo.pop()] - seen
            seen |= new
            todo += new
        assert State.IDLE in seen
        if start is State.IDLE:
            assert seen == set(State)


def test_before_the_point_of_no_return_an_abort_is_always_possible() -> None:
    for state in State:
        if state.outgoing and state is not State.ABORTING:
            assert State.ABORTING in TRANSITIONS[state]
    assert all(state.outgoing for state in HOLDABLE)


def test_the_documented_diagram_is_the_table() -> None:
    """docs/life-cycle.md draws the same arrows, a line each: `from -> to`."""
    text = (Path(__file__).parents[3] / "docs/life-cycle.md").read_text()
    drawn = {tuple(line.strip().split(" -> ")) for line in text.splitlines() if " -> " in line and "`" not in line}
    assert drawn == {(str(a), str(b)) for a, targets in TRANSITIONS.items() for b in targets}
