# SPDX-License-Identifier: LGPL-2.1-or-later
"""A kernel as a process of its own: it serves its socket, runs init, and ends with a jump or with init."""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from ctypes import CDLL
from pathlib import Path
from typing import Any

from khod.simulated import wire
from khod.simulated.faults import KernelPanic, OpenFailed, ProcessDied
from khod.simulated.kernel import Kernel
from khod.simulated.layout import ENVIRONMENT, JUMPED, PANICKED, SOCKET
from khod.simulated.process import RealFd
from khod.simulated.task import Task

_PR_SET_CHILD_SUBREAPER = 36


class Server:
    """Serves one kernel on its socket, a thread for each process."""

    def __init__(self, kernel: Kernel, on_jump: Callable[[], None]) -> None:
        self._kernel = kernel
        self._on_jump = on_jump
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        (kernel.directory / SOCKET).unlink(missing_ok=True)
        with wire.socket_address(kernel.directory) as address:
            self._listener.bind(address)
        self._listener.listen(64)

    def start(self) -> None:
        """Accept processes from now on, in the background."""
        threading.Thread(target=self._accept, daemon=True, name="accept").start()

    def close(self) -> None:
        """Accept nobody any more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True, name="process").start()

    def _serve(self, connection: socket.socket) -> None:
        task: Task | None = None
        with connection:
            try:
                while (message := wire.receive(connection)) is not None:
                    if message["call"] == "hello":
                        task = self._kernel.new_task(*message["args"])
                        wire.send(connection, {"result": task.pid})
                    else:
                        assert task is not None
                        self._answer(connection, task, message)
            except (OSError, EOFError, ProcessDied):
                pass  # a process that is gone has nobody to be told
            finally:
                if task is not None:
                    self._kernel.end(task)

    def _answer(self, connection: socket.socket, task: Task, message: wire.Message) -> None:
        answer: dict[str, Any]
        try:
            answer = {"result": self._kernel.syscall(task, message["call"], *message["args"])}
        except OSError as error:
            answer = {"errno": error.errno, "text": error.strerror or "", "opening": isinstance(error, OpenFailed)}
        except ValueError as error:
            answer = {"wrong": str(error)}
        except ProcessDied as death:
            if self._kernel.jumped:
                self._on_jump()  # its sockets close with this process: that is how the others learn
                threading.Event().wait()
            answer = {"died": str(death)}
        wire.send(connection, answer)
        if isinstance(result := answer.get("result"), RealFd):
            os.close(result.fd)


def run(directory: Path, command: Sequence[str], lifeline: int) -> int:
    """Boot the machine in `directory`, run `command` as init, and return the exit status of this kernel's process.

    `lifeline` is a pipe whose other end the power supply holds: when it closes, the power is off.
    """
    try:
        kernel = Kernel.boot(directory)
    except KernelPanic as panic:
        print(f"Kernel panic - not syncing: {panic}", file=sys.stderr)  # noqa: T201
        return PANICKED
    # Daemons that init leaves behind become ours, so that the jump can end them all.
    CDLL(None)["prctl"](_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    ends: queue.Queue[int] = queue.Queue()
    server = Server(kernel, lambda: ends.put(JUMPED))
    server.start()
    init = subprocess.Popen(list(command), env={**os.environ, ENVIRONMENT: str(directory.resolve())})
    threading.Thread(target=lambda: ends.put(_status(init.wait())), daemon=True).start()
    threading.Thread(target=lambda: ends.put(128 + signal.SIGTERM if not os.read(lifeline, 1) else 0), daemon=True).start()
    status = ends.get()
    server.close()
    _kill_descendants()
    if kernel.jumped:
        return JUMPED
    kernel.power_off()
    return status


def _status(returncode: int) -> int:
    return 128 - returncode if returncode < 0 else returncode


def _kill_descendants() -> None:
    """End every process below this one, its orphans included, and reap them."""
    while children := _children(os.getpid()):
        for pid in children:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in children:
            with suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        with suppress(FileNotFoundError):
            found += [int(child) for child in (task / "children").read_text().split()]
    return found
