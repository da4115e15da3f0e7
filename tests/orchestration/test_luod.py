# SPDX-License-Identifier: LGPL-2.1-or-later
"""luo-agent's protocol by a plain socket, against khod on the simulated machine: across a jump, and what it is not to be spoken
like."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from khod.api import crowd, luod
from khod.api.lines import MAX_LINE
from khod.config import Limits, Rule
from khod.core.registry import Grade
from khod.core.state import State
from khod.errors import UpdateFailed
from khod.simulated import Process
from tests.integration.api.somebody import ONLY_ROOT, names
from tests.orchestration.world import ME, World


class Bridge:
    """A simulated descriptor leaves the machine as a memfd that holds its number in the workload's table."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.process = world.workload

    def adopt(self, real: int) -> int:
        raise AssertionError("clients of luod give nothing")

    def export(self, fd: int) -> int:
        real = os.memfd_create("exported")
        os.write(real, str(self._world.process.give(fd, self.process)).encode())
        return real

    def close(self, fd: int) -> None:
        self._world.host.machine.files.close(fd)


class Client:
    """A client of luo-agent: a blocking socket, a line at a time."""

    def __init__(self, path: Path) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(10)
        self.sock.connect(str(path))
        self._rest = b""
        self._fds: list[int] = []

    async def say(self, **said: Any) -> None:
        await self.pour(json.dumps(said).encode() + b"\n")

    async def pour(self, data: bytes) -> None:
        await asyncio.to_thread(self.sock.sendall, data)

    async def hear(self) -> dict[str, Any]:
        """The next line; {} when the other side hung up."""
        return await asyncio.to_thread(self._hear)

    def _hear(self) -> dict[str, Any]:
        while b"\n" not in self._rest:
            try:
                data, fds, _, _ = socket.recv_fds(self.sock, 4096, 4)
            except ConnectionResetError:
                return {}
            self._fds += fds
            if not data:
                return {}
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\n")
        heard: dict[str, Any] = json.loads(line)
        return heard

    def session(self) -> int:
        """The one descriptor that came: its number in the workload's table."""
        (real,) = self._fds
        self._fds.clear()
        number = int(os.pread(real, 20, 0))
        os.close(real)
        return number

    async def expect(self, event: str, **fields: Any) -> dict[str, Any]:
        heard = await self.hear()
        assert heard.get("event") == event, heard
        assert fields.items() <= heard.items(), heard
        return heard

    async def refused(self, because: str) -> None:
        assert because in (await self.expect("ERROR"))["error"]

    def close(self) -> None:
        self.sock.close()
        while self._fds:
            os.close(self._fds.pop())


class Luod:
    """What a test has at hand."""

    def __init__(self, world: World, path: Path, listener: luod.Listener, bridge: Bridge) -> None:
        self.world, self.path, self.listener, self.bridge = world, path, listener, bridge
        self._clients: list[Client] = []

    def client(self) -> Client:
        self._clients.append(Client(self.path))
        return self._clients[-1]

    def close(self) -> None:
        for client in self._clients:
            client.close()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what is the listener's doing."""
        async with asyncio.timeout(10):
            while not condition():  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.001)


@asynccontextmanager
async def listening(world: World, tmp_path: Path, **options: Any) -> AsyncIterator[Luod]:
    path = tmp_path / "luod" / "liveupdate.sock"
    bridge = Bridge(world)
    async with luod.serve(world.host, bridge, path, **options) as listener:
        here = Luod(world, path, listener, bridge)
        try:
            yield here
        finally:
            here.close()


def run(world: World, tmp_path: Path, test: Callable[[Luod], Awaitable[None]], **options: Any) -> None:
    """The test, with a started khod and its listener."""

    async def inside() -> None:
        async with asyncio.timeout(60):
            await world.khod()
            async with listening(world, tmp_path, **options) as here:
                await test(here)

    asyncio.run(inside())


def preserve(process: Process, session: int, fd: int) -> None:
    process.call("preserve_fd", session, fd, 0, True)


async def subscribed(here: Luod, client: Client, name: str = "vm-1") -> None:
    await client.say(cmd="SUBSCRIBE", id=name)
    host = here.world.host
    await here.until(lambda: any(e.name == name and host.broker.answers(e.handle) for e in host.registry))


