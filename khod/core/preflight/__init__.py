# SPDX-License-Identifier: LGPL-2.1-or-later
"""Everything that can be known before an update, as a table of checks: `situation` looks, the checks judge what was seen."""
