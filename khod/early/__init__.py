# SPDX-License-Identifier: LGPL-2.1-or-later
"""The restore stage: what runs as the first process of the next kernel, before there is a root file system (docs/initrd.md).

::

    paths       where things are in the initrd
    plan        what the stage is to do: modules, instances to start; written when the initrd is built
    record      what the stage has done, kept in custody for the khod that starts later
    tree        what of the handover tree it needs, read by struct alone
    sampling    which pages are compared across a jump; khod.core.sample chooses by it too
    folios      which frames are behind them; khod.kernel.frames reads by it too
    system      system calls that Python has no name for
    restore     retrieving, comparing, starting: in the custodian's process
    starting    a VMM with its descriptors
    rootfs      how the boot goes on
    stage       the first process

How long it takes to start is all of a guest's blackout that is ours. So of the standard library it imports what costs nothing,
and ctypes; ``tests/unit/early/test_imports.py`` has the list, docs/initrd.md the figures.
"""