def test_a_session_comes_through_two_jumps_by_the_published_protocol(world: World, tmp_path: Path) -> None:
    async def test(here: Luod) -> None:
        client = here.client()
        await subscribed(here, client)
        memory = world.memory(fill=b"opaque")

        async def answer() -> None:
            await client.expect("START_PRESERVATION")
            preserve(world.workload, client.session(), memory)
            await client.say(cmd="READY")

        answering = asyncio.create_task(answer())
        await world.jump()
        await answering

    async def after(here: Luod) -> None:
        workload = world.workload
        early = here.client()
        await early.say(cmd="SUBSCRIBE", id="vm-1")
        await early.refused("vm-1")  # it is there, and waits to be claimed
        client = here.client()
        await client.say(cmd="CLAIM", id="vm-1")
        await client.expect("CLAIMED", id="vm-1")
        session = client.session()
        memory = workload.call("retrieve_fd", session, 0)
        assert world.intact(memory, fill=b"opaque")
        workload.call("finish", session)
        workload.close(session)
        await subscribed(here, client)
        assert world.intact(memory, fill=b"opaque")

        async def answer() -> None:
            await client.expect("START_PRESERVATION")
            preserve(workload, client.session(), memory)
            await client.say(cmd="READY")

        answering = asyncio.create_task(answer())
        await world.jump()
        await answering

    async def at_last(here: Luod) -> None:
        client = here.client()
        await client.say(cmd="CLAIM", id="vm-1")
        await client.expect("CLAIMED", id="vm-1")
        assert world.intact(world.workload.call("retrieve_fd", client.session(), 0), fill=b"opaque")

    async def boots() -> None:
        async with asyncio.timeout(60):
            await world.khod()
            for boot in (test, after, at_last):
                async with listening(world, tmp_path) as here:
                    await boot(here)

    asyncio.run(boots())


def test_who_was_told_to_start_hears_that_it_was_undone_and_can_go_through_it_again(world: World, tmp_path: Path) -> None:
    async def test(here: Luod) -> None:
        client = here.client()
        await subscribed(here, client)
        memory = world.memory()
        for _ in range(2):
            following = asyncio.create_task(world.held(State.FROZEN))
            await client.expect("START_PRESERVATION")
            session = client.session()
            preserve(world.workload, session, memory)
            await client.say(cmd="READY")
            events = await following
            assert world.host.state is State.FROZEN
            await world.host.abort()
            with pytest.raises(UpdateFailed):
                await events
            await client.expect("ABORT_PRESERVATION")
            world.workload.close(session)
            world.workload.truncate(memory, 2 << 20)  # nothing preserves it any more
            world.workload.truncate(memory, 1 << 20)

    run(world, tmp_path, test)


def test_ready_is_a_lease_that_ends_with_the_connection(world: World, tmp_path: Path) -> None:
    async def test(here: Luod) -> None:
        client = here.client()
        await subscribed(here, client)
        following = asyncio.create_task(world.held(State.FROZEN))
        await client.expect("START_PRESERVATION")
        await client.say(cmd="READY")
        events = await following
        client.close()
        await here.until(lambda: here.listener.connections == 0)
        await world.host.proceed()
        with pytest.raises(UpdateFailed, match="gone"):
            await events
        assert not world.kernel.jumped

    run(world, tmp_path, test)


def test_hanging_up_is_the_end_of_the_instance(world: World, tmp_path: Path) -> None:
    async def test(here: Luod) -> None:
        client = here.client()
        await subscribed(here, client)
        client.close()
        await here.until(lambda: len(world.host.registry) == 0)

    run(world, tmp_path, test)


def test_a_khod_that_was_restarted_takes_its_clients_back(world: World, tmp_path: Path) -> None:
    async def boots() -> None:
        async with asyncio.timeout(60):
            await world.khod()
            async with listening(world, tmp_path) as here:
                await subscribed(here, here.client())
                first = world.entry("vm-1").handle
            world.kill(world.process)
            await world.khod()
            assert world.entry("vm-1").handle == first
            async with listening(world, tmp_path) as here:
                client = here.client()
                await client.say(cmd="SUBSCRIBE", id="vm-1")
                await here.until(lambda: any(e.attended and e.handle != first for e in world.host.registry))
                other = here.client()
                await other.say(cmd="SUBSCRIBE", id="vm-1")
                await other.refused("vm-1")  # somebody living has it
                await client.say(cmd="READY")
                await client.refused("READY answers START_PRESERVATION")

    asyncio.run(boots())


