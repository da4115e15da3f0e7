# SPDX-License-Identifier: LGPL-2.1-or-later
"""What programs in the lab's host have in common: telling the test, and the service manager's descriptor store."""

from __future__ import annotations

import array
import json
import os
import socket
from typing import Any

TOLD = "/run/khod-lab.sock"


def tell(name: str, **facts: Any) -> None:
    """Tell the test: `Host.record`. Waits in the socket while the agent is not there yet."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        out.sendto(json.dumps({"name": name, "facts": facts}).encode(), TOLD)


def notify(text: str, *fds: int) -> None:
    """sd_notify(3)."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        out.sendmsg([text.encode()], rights, 0, os.environ["NOTIFY_SOCKET"])


def stored() -> dict[str, int]:
    """Descriptors that the manager passed, by name (sd_listen_fds(3))."""
    names = os.environ.get("LISTEN_FDNAMES", "")
    return {name: 3 + index for index, name in enumerate(names.split(":") if names else [])}
