# SPDX-License-Identifier: LGPL-2.1-or-later
"""Finding out who somebody is who has just connected: blocks, for the system's databases may."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from khod.api import peers, policy
from khod.api.peers import Peer
from khod.config import Rule
from khod.core.callers import Kind, Owner, Right
from khod.errors import NotPermitted

_NOBODY = Owner(Kind.USER, "nobody")


@dataclass(frozen=True, slots=True)
class Found:
    """Who somebody is, and what he may do, or why he may nothing."""

    peer: Peer
    owner: Owner = _NOBODY
    granted: frozenset[Right] = frozenset()
    refusal: NotPermitted | None = None


def find(sock: socket.socket, rules: Sequence[Rule]) -> Found:
    """Who made this connection; `sock` is consumed. Raises OSError when the peer hung up."""
    with sock:
        peer = peers.identify(sock)
    try:
        return Found(peer, *policy.rights(rules, peer))
    except NotPermitted as refusal:
        return Found(peer, refusal=refusal)
    except BaseException:
        if peer.pidfd >= 0:
            os.close(peer.pidfd)
        raise


async def meet(databases: ThreadPoolExecutor, sock: socket.socket, rules: Sequence[Rule]) -> Found:
    """`find` in one of these threads; `sock` is borrowed. Raises OSError when the peer hung up. A caller who is cancelled does
    not wait, and nothing of it stays open."""
    own = sock.dup()  # the connection may end meanwhile
    finding = databases.submit(find, own, rules)
    try:
        return await asyncio.shield(asyncio.wrap_future(finding))
    except asyncio.CancelledError:
        if finding.cancel():
            own.close()
        else:
            finding.add_done_callback(_close_found)
        raise


def _close_found(finding: Future[Found]) -> None:
    """Close what a search found that nobody waits for any more."""
    if finding.exception() is None and finding.result().peer.pidfd >= 0:
        os.close(finding.result().peer.pidfd)
