# SPDX-License-Identifier: LGPL-2.1-or-later
"""The custodian: a tiny program that holds descriptors, so that khod may die (decisions 18 to 20; docs/custody.md).

::

    protocol    what a client and the custodian say to each other; of khod's other parts khod.kernel.custody reads it
    table       what each descriptor is, in memory that both processes see
    twins       two processes, one table of descriptors
    store       PID 1's fd store
    luo         the requests of /dev/liveupdate that are made here
    keeper      what is kept: every step, and what the survivor makes of one that was not ended
    doubt       whether a retrieve is sure to succeed
    takeover    what the restore stage's custodian has held until now
    server      the socket
    __main__    the program

How long it takes to start is part of every blackout, so of the standard library it imports what costs nothing: no `socket`, no
`signal` (both import enum, which alone takes longer than all that is done here), no dataclasses, no typing.
"""
