# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod moves a running Linux host onto a new kernel while what runs on it keeps its memory and its devices.

The layers, lowest first; a module imports from its own layer and from those below it, never from above
(``tests/unit/test_layers.py`` proves it)::

    errors            the exception tree
    folio, abi        pure formats: the folio map, the handover tree, the kernel's argument structs
    custodian         a program of its own that holds descriptors, so that khod may die
    early             restoring before there is a root file system
    config            YAML -> typed configuration
    core              policy: ports, model, states, journal, orchestration
    plugin            what driver authors write against: hook specifications, dispatcher
    kernel, simulated two machines behind the ports of core
    initrd            the archive that early comes in
    api               the varlink interface, server and client
    daemon, driven    the places that join the others: on the host, and in the initrd
    cli               khoctl, a client of the api
"""

__version__ = "0.1.0"
