# SPDX-License-Identifier: LGPL-2.1-or-later
"""A khod that says what a test tells it to: varlink by hand, a thread a connection, with nothing of khod's own server in it."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from khod.core.views import InstanceView

DEADLINE = 10.0
Answer = tuple[dict[str, Any], list[int]]


@dataclass
class Heard:
    """A call as it came in."""

    method: str
    parameters: dict[str, Any]
    fds: list[int]
    line: Line
    answered: threading.Event = field(default_factory=threading.Event)


@dataclass(eq=False)
class Line:
    """One connection."""

    sock: socket.socket
    ended: threading.Event = field(default_factory=threading.Event)

    def say(self, message: dict[str, Any], fds: list[int] | None = None) -> None:
        data = json.dumps(message).encode() + b"\0"
        if fds:
            socket.send_fds(self.sock, [data], fds)
        else:
            self.sock.sendall(data)

    def tell(self, phase: str, update: str = "", **fields: Any) -> None:
        """An event of a subscription."""
        view = {"phase": phase, "update": update, "handles": [], "deadline": 0.0, "reason": ""} | fields
        self.say({"parameters": {"event": view}, "continues": True})

    def hang_up(self) -> None:
        self.sock.shutdown(socket.SHUT_RDWR)


class ScriptedKhod:
    """Answers with what is planned for a method, or with the default below; keeps what it heard, in order."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = "idle"
        self.plans: dict[str, list[Callable[[Heard], Answer | None]]] = {}
        """By method: the next answers, before the defaults. None: no answer at all."""
        self.heard: list[Heard] = []
        self.lines: list[Line] = []
        self.state_size = 4096
        self.state_files: dict[str, int] = {}
        """What clients got of GetStates, by name: duplicates."""
        self._changed = threading.Condition()
        self._handles = 0
        self._taken = 0
        self._threads: list[threading.Thread] = []
        self.up()

    def up(self) -> None:
        """Listen."""
        self._listener = socket.socket(socket.AF_UNIX)
        self.path.unlink(missing_ok=True)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._start(self._accept, self._listener)

    def down(self) -> None:
        """Die: every connection ends and nobody listens. Again: no effect."""
        if self._listener.fileno() < 0:
            return
        self._listener.shutdown(socket.SHUT_RDWR)
        for line in list(self.lines):
            if not line.ended.is_set():
                line.hang_up()
        for thread in self._threads:
            thread.join(DEADLINE)
            assert not thread.is_alive()
        self._threads.clear()
        self._listener.close()

    def close(self) -> None:
        self.down()
        for fd in [*self.state_files.values(), *(fd for heard in self.heard for fd in heard.fds)]:
            os.close(fd)

    def plan(self, method: str, answer: Callable[[Heard], Answer | None]) -> None:
        self.plans.setdefault(method, []).append(answer)

    def refuse(self, method: str, kind: str, message: str) -> None:
        def refusal(_: Heard) -> Answer:
            return {"error": f"org.khod.Host.{kind}", "parameters": {"message": message, "hint": ""}}, []

        self.plan(method, refusal)

    def next(self, *methods: str) -> Heard:
        """Wait for the next call, which must be one of these, and for the end of its answer."""
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.heard) > self._taken, DEADLINE), f"no {methods} came"
            heard = self.heard[self._taken]
            self._taken += 1
        assert heard.answered.wait(DEADLINE)
        assert heard.method in methods, heard
        return heard

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args)
        self._threads.append(thread)
        thread.start()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                sock, _ = listener.accept()
            except OSError:
                return
            line = Line(sock)
            self.lines.append(line)
            self._start(self._serve, line)

    def _serve(self, line: Line) -> None:
        buffer, fds = b"", list[int]()
        try:
            while True:
                while b"\0" not in buffer:
                    data, came, _, _ = socket.recv_fds(line.sock, 1 << 16, 16)
                    fds += came
                    if not data:
                        return
                    buffer += data
                message, _, buffer = buffer.partition(b"\0")
                call = json.loads(message)
                heard = Heard(call["method"].removeprefix("org.khod.Host."), call.get("parameters", {}), fds, line)
                fds = []
                with self._changed:  # in the order in which they came, on whatever connection
                    self.heard.append(heard)
                    self._changed.notify_all()
                self._answer(heard)
                heard.answered.set()
        except (ConnectionResetError, BrokenPipeError):
            return
        finally:
            line.ended.set()
            line.sock.close()

    def _answer(self, heard: Heard) -> None:
        plan = self.plans.get(heard.method)
        answer = plan.pop(0)(heard) if plan else getattr(self, f"_{heard.method}")(heard)
        if answer is not None:
            message, fds = answer
            heard.line.say(message, fds)
            for fd in fds:
                os.close(fd)

    # --- the defaults

    def _Register(self, heard: Heard) -> Answer:
        self._handles += 1
        name = heard.parameters["name"]
        instance = InstanceView(
            name=name, driver="guestmemfd", compatible="khod,guestmemfd-v1", owner="user:root", required=True, requires=(),
            state="registered", size=0, fds=(),
        )  # fmt: skip
        return {"parameters": {"instance": asdict(instance), "handle": f"h{self._handles}"}}, []

    _RegisterOpaque = _Register

    def _Subscribe(self, heard: Heard) -> None:
        heard.line.tell("subscribed", reason=self.state)

    def _GetStates(self, heard: Heard) -> Answer:
        fd = os.memfd_create("state")
        os.ftruncate(fd, self.state_size)
        self.state_files["vcpus"] = os.dup(fd)
        return {"parameters": {"states": [{"name": "vcpus", "fd": 0}]}}, [fd]

    def _OpenSession(self, heard: Heard) -> Answer:
        return {"parameters": {"session": 0}}, [os.memfd_create("session")]

    def _nothing(self, heard: Heard) -> Answer:
        return {"parameters": {}}, []

    _Ready = _Failed = _Finished = _Unregister = _nothing
