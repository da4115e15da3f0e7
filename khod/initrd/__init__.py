# SPDX-License-Identifier: LGPL-2.1-or-later
"""The initrd for the jump: the restore stage (khod.early) with all that it takes to run it (docs/initrd.md).

::

    launcher    the first instructions: machine code that executes the interpreter
    closure     run by the interpreter itself: which modules the stage imports, compiled
    libraries   shared libraries of programs
    modules     kernel modules and what they depend on, in order
    contents    everything, as members of an archive
    image       the port Kexec, with the initrd built and the command line made where that is configured
"""
