# SPDX-License-Identifier: LGPL-2.1-or-later
"""Who may do what: the configuration's rules applied to a peer, and the one table of what each method takes."""

from __future__ import annotations

import fnmatch
import grp
import os
from collections.abc import Mapping, Sequence

from khod.api.peers import Peer
from khod.config import Rule
from khod.core.callers import Kind, Owner, Right
from khod.errors import NotPermitted

RIGHTS: Mapping[str, Right] = {
    "GetStatus": Right.OBSERVE,
    "ListInstances": Right.OBSERVE,
    "Plan": Right.OBSERVE,
    "Preflight": Right.OBSERVE,
    "GetHistory": Right.OBSERVE,
    "Inspect": Right.OBSERVE,
    "Register": Right.INSTANCES,
    "Unregister": Right.INSTANCES,
    "Claim": Right.INSTANCES,
    "Finished": Right.INSTANCES,
    "Subscribe": Right.INSTANCES,
    "Ready": Right.INSTANCES,
    "Failed": Right.INSTANCES,
    "GetStates": Right.INSTANCES,
    "RegisterOpaque": Right.OPAQUE,
    "OpenSession": Right.OPAQUE,
    "Load": Right.OPERATE,
    "PreflightImage": Right.OPERATE,  # it opens files by name
    "Update": Right.OPERATE,
    "Continue": Right.OPERATE,
    "Abort": Right.OPERATE,
    "Finish": Right.OPERATE,
    "Adopt": Right.ADMINISTER,
    "Discard": Right.ADMINISTER,
}
"""What a caller of a method of the interface must be allowed to do. A method without a row is nobody's."""

_HINT = "a rule of the policy in khod's configuration would have to grant it"


def rights(rules: Sequence[Rule], peer: Peer) -> tuple[Owner, frozenset[Right]]:
    """To whom it belongs what this peer registers, and what the peer may do. Asks the system's databases.

    The owner is the unit when a rule for units matched, else the user. Raises NotPermitted for a peer that is nobody: of a
    user without a name, in a unit that no rule knows.
    """
    matching = [rule for rule in rules if _matches(rule, peer)]
    found = {Right(right) for rule in matching for right in rule.may}
    if peer.uid in (0, os.geteuid()):
        found = {*Right}
    if any(rule.kind == "unit" for rule in matching):
        return Owner(Kind.UNIT, peer.unit), frozenset(found)
    if not peer.user:
        raise NotPermitted(
            f"khod does not talk to user {peer.uid}, who has no name here",
            hint="instances belong to names; give the user one, or let a rule for its systemd unit match",
        )
    return Owner(Kind.USER, peer.user), frozenset(found)


def _matches(rule: Rule, peer: Peer) -> bool:
    match rule.kind:
        case "any":
            return True
        case "user":
            return rule.name == peer.user
        case "unit":
            return bool(peer.unit) and fnmatch.fnmatchcase(peer.unit, rule.name)
        case "group":
            try:
                return grp.getgrnam(rule.name).gr_gid in peer.groups
            except KeyError:
                return False
        case _:
            return False


def require(owner: Owner, granted: frozenset[Right], method: str) -> None:
    """Raises NotPermitted unless these rights are enough for the method."""
    right = RIGHTS.get(method)
    if right is None or right not in granted:
        raise NotPermitted(f"{owner} may not {method}: the right to {right or 'do so'} is missing", hint=_HINT)
