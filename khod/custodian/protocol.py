# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is said over the custodian's socket: a SOCK_SEQPACKET packet for a request, one for its answer, descriptors beside.

A packet begins with `VERSION`, so that a khod and a custodian of different versions know each other for what they are. Numbers
are in the byte order of the machine, which both ends run on. A request that is longer than `MAX_PACKET`, has more descriptors
than `MAX_FDS`, or has one where none is meant, is refused.
"""

from __future__ import annotations

from struct import Struct

SOCKET = "/run/khod/custodian.sock"
EARLY = b"\0khod-early"
"""Where the custodian of the restore stage serves (khod.early.custodian): an address that needs no file system."""
VERSION = b"khc1"
MAX_PACKET = 32 << 10
MAX_FDS = 128
"""Descriptors of one packet; the kernel's own limit is 253 (SCM_MAX_FD)."""
MAX_NAME = 10
"""Bytes of a deposit's name: 10,000 of them and more must fit into one LISTEN_FDNAMES of 128 KiB (decision 20)."""

# Requests. What the two numbers, the text and the descriptors are; NUL stands between the parts of a text.
KEEP = 1  # text: the name; one descriptor
KEPT = 2  # text: names after this one. Answer: names in order; the number is 1 when there are more
TAKE = 3  # text: the name. Answer: a descriptor
DROP = 4  # text: names
SESSIONS = 5  # as KEPT
RELEASE = 6  # text: the session's name
OFFER = 7  # descriptors: outgoing sessions; first number 1 in the last packet of an offer
WITHDRAW = 8
ROOM = 9  # Answer: the number
DOUBT = 10  # numbers: bytes, files. Answer: text
RETRIEVE_SESSION = 11  # text: the session's name. Answer: a descriptor
RETRIEVE_FD = 12  # first number: the token; one descriptor, of the session. Answer: a descriptor
LEAVE = 13  # end, if nothing is held
NEXT = 14  # first number: where the last answer left off, 0 at first. Answer: where this one does, 0 at the end; `HELD`
# and the name; a descriptor
YIELD = 15  # end, whatever is held: whoever asks has it all

# What an answer begins with. Above 0: an errno of the kernel's, and the text names the call that it came from, by the names
# of khod.core.refusals. Below 0 the text is for people.
DONE = 0
INVALID = -1
FULL = -2
REFUSED = -3
UNHELD = -4  # RETRIEVE_FD: the session is none of those that are held here
SILENT = -5  # PID 1 did not confirm in time
HOLDING = -6  # LEAVE

_REQUEST = Struct("=4sHHQQ")  # version, operation, 0, two numbers
_ANSWER = Struct("=4siQ")  # version, status, number
HELD = Struct("=BQQ")
"""Before the name in an answer to NEXT: kind (`khod.custodian.table`), number of the answer with a file's session, token."""
MAX_U64 = (1 << 64) - 1


def request(operation: int, text: bytes = b"", first: int = 0, second: int = 0) -> bytes:
    """A request. Raises ValueError for one that no custodian would take."""
    if not (0 <= first <= MAX_U64 and 0 <= second <= MAX_U64 and len(text) <= MAX_PACKET - _REQUEST.size):
        raise ValueError("a request to the custodian is beyond the protocol's bounds")
    return _REQUEST.pack(VERSION, operation, 0, first, second) + text


def read_request(packet: bytes) -> tuple[int, int, int, bytes]:
    """Operation, two numbers, text. Raises ValueError, with words for whoever sent it."""
    if packet[:4] != VERSION:
        raise ValueError(f"this custodian speaks {VERSION.decode()}, and was sent {packet[:4]!r}")
    if len(packet) < _REQUEST.size:
        raise ValueError(f"a request of {len(packet)} bytes: {_REQUEST.size} are the least")
    _, operation, reserved, first, second = _REQUEST.unpack_from(packet)
    if reserved:
        raise ValueError(f"the reserved field is {reserved} and must be 0")
    return operation, first, second, packet[_REQUEST.size :]


def answer(status: int, number: int = 0, text: bytes = b"") -> bytes:
    """An answer."""
    return _ANSWER.pack(VERSION, status, number) + text


def read_answer(packet: bytes) -> tuple[int, int, bytes]:
    """Status, number, text. Raises ValueError."""
    if packet[:4] != VERSION or len(packet) < _ANSWER.size:
        raise ValueError(f"the custodian answered {packet[:16]!r}, which is not {VERSION.decode()}")
    _, status, number = _ANSWER.unpack_from(packet)
    return status, number, packet[_ANSWER.size :]
