# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod and khoctl inside a machine, run as a user runs them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from khod.api.client import Client, connect
from khod.rehearsal.guest import Guest

SOCKET = Path("/run/khod/khod.sock")
CONFIG = Path("/run/khod.yaml")
NOTIFY = Path("/run/notify")
STATUS = "khoctl ended with status"


class Khod:
    """The daemon, started with its state on the disk that outlives the jump; READY=1 is waited for as systemd does."""

    def __init__(self, vm: Guest, settings: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        CONFIG.write_text(json.dumps({**settings, "state_directory": f"{vm.state}/khod"}))  # JSON is YAML
        self.vm = vm
        NOTIFY.unlink(missing_ok=True)
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._notified.bind(str(NOTIFY))
        self._notified.settimeout(vm.parameters["stage_deadline"])
        self.log = open(vm.shared / f"khod-{vm.stage}.log", "ab")  # noqa: SIM115  # open as long as khod runs
        argv = [sys.executable, "-S", "-m", "khod.daemon", "--config", str(CONFIG)]
        variables = {**os.environ, **(environment or {}), "NOTIFY_SOCKET": str(NOTIFY)}
        self.process = subprocess.Popen(argv, stdout=self.log, stderr=self.log, env=variables)
        self.told("READY=1")

    def told(self, what: str) -> str:
        """Wait until khod tells systemd something with these words in it."""
        while what not in (text := self._notified.recv(4096).decode()):
            pass
        return text

    def stop(self) -> int:
        """SIGTERM, and wait; its exit status."""
        self.process.terminate()
        return self.process.wait(30)

    def client(self) -> Client:
        """A connection to its API."""
        return connect(SOCKET)

    def khoctl(self, *words: str) -> Iterator[str]:
        """Run khoctl, as a process of its own; the lines that it prints, errors too, and last its exit status in words."""
        argv = [sys.executable, "-S", "-c", "from khod.cli import main; main()", "--socket", str(SOCKET), *words]
        with subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
            assert running.stdout
            yield from running.stdout
        yield f"{STATUS} {running.returncode}"
