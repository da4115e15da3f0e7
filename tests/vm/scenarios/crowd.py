# SPDX-License-Identifier: LGPL-2.1-or-later
"""Two hundred clients of eight descriptors each, of a few processes and two users; five of them mean harm.

The harmless ones are a user's who may only have instances; the others are another such user's. One of those never answers.
First its instance is required, so the update does not happen, and everybody goes on; then it is optional, and stays behind.
"""

from __future__ import annotations

import fcntl
import json
import os
import pwd
import socket
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from khod.api.client import Client, connect
from khod.client import Notice, Participant, Workload
from khod.errors import KhodError, Refused, UpdateFailed
from khod.rehearsal.inside import SOCKET
from tests.vm.driving import Khod
from tests.vm.guest import Guest

GOOD, BAD = "daemon", "nobody"
PROCESSES, EACH, FILES, SIZE = 5, 39, 8, 8192
SEALS = 0x2 | 0x4  # F_SEAL_SHRINK | F_SEAL_GROW
POLICY = [{"user": name, "may": ["instances"]} for name in (GOOD, BAD)]
DEADLINES = {"preparing": 30.0, "freezing": 30.0}


def become(user: str) -> None:
    entry = pwd.getpwnam(user)
    os.setgroups([])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def memory(text: str, seals: int = SEALS) -> int:
    fd = os.memfd_create(text, 0x2 | 0x10)  # MFD_ALLOW_SEALING | MFD_EXEC
    os.ftruncate(fd, SIZE)
    os.pwrite(fd, text.encode(), 0)
    fcntl.fcntl(fd, 1033, seals)  # F_ADD_SEALS
    return fd


def text_of(name: str, index: int) -> str:
    return f"{name}, descriptor {index}"


class Tally(Workload):
    """What the clients of one process have heard."""

    def __init__(self) -> None:
        self.lock, self.aborted_ones, self.still = threading.Lock(), 0, 0

    def quiesce(self, notice: Notice) -> None:
        with self.lock:
            self.still += 1

    def aborted(self, notice: Notice) -> None:
        with self.lock:
            self.aborted_ones += 1


def in_child(user: str, work: Callable[[Callable[[Any], None]], None]) -> Any:
    """Work in a process of a user, which says lines of JSON: a file of them."""
    inward, outward = os.pipe()
    if os.fork() == 0:
        try:
            os.close(inward)
            become(user)
            with open(outward, "w", buffering=1) as out:
                try:
                    work(lambda said: print(json.dumps(said), file=out))
                except BaseException:
                    print(json.dumps(traceback.format_exc()), file=out)
        finally:
            os._exit(0)
    os.close(outward)
    return open(inward)


def harmless(number: int) -> Callable[[Callable[[Any], None]], None]:
    def work(say: Callable[[Any], None]) -> None:
        tally, participants = Tally(), []
        for index in range(EACH):
            name = f"c{number * EACH + index}"
            participant = Participant(tally, path=SOCKET)
            participant.register(name, {f"f{i}": memory(text_of(name, i)) for i in range(FILES)})
            participant.start()
            participants.append(participant)
        say("registered")
        while tally.aborted_ones < EACH:
            os.sched_yield()
        say({"aborted": tally.aborted_ones, "still": tally.still})
        threading.Event().wait()

    return work


def silent(client: Client, name: str, required: bool) -> str:
    """Subscribe, and never answer."""
    handle = client.register(name, "guestmemfd", [("ram", memory(name))], required=required).handle
    subscription = connect(SOCKET)
    next(iter(subscription.subscribe([handle])))
    silent_ones.append(subscription)
    return handle


silent_ones: list[Client] = []


def refusal(work: Callable[[], Any]) -> str:
    """The class of what it raises."""
    try:
        return f"answered {work()}"
    except KhodError as error:
        return type(error).__name__


def twice(say: Callable[[Any], None]) -> None:
    """Answers everything twice."""
    with connect(SOCKET) as line, connect(SOCKET) as answers:
        handle = line.register("twice", "guestmemfd", [("ram", memory("twice"))], required=False).handle
        said = []
        for view in line.subscribe([handle]):
            if view.phase == "subscribed":
                say("registered")
            if view.deadline:
                answers.ready(view.update, view.phase, [handle])
                said.append(refusal(lambda view=view: answers.ready(view.update, view.phase, [handle])))  # type: ignore[misc]
            if view.phase == "quiesce":
                say({"second answers": said})


