# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is handed over, as physical memory has it: read from the running kernel, or from a dump of one."""
