# SPDX-License-Identifier: LGPL-2.1-or-later
"""The folio map: what is preserved, how it is written, and how it is read."""
