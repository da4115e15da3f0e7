# SPDX-License-Identifier: LGPL-2.1-or-later
"""The running Linux behind the ports of `khod.core.ports`: one module per port, joined by `khod.kernel.machine`.

What the restore path uses (liveupdate, files, frames.pages, boot, store, clock) imports neither numpy nor ctypes before it
is called: the time to import is time that guests wait.
"""
