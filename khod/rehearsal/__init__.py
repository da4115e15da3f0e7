# SPDX-License-Identifier: LGPL-2.1-or-later
"""Live updates in a virtual machine on this very host: QEMU, what is said between it and the host, and what plays in it."""
