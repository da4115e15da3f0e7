# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod for those whose memory it moves: VMMs, databases, anything that must stand still for a jump.

`khod.client.aio` has the same for programs on an event loop.
"""

from khod.client.answers import Claimed, Cold, Hold, StateWriter
from khod.client.participant import Participant
from khod.client.workload import Notice, Workload

__all__ = ["Claimed", "Cold", "Hold", "Notice", "Participant", "StateWriter", "Workload"]