def test_claims_without_a_session(world: World, tmp_path: Path) -> None:
    async def test(here: Luod) -> None:
        client = here.client()
        await client.say(cmd="CLAIM", id="nobody")
        await client.expect("ERROR", id="nobody", answer="cold")
        await world.register("ram", world.memory())
        await world.jump()

    async def after(here: Luod) -> None:
        client = here.client()
        await client.say(cmd="CLAIM", id="ram")
        await client.refused("no session that its client filled")
        assert world.entry("ram").state == "restored"  # nothing changed hands

    async def boots() -> None:
        async with asyncio.timeout(60):
            await world.khod()
            for boot in (test, after):
                async with listening(world, tmp_path) as here:
                    await boot(here)

    asyncio.run(boots())


def test_what_makes_no_sense_is_refused_and_changes_nothing(world: World, tmp_path: Path) -> None:
    async def test(here: Luod) -> None:
        client = here.client()
        for said, because in (
            ({"cmd": "READY"}, "READY answers START_PRESERVATION"),
            ({"cmd": "FLY"}, "no such cmd"),
            ({}, "no such cmd"),
            ({"cmd": ["SUBSCRIBE"], "id": "x"}, "no such cmd"),
            ({"cmd": "SUBSCRIBE"}, "takes an id"),
            ({"cmd": "SUBSCRIBE", "id": 7}, "takes an id"),
            ({"cmd": "SUBSCRIBE", "id": "../etc"}, "'../etc'"),
            ({"cmd": "SUBSCRIBE", "id": "x" * 49}, "x" * 49),
            ({"cmd": "CLAIM", "id": None}, "takes an id"),
        ):
            await client.say(**said)
            await client.refused(because)
        assert len(world.host.registry) == 0
        await subscribed(here, client)
        await client.say(cmd="SUBSCRIBE", id="vm-1")
        await client.refused("subscribed as vm-1")
        await client.say(cmd="SUBSCRIBE", id="vm-2")
        await client.refused("subscribed as vm-1")
        assert [e.name for e in world.host.registry] == ["vm-1"]
        assert world.entry("vm-1").grade is Grade.OPAQUE

    run(world, tmp_path, test)


@pytest.mark.parametrize(
    "line",
    [b"\xff\xfe\n", b"hello\n", b"[]\n", b'"text"\n', b"\n", b"[" * 4000 + b"\n", b'{"cmd": "READY"\n'],
    ids=["not utf-8", "not json", "array", "string", "empty", "deep", "torn"],
)
def test_a_line_that_is_no_command_ends_the_connection(world: World, tmp_path: Path, line: bytes) -> None:
    async def test(here: Luod) -> None:
        client = here.client()
        await client.pour(line)
        await client.refused("a line that is no JSON")
        assert await client.hear() == {}
        await here.until(lambda: here.listener.connections == 0)

    run(world, tmp_path, test)


def test_a_line_without_end_ends_the_connection(world: World, tmp_path: Path) -> None:
    async def test(here: Luod) -> None:
        client = here.client()
        await client.pour(b"x" * (MAX_LINE * 3))
        await client.refused(f"more than {MAX_LINE} bytes")
        assert await client.hear() == {}

    run(world, tmp_path, test)


def test_descriptors_that_a_client_sends_never_arrive(world: World, tmp_path: Path) -> None:
    async def test(here: Luod) -> None:
        client = here.client()
        await client.say(cmd="FLY")
        await client.refused("no such cmd")
        read, write = os.pipe()
        with pytest.raises(PermissionError):  # by the kernel, since Linux 6.16
            await asyncio.to_thread(socket.send_fds, client.sock, [b'{"cmd": "FLY"}\n'], [write] * 200)
        os.close(write)
        await client.say(cmd="FLY")
        await client.refused("no such cmd")
        assert await asyncio.to_thread(os.read, read, 1) == b""  # the last writer is gone
        os.close(read)

    run(world, tmp_path, test)


