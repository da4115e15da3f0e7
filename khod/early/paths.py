# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where things are in the initrd. All of ours lies below one directory, out of the way of the host's own initrd, which is
unpacked over it."""

from __future__ import annotations

HOME = "khod"
"""The directory, in the archive."""
LAUNCHER = f"/{HOME}/init"
"""``rdinit=`` names it."""
LOADER = f"/{HOME}/ld.so"
LIBRARIES = f"/{HOME}/lib"
PROGRAM = f"/{HOME}/bin/python3"
INTERPRETER = (LOADER, "--library-path", LIBRARIES, PROGRAM, "-I", "-S", "-B")
"""The words that run it, before the path of what it is to run."""
PLAN = f"/{HOME}/plan"
MODULES = f"/{HOME}/modules"
VMM = f"/{HOME}/vmm"
"""The root of the VMMs' own file system: they and what they need, by the paths that they have on the host."""
STAYS = f"/{HOME}/stays"
"""Where it is copied to when somebody else will clear the initrd away."""
HOST_INIT = "/init"
"""What the host's own initrd begins with, if there is one."""
