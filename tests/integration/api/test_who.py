# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may do what: every method, tried by everybody, over the real socket with the kernel's own word for who it is."""

from __future__ import annotations

import grp
import pwd
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from asyncvarlink.interface import varlinksignature

from khod.api.host import HostInterface
from khod.api.policy import RIGHTS
from khod.config import Rule
from khod.core.callers import Right
from tests.integration.api.served import Served, served
from tests.integration.api.somebody import ONLY_ROOT, Somebody, control_group, names

REFUSED = "org.khod.Host.NotPermitted"


class Try(NamedTuple):
    """A call that says of any caller whether it may."""

    parameters: Mapping[str, Any]
    files: int = 0


CALLS: Mapping[str, Try] = {
    "GetStatus": Try({}),
    "ListInstances": Try({}),
    "Plan": Try({}),
    "Preflight": Try({}),
    "GetHistory": Try({}),
    "Inspect": Try({}),
    "Register": Try({"name": "new", "driver": "guestmemfd", "fds": [{"name": "ram", "fd": 0}]}, 1),
    "Unregister": Try({"name": "nothing"}),
    "Claim": Try({"name": "nothing"}),
    "RegisterOpaque": Try({"name": "opaque"}),
    "OpenSession": Try({"handle": "none"}),
    "Finished": Try({"handle": "none"}),
    "Subscribe": Try({"handles": ["none"]}),
    "Ready": Try({"update": "u1", "phase": "quiesce", "handles": ["none"]}),
    "Failed": Try({"update": "u1", "phase": "quiesce", "handles": ["none"]}),
    "GetStates": Try({"handle": "none"}),
    "Load": Try({"kernel": "not-a-kernel"}),
    "PreflightImage": Try({"kernel": "not-a-kernel"}),
    "Update": Try({}),
    "Continue": Try({}),
    "Abort": Try({}),
    "Finish": Try({}),
    "Adopt": Try({"name": "new", "driver": "guestmemfd", "pid": 1, "fds": []}),
    "Discard": Try({"name": "nothing"}),
}


def methods() -> set[str]:
    return {name for name in dir(HostInterface) if varlinksignature(getattr(HostInterface, name)) is not None}


def test_every_method_has_a_right_and_is_tried() -> None:
    assert methods() == set(RIGHTS) == set(CALLS)


def test_the_rights_are_documented() -> None:
    page = (Path(__file__).parents[3] / "docs/security.md").read_text()
    (table,) = re.findall(r"<!-- rights -->\n(.*?)<!-- /rights -->", page, re.S)
    rows = {right: sorted(method for method in RIGHTS if RIGHTS[method] is right) for right in Right}
    assert table == "".join(f"| `{right}` | {', '.join(found)} |\n" for right, found in rows.items() if found)


class World(NamedTuple):
    khod: Served
    who: Mapping[str, Somebody]
    granted: Mapping[str, frozenset[Right]]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """A khod whose policy knows a user for each right, one by a group, one without any, and a unit."""
    users = names(len(Right) + 3)
    grouped, without, in_units = users[-3:]
    rules = [Rule("user", name, (right.value,)) for name, right in zip(users, Right, strict=False)]
    group = next(entry for entry in grp.getgrall() if entry.gr_gid not in {0, *(pwd.getpwnam(u).pw_gid for u in users)})
    rules += [
        Rule("group", group.gr_name, ("operate", "observe")),
        Rule("unit", "khodtest-vmm@*.service", ("instances", "opaque")),
    ]
    with ExitStack() as stack:
        # Not tmp_path, which its owner alone can reach.
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        directory.chmod(0o755)
        unit, other, users_own = (
            stack.enter_context(control_group(name))
            for name in (
                "system.slice/system-khodtest.slice/khodtest-vmm@1.service",
                "system.slice/khodtest-other.service",
                "user.slice/user-1000.slice/user@1000.service/app.slice/khodtest-vmm@1.service",
            )
        )
        who = {"root": Somebody("root"), "without": Somebody(without), "by group": Somebody(grouped, (group.gr_gid,))}
        who |= {right.value: Somebody(name) for name, right in zip(users, Right, strict=False)}
        who |= {"unit": Somebody(in_units, (), unit), "another unit": Somebody(in_units, (), other)}
        who |= {"a user's own unit": Somebody(in_units, (), users_own)}
        granted = {"root": frozenset(Right), "by group": frozenset({Right.OPERATE, Right.OBSERVE})}
        granted |= {right.value: frozenset({right}) for right in Right}
        granted |= {"unit": frozenset({Right.INSTANCES, Right.OPAQUE})}
        khod = stack.enter_context(served(directory / "khod.sock", rules))
        yield World(khod, who, granted)


@ONLY_ROOT
@pytest.mark.parametrize("name", ["root", *Right, "by group", "without", "unit", "another unit", "a user's own unit"])
@pytest.mark.parametrize("after", ["before a jump", "after one"])
def test_every_method_for_everybody(world: World, name: str, after: str) -> None:
    service = world.khod.service
    world.khod.call(service.came_through if after == "after one" else service.start_anew)
    calls = [(method, call.parameters, call.files) for method, call in CALLS.items()]
    answers = world.who[name].calls(world.khod.path, calls)
    granted = world.granted.get(name, frozenset())
    for method, (answer, *_) in zip(CALLS, answers, strict=True):
        refused = answer.get("error") == REFUSED and "the right to" in answer["parameters"]["message"]
        assert refused == (RIGHTS[method] not in granted), f"{name}: {method}: {answer}"
    world.khod.call(service.forget)
