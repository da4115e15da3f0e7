# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hand of a test in the lab's host: runs commands there, and passes on what programs there have to tell.

A unit of the image (``khod-lab.service``) in each of its kernels. One JSON object a line in both directions, over a virtio
serial port; ``host.py`` has the other half:

    {"id": 1, "argv": [...], "input": "", "seconds": 30}   ->  {"event": "done", "id": 1, "status": 0, "out": "", "err": ""}

Commands run side by side. A program that was started otherwise tells the test something by a datagram to /run/khod-lab.sock,
``{"name": "held", "facts": {...}}``, which goes on as {"event": "record", ...}. The standard library alone: the image's
Python runs it, and every import costs a tenth of a second under emulation.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import threading
from pathlib import Path
from typing import Any

PORT = "khod.verdict"
LISTEN_FD = 3
"""The socket of ``khod-lab.socket`` (SD_LISTEN_FDS_START): what is told before we are there waits in it."""
ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME": "/root", "LANG": "C.UTF-8"}
"""Of a command: a shell's, without what the service manager told us alone."""
METADATA = Path("/sys/kernel/debug/kho/in/sub_fdts/kexec-metadata")


def kexec_count() -> int:
    """Jumps since the cold boot: u32 at 69 of struct kho_kexec_metadata. Of the kernel, not of khod, which is under test."""
    try:
        return int(struct.unpack_from("=I", METADATA.read_bytes(), 69)[0])
    except FileNotFoundError:
        return 0


def open_port() -> int:
    """The serial port to the test. There is no udev here to make the link in /dev/virtio-ports."""
    for port in Path("/sys/class/virtio-ports").iterdir():
        if (port / "name").read_text().strip() == PORT:
            return os.open(f"/dev/{port.name}", os.O_RDWR | os.O_CLOEXEC)
    raise FileNotFoundError(f"no virtio serial port named {PORT}")


class Agent:
    """Both directions of the port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._lock = threading.Lock()
        self._stage = kexec_count()

    def tell(self, event: str, **fields: Any) -> None:
        """One line to the test."""
        data = json.dumps({"event": event, "stage": self._stage, **fields}).encode() + b"\n"
        with self._lock:
            while data:
                data = data[os.write(self._port, data) :]

    def serve(self) -> None:
        """Run what the test asks for, until it closes."""
        pending = b""
        while part := os.read(self._port, 1 << 16):
            *lines, pending = (pending + part).split(b"\n")
            for line in lines:
                threading.Thread(target=self._run, kwargs=json.loads(line), daemon=True).start()

    def relay(self, told: socket.socket) -> None:
        """Pass on what programs tell."""
        while True:
            self.tell("record", **json.loads(told.recv(1 << 16)))

    def _run(self, id: int, argv: list[str], input: str, seconds: float) -> None:
        try:
            done = subprocess.run(
                argv, input=input.encode(), capture_output=True, timeout=seconds, check=False, env=ENVIRONMENT
            )
            status, out, err = done.returncode, done.stdout, done.stderr
        except subprocess.TimeoutExpired as late:
            status, out, err = 124, late.stdout or b"", (late.stderr or b"") + f"\nended after {seconds} s".encode()
        except OSError as error:
            status, out, err = 127, b"", str(error).encode()
        self.tell("done", id=id, status=status, out=out.decode(errors="replace"), err=err.decode(errors="replace"))


def main() -> None:
    """Say that we are there, and serve."""
    with socket.socket(fileno=LISTEN_FD) as told:
        agent = Agent(open_port())
        threading.Thread(target=agent.relay, args=(told,), daemon=True).start()
        agent.tell("begin", uptime=float(Path("/proc/uptime").read_text().split()[0]))
        agent.serve()


if __name__ == "__main__":
    main()
