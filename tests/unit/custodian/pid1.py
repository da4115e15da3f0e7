# SPDX-License-Identifier: LGPL-2.1-or-later
"""PID 1 as a custodian sees it: a socket for its words, an fd store that does what systemd.service(5) says, and descriptors
from the store at every start. And processes: which of the two serves, and how each is killed."""

from __future__ import annotations

import fcntl
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from khod.custodian.luo import F_DUPFD_QUERY
from khod.kernel.custody import PROGRAM

DEADLINE = 20


def twins(path: Path) -> tuple[int, int]:
    """The process that serves at a socket, and its twin, which is its child. Zombies do not count."""
    found = {}
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(path) in (entry / "cmdline").read_text().split("\0"):
                found[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
    (serving,) = (pid for pid, parent in found.items() if parent not in found)
    (sleeping,) = (pid for pid in found if pid != serving)
    return serving, sleeping


def links(path: Path) -> list[str]:
    """What the custodian at a socket has open, numbers left out; without connections, of whose end it hears when it hears."""
    serving, _ = twins(path)
    found = []
    for entry in Path(f"/proc/{serving}/fd").iterdir():
        with suppress(FileNotFoundError):  # a connection that ends just now
            found.append(str(entry.readlink()).partition("[")[0])
    return sorted(link for link in found if link != "socket:")


def kill(*pids: int) -> None:
    """SIGKILL, and wait until they are dead, whoever's children they are."""
    fds = [os.pidfd_open(pid) for pid in pids]
    for fd in fds:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    for fd in fds:
        wait(fd)
        os.close(fd)


def kill_both(path: Path) -> None:
    """Kill both at once: neither sees the other's death."""
    serving, sleeping = twins(path)
    os.kill(sleeping, signal.SIGSTOP)
    kill(serving, sleeping)


def wait(fd: int, events: int = select.POLLIN) -> None:
    poll = select.poll()
    poll.register(fd, events)
    assert poll.poll(DEADLINE * 1000), "nothing happened before the deadline"


class Pid1:
    """Starts the program of `argv` as a unit with a store of `room` descriptors (0: none)."""

    def __init__(self, directory: Path, room: int = 512) -> None:
        self.socket_path = directory / "custodian.sock"
        self.room = room
        self.store: list[tuple[str, int]] = []
        self.dropped = 0
        """Descriptors that were more than the store takes."""
        self.said: list[str] = []
        self.main_pid = 0
        self.running = threading.Event()
        """Cleared, PID 1 does nothing: it is being reloaded, or worse."""
        self.running.set()
        self.heard = 0
        """Words about the store."""
        self.stop_at = 0
        """Which of them clears `running`."""
        self.changed = threading.Condition()
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._address = str(directory / "notify")
        self._notify.bind(self._address)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    # -- the unit

    def start(self, *options: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start it, with what is in the store, and wait for READY=1."""
        ours, theirs = socket.socketpair()
        ready = sum(text == "READY=1" for text in self.said)
        names = ":".join(name for name, _ in self.store)
        variables = {"NOTIFY_SOCKET": self._address, **environment}
        if self.room:
            variables["FDSTORE"] = str(self.room)
        command = [sys.executable, "-I", "-S", str(Path(__file__).with_name("launch.py")), names]
        with ours, theirs:
            process = subprocess.Popen(
                [*command, sys.executable, "-I", "-S", PROGRAM, "--socket", str(self.socket_path), *options],
                stdin=theirs.fileno(),
                env=variables,
            )
            self._processes.append(process)
            for i in range(0, len(self.store), 100):
                socket.send_fds(ours, [b"x"], [fd for _, fd in self.store[i : i + 100]])
            self.until(lambda: sum(text == "READY=1" for text in self.said) > ready)
        return process

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on what was said and stored holds."""
        with self.changed:
            assert self.changed.wait_for(condition, DEADLINE), (self.said[-5:], [name for name, _ in self.store])

    def until_there_are_two(self) -> None:
        """Wait until a survivor has made its twin; it may be at work, and answer nobody, from then on."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            with suppress(ValueError):
                self.twins()
                return
        raise AssertionError("the survivor stays alone")

    def settle(self) -> None:
        """Wait until all that was said has been done."""
        ours, theirs = os.pipe()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.connect(self._address)
            socket.send_fds(channel, [b"BARRIER=1"], [theirs])
        os.close(theirs)
        wait(ours, 0)
        os.close(ours)

    def names(self) -> list[str]:
        return sorted(name for name, _ in self.store)

    def twins(self) -> tuple[int, int]:
        return twins(self.socket_path)

    def kill_both(self) -> None:
        kill_both(self.socket_path)

    def end(self) -> None:
        with suppress(ValueError):  # there are no two
            self.kill_both()
        for process in self._processes:
            process.kill()
            process.wait(DEADLINE)
        self.running.set()
        self._notify.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE)
        self._notify.close()
        for _, fd in self.store:
            os.close(fd)

    # -- what it does with a message

    def _run(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._notify, 4096, 8)
            with self.changed:
                self.heard += data.startswith((b"FDSTORE", b"BARRIER"))
                if self.stop_at and self.heard == self.stop_at:
                    self.stop_at = 0
                    self.running.clear()
                    self.changed.notify_all()
            self.running.wait()
            if not data:
                return
            with self.changed:
                self._take(data.decode().split("\n"), fds)
                self.changed.notify_all()

    def _take(self, lines: list[str], fds: list[int]) -> None:
        name = next((line[7:] for line in lines if line.startswith("FDNAME=")), "stored")
        if "FDSTORE=1" in lines:
            for fd in fds:
                known = any(fcntl.fcntl(fd, F_DUPFD_QUERY, other) for _, other in self.store)
                self.dropped += not known and len(self.store) >= self.room
                if known or len(self.store) >= self.room:
                    os.close(fd)
                else:
                    self.store.append((name, fd))
            return
        if "FDSTOREREMOVE=1" in lines:
            for entry in [entry for entry in self.store if entry[0] == name]:
                self.store.remove(entry)
                os.close(entry[1])
            return
        for fd in fds:  # of a BARRIER=1
            os.close(fd)
        for line in lines:
            if line.startswith("MAINPID="):
                self.main_pid = int(line[8:])
        self.said += lines
