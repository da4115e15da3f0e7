# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod to talk to: the varlink interface ``org.khod.Host``, the server behind it, and a client."""