def test_a_peer_who_does_not_read_is_hung_up_on(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "REFUSAL", 0)  # many answers, soon

    async def test(here: Luod) -> None:
        client = here.client()
        client.sock.setblocking(False)
        line = b'{"cmd": "FLY"}\n'
        async with asyncio.timeout(20):
            while here.listener.connections or not client._rest:
                client._rest = b"begun"
                try:
                    client.sock.send(line * 200)
                except BlockingIOError:
                    await asyncio.sleep(0.001)
                except (BrokenPipeError, ConnectionResetError):
                    break
                await asyncio.sleep(0)
        await here.until(lambda: here.listener.connections == 0)

    run(world, tmp_path, test)


def test_refusals_take_their_time(world: World, tmp_path: Path) -> None:
    async def test(here: Luod) -> None:
        one, other = here.client(), here.client()
        begun = asyncio.get_running_loop().time()
        for client in (one, other):
            await client.pour(b'{"cmd": "FLY"}\n' * 10)
        for client in (one, other):
            for _ in range(10):
                await client.refused("no such cmd")
        assert asyncio.get_running_loop().time() - begun >= 18 * crowd.REFUSAL  # of one user, one after another

    run(world, tmp_path, test)


def test_who_has_nothing_here_may_not_stay_for_long(world: World, tmp_path: Path) -> None:
    async def test(here: Luod) -> None:
        keeper, idler = here.client(), here.client()
        await subscribed(here, keeper)
        assert await idler.hear() == {}
        await here.until(lambda: here.listener.connections == 1)

    run(world, tmp_path, test, limits=Limits(idle=0.05))


_STRANGER = """
import os, socket, sys
os.setgroups([]); os.setgid(int(sys.argv[2])); os.setuid(int(sys.argv[2]))
socks = []
for _ in range(int(sys.argv[3])):
    sock = socket.socket(socket.AF_UNIX); sock.settimeout(20); sock.connect(sys.argv[1]); socks.append(sock)
    for said in sys.argv[4:]:
        try:
            sock.sendall(said.encode() + b"\\n"); print(sock.recv(4096).decode().strip())
        except (BrokenPipeError, ConnectionResetError):
            print()
"""


async def stranger(here: Luod, times: int, *said: str) -> list[str]:
    """What somebody who is not root is answered, on each of so many connections."""
    uid = pwd.getpwnam(names(1)[0]).pw_uid
    command = [sys.executable, "-I", "-S", "-c", _STRANGER, str(here.path), str(uid), str(times), *said]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return str(done.stdout).splitlines()


@ONLY_ROOT
def test_only_who_may_have_sessions_of_his_own_is_served(world: World, tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents[:3]:
        parent.chmod(0o755)

    async def test(here: Luod) -> None:
        answers = await stranger(here, 1, '{"cmd": "SUBSCRIBE", "id": "x"}', '{"cmd": "CLAIM", "id": "x"}')
        assert len(answers) == 2
        for answer in answers:
            assert "may not ask for kernel sessions" in answer
        assert len(world.host.registry) == 0

    run(world, tmp_path, test, rules=[Rule("any", "", ("instances",))])


@ONLY_ROOT
def test_nobody_claims_or_squats_what_is_anothers(world: World, tmp_path: Path) -> None:
    for parent in [tmp_path, *tmp_path.parents[:3]]:
        parent.chmod(0o755)

    async def test(here: Luod) -> None:
        await subscribed(here, here.client())
        (answer,) = await stranger(here, 1, '{"cmd": "CLAIM", "id": "vm-1"}')
        assert json.loads(answer)["answer"] == "hold"
        assert world.entry("vm-1").owner == ME.owner

    run(world, tmp_path, test, rules=[Rule("any", "", ("opaque",))])


@ONLY_ROOT
def test_one_user_has_so_many_connections(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for parent in [tmp_path, *tmp_path.parents[:3]]:
        parent.chmod(0o755)
    monkeypatch.setattr(luod, "MAX_CONNECTIONS_PER_USER", 2)

    async def test(here: Luod) -> None:
        answers = await stranger(here, 3, '{"cmd": "FLY"}')
        assert ["no such cmd" in answer for answer in answers] == [True, True, False]

    run(world, tmp_path, test, rules=[Rule("any", "", ("opaque",))])