def garbage(say: Callable[[Any], None]) -> None:
    """Registers, and sends what is no message; and another one a message of a gibibyte."""
    with connect(SOCKET) as client:
        client.register("garbage", "guestmemfd", [("ram", memory("garbage"))])
        client._sock.sendall(bytes(range(1, 256)) + b"\0")
        ended = client._sock.recv(1 << 16)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(SOCKET))
        block, sent = b'{"method":"' + b"x" * (1 << 20), 0
        try:
            while sent < 1 << 30:
                sent += sock.send(block)
        except OSError:
            pass
    say({"garbage": ended.decode(errors="replace"), "sent": sent})


def thief(say: Callable[[Any], None]) -> None:
    """Takes what is not his, and gives what could still grow."""
    with connect(SOCKET) as client:
        say(
            {
                "claim": refusal(lambda: client.claim("c0", owner=f"user:{GOOD}")),
                "unregister": refusal(lambda: client.unregister("c1", owner=f"user:{GOOD}")),
                "discard": refusal(lambda: client.discard("c2", owner=f"user:{GOOD}")),
                "update": refusal(lambda: list(client.update())),
                "grows": refusal(lambda: client.register("grows", "guestmemfd", [("ram", memory("grows", seals=0))])),
            }
        )


def before(vm: Guest) -> None:
    khod = Khod(vm, policy=POLICY, deadlines=DEADLINES)
    began = time.monotonic()
    crowd = [in_child(GOOD, harmless(number)) for number in range(PROCESSES)]
    for process in crowd:
        assert (said := json.loads(process.readline())) == "registered", said
    registered = time.monotonic() - began
    answers_twice = in_child(BAD, twice)
    assert (said := json.loads(answers_twice.readline())) == "registered", said
    vm.record("garbage", **json.loads(in_child(BAD, garbage).readline()))
    vm.record("thief", **json.loads(in_child(BAD, thief).readline()))

    with khod.client() as client, khod.client() as quiet:
        client.load(str(vm.kernel))
        count = client.status().instances
        handle = silent(quiet, "silent", True)
        began = time.monotonic()
        try:
            list(client.update())
            raise AssertionError("an update without a required answer")
        except UpdateFailed as error:
            said = str(error)
        refused = time.monotonic() - began
        told = [json.loads(process.readline()) for process in crowd]
        vm.record(
            "refused", said=said, seconds=refused, registering=registered, instances=count,
            aborted=sum(t["aborted"] for t in told), still=sum(t["still"] for t in told),
        )  # fmt: skip
        silent_ones.pop().close()
        quiet.unregister(handle=handle)
        silent(quiet, "silent", False)
        try:
            for event in client.update(hold_at="frozen"):
                if event.kind == "held":
                    break
        except Refused as error:
            raise AssertionError(str(error)) from error
        vm.record("twice", **json.loads(answers_twice.readline()))
        quiet.proceed()
    threading.Event().wait()


def after(vm: Guest) -> None:
    khod = Khod(vm, policy=POLICY, deadlines=DEADLINES)

    def claim(say: Callable[[Any], None]) -> None:
        whole = 0
        with connect(SOCKET) as client:
            for number in range(PROCESSES * EACH):
                name = f"c{number}"
                answer = client.claim(name)
                expected = {f"f{i}": text_of(name, i) for i in range(FILES)}
                found = {
                    n: os.pread(fd, 100, 0).split(b"\0")[0].decode() for n, fd in zip(answer.names, answer.fds, strict=True)
                }
                whole += found == expected and answer.answer == "fds"
                client.finished(answer.handle)
                for fd in answer.fds:
                    os.close(fd)
            say({"whole": whole})
            threading.Event().wait()

    def steal(say: Callable[[Any], None]) -> None:
        with connect(SOCKET) as client:
            say({"claim": refusal(lambda: client.claim("c0", owner=f"user:{GOOD}")), "own": client.claim("silent").answer})

    with khod.client() as client:
        vm.record("restored", state=str(client.status().state), seconds=next(iter(client.history())).outcome)
        vm.record("thief after", **json.loads(in_child(BAD, steal).readline()))
        vm.record("claimed", **json.loads(in_child(GOOD, claim).readline()))
        vm.record("end", left=[i.name for i in client.instances() if i.state == "restored"])
