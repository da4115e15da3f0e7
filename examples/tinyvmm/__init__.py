# SPDX-License-Identifier: LGPL-2.1-or-later
"""A small VMM whose guest runs on through live updates: an example of a client of khod, and no part of it."""
