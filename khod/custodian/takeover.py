# SPDX-License-Identifier: LGPL-2.1-or-later
"""Taking over what the custodian of the restore stage holds (khod.early): it served before there was a root file system, and
PID 1's units. Whoever dies meanwhile, it is done once more: until the other is told to end it has everything, and it is told
when all of it is labelled here, and PID 1 has what it is to have.
"""

from __future__ import annotations

import _socket
import os
from struct import pack, unpack

from khod.custodian import protocol
from khod.custodian.keeper import Keeper, Refusal
from khod.custodian.log import ERROR, say
from khod.custodian.store import Silent

PATIENCE = 10
"""Seconds for one answer."""
MOST = 1 << 21
"""Answers: more descriptors than any table has."""


def take_over(keeper: Keeper, address: bytes = protocol.EARLY) -> int:
    """Take over what is held at `address`, and have its holder end: how many descriptors there were; 0 where nobody serves.
    What goes wrong is said: the other goes on holding."""
    channel = _connect(address)
    if channel is None:
        return 0
    try:
        count = _take(keeper, channel)
        _ask(channel, protocol.request(protocol.YIELD))
    except (OSError, ValueError, Refusal, Silent) as error:
        say(f"what the restore stage's custodian holds is not taken over, and stays there: {error}", ERROR)
        return 0
    finally:
        channel.close()
    if count:
        say(f"took over {count} descriptors from the restore stage")
    return count


def _connect(address: bytes) -> _socket.socket | None:
    channel = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_CLOEXEC)
    for option in (_socket.SO_RCVTIMEO, _socket.SO_SNDTIMEO):
        channel.setsockopt(_socket.SOL_SOCKET, option, pack("ll", PATIENCE, 0))
    try:
        channel.connect(address)
        # Anybody can bind such an address. Who bound this one?
        uid = unpack("3i", channel.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))[1]
        if uid not in (0, os.geteuid()):
            say(f"user {uid} serves at the address of the restore stage's custodian: not listened to", ERROR)
            raise OSError
    except OSError:
        channel.close()
        return None
    return channel


def _take(keeper: Keeper, channel: _socket.socket) -> int:
    ours: dict[int, int] = {}
    place = 0
    for count in range(MOST):
        place, text, fd = _ask(channel, protocol.request(protocol.NEXT, first=place))
        if not place:
            return count
        if fd < 0:
            raise ValueError("a descriptor was lost on the way (LimitNOFILE=)")
        kind, session, token = protocol.HELD.unpack_from(text)
        try:
            ours[place] = keeper.inherit(fd, kind, text[protocol.HELD.size :], ours.get(session, 0), token)
        finally:
            if not keeper.table.kind(fd):
                os.close(fd)
    raise ValueError("it has no end")


def _ask(channel: _socket.socket, request: bytes) -> tuple[int, bytes, int]:
    """Number, text and descriptor (or -1) of an answer. Raises OSError, ValueError."""
    channel.send(request)
    packet, rights, _, _ = channel.recvmsg(protocol.MAX_PACKET, _socket.CMSG_LEN(4), _socket.MSG_CMSG_CLOEXEC)
    fd = unpack("i", rights[0][2][:4])[0] if rights else -1
    status, number, text = protocol.read_answer(packet)
    if status != protocol.DONE:
        if fd >= 0:
            os.close(fd)
        raise ValueError(text.decode("utf-8", "replace"))
    return number, text, fd
