# SPDX-License-Identifier: LGPL-2.1-or-later
"""A machine in a directory, behind the same ports as the running Linux.

`create` makes one. `khod.simulated.kernel.Kernel.boot` runs its kernel in this process, for tests; ``python -m
khod.simulated DIR --init COMMAND`` runs each of its kernels as a process, and COMMAND reaches it by `connect`. `machine`
gives the ports of a process on it. What is imported here needs no numpy: only a kernel does.
"""

from khod.simulated.faults import KernelPanic, ProcessDied
from khod.simulated.layout import ENVIRONMENT, Release, create
from khod.simulated.ports import machine
from khod.simulated.process import Process
from khod.simulated.wire import connect

__all__ = ["ENVIRONMENT", "KernelPanic", "Process", "ProcessDied", "Release", "connect", "create", "machine"]
