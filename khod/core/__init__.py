# SPDX-License-Identifier: LGPL-2.1-or-later
"""Policy: what khod does with a machine. Knows the ports, never which machine is behind them."""
