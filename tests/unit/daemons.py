# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod as a process, started and heard as systemd does it, on a simulated machine."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import readable

ROOT = Path(__file__).parents[2]
CODE = "import khod.daemon; raise SystemExit(khod.daemon.main())"


@contextmanager
def powered(directory: Path) -> Iterator[Path]:
    """A simulated machine, switched on; the directory that it lives in."""
    there = directory / "machine"
    argv = [sys.executable, "-m", "khod.simulated", str(there), "--memory", "64M", "--init", "sh", "-c", "echo up; exec cat"]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "up\n"
            yield there
        finally:
            process.kill()


class Daemon:
    """One khod, in a directory with its machine. `before` is put before its command line, `listener` is passed to it as systemd
    passes sockets."""

    def __init__(
        self, directory: Path, *, before: Sequence[str] = (), code: str = CODE, listener: int = -1, **environment: str
    ) -> None:
        self.directory = directory
        self.socket = directory / "khod.sock"
        config = directory / "khod.yaml"
        if not config.exists():
            config.write_text(f"socket: {self.socket}\nmachine: simulated:{directory}/machine\n")
        runtime = directory / "runtime"
        runtime.mkdir(exist_ok=True)
        self.restored = runtime / "restored"
        self._notified = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        address = directory / f"notify.{time.monotonic_ns()}"
        self._notified.bind(str(address))
        self.heard: list[str] = []
        """Every line of every notification."""
        if listener >= 0:
            before = (*before, "bash", "-c", f'LISTEN_FDS=1 LISTEN_PID=$$ exec "$@" 3<&{listener}', "bash")
        self.process = subprocess.Popen(
            [*before, sys.executable, "-c", f"import sys; sys.argv = ['khod', '--config', {str(config)!r}]; {code}"],
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            pass_fds=(listener,) if listener >= 0 else (),
            env=os.environ | {"NOTIFY_SOCKET": str(address), "RUNTIME_DIRECTORY": str(runtime)} | environment,
        )

    def __enter__(self) -> Daemon:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()  # which nothing on its machine minds
        self.process.communicate()
        self._notified.close()

    def hear(self, what: str, seconds: float = 20.0) -> None:
        """Wait until a line that begins so is notified."""
        deadline = time.monotonic() + seconds
        while not any(line.startswith(what) for line in self.heard):
            ready = readable(self._notified, seconds=deadline - time.monotonic())
            assert ready, f"no {what!r} in {self.heard}; {self.process.poll()}"
            self.heard += self._notified.recv(4096).decode().splitlines()

    def forget(self) -> None:
        """What was heard so far is not asked about any more."""
        self.heard.clear()

    def end(self) -> tuple[int, str]:
        """SIGTERM; exit status and what it said on standard error."""
        self.process.send_signal(signal.SIGTERM)
        return self.ended()

    def ended(self) -> tuple[int, str]:
        """Wait for its end."""
        _, said = self.process.communicate(timeout=20)
        return self.process.returncode, said
