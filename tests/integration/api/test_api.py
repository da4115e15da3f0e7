# SPDX-License-Identifier: LGPL-2.1-or-later
"""The varlink interface over a real unix socket: calls, answers, errors, descriptors."""

from __future__ import annotations

import asyncio
import json
import os
import pwd
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from khod import errors
from khod.api import faults, raising
from khod.api.client import Client, connect
from khod.api.host import HostInterface
from khod.api.listening import listen
from khod.core.callers import Lifetime
from khod.core.driver import StateBound
from khod.core.service import Registration
from khod.core.state import State
from khod.core.views import LifecycleView
from khod.errors import FdNotPreservable, InvalidRequest, KhodError, Lost, MachineError, NotAKernel, Refused, UpdateFailed
from tests.integration.api.served import Served, served

DOCS = Path(__file__).parents[3] / "docs"
PAGE = 4096
ME = pwd.getpwuid(os.getuid()).pw_name


@contextmanager
def memfd(content: bytes = b"x" * PAGE) -> Iterator[int]:
    fd = os.memfd_create("ram", os.MFD_CLOEXEC)
    try:
        os.pwrite(fd, content, 0)
        yield fd
    finally:
        os.close(fd)


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def same(view: object, other: object) -> bool:
    return msgspec.json.encode(view) == msgspec.json.encode(other)


# --- every method


def test_views_arrive_as_they_were_made(khod: Served, client: Client) -> None:
    with memfd() as fd:
        client.register("vm1", "guestmemfd", [("ram", fd)], required=False, requires=["net"], options={"a": "b"})
    client.load("/boot/bzImage", "/boot/initrd", "quiet")
    service = khod.service
    assert same(client.status(), khod.run(service.status()))
    assert same(client.instances(), khod.run(service.instances()))
    assert same(client.plan(), khod.run(service.plan()))
    assert same(client.preflight(), khod.run(service.preflight()))
    assert same(client.preflight("/boot/other", cmdline="quiet"), khod.run(service.preflight("/boot/other", cmdline="quiet")))
    assert same(client.inspect(), khod.run(service.inspect()))
    for _ in client.update():
        pass
    assert same(client.history(), khod.run(service.history()))
    assert len(client.history(limit=0)) == 0


def test_registering_brings_the_file_and_says_who_asked(khod: Served, client: Client) -> None:
    with memfd(b"a" * PAGE) as ram, memfd(b"b" * 2 * PAGE) as rom:
        view = client.register("vm1", "guestmemfd", [("ram", ram), ("rom", rom)]).instance
        assert (view.owner, view.size, list(view.fds)) == (
            f"user:{ME}",
            3 * PAGE,
            ["ram", "rom"],
        )
        (first, second) = khod.service.of("vm1").fds
        reals = khod.files.table
        assert os.path.samestat(os.fstat(reals[first]), os.fstat(ram))
        assert os.path.samestat(os.fstat(reals[second]), os.fstat(rom))
        assert not os.get_inheritable(reals[first])


def test_adoption(client: Client) -> None:
    with memfd() as fd:
        view = client.adopt("vm1", "guestmemfd", os.getpid(), [("ram", fd)], required=False).instance
        assert (view.size, view.required) == (PAGE, False)
        with pytest.raises(InvalidRequest, match=r"no process 1$"):
            client.adopt("vm2", "guestmemfd", 1, [("ram", fd)])


def test_claim_gives_the_same_file_and_closes_the_machines_descriptors(khod: Served, client: Client) -> None:
    with memfd(b"guest") as fd:
        client.register("vm1", "guestmemfd", [("ram", fd)])
        answer = client.claim("vm1")
        assert (answer.answer, list(answer.names)) == ("fds", ["ram"])
        (got,) = answer.fds
        assert os.path.samestat(os.fstat(got), os.fstat(fd))
        assert not os.get_inheritable(got)
        os.close(got)
    assert len(khod.files.table) == 1  # khod's own


def test_claim_has_other_answers(khod: Served, client: Client) -> None:
    with memfd() as fd:
        client.register("vm1", "guestmemfd", [("ram", fd)])
    khod.call(lambda: khod.service.damage("vm1"))
    assert client.claim("none").answer == "cold"
    held = client.claim("vm1")
    assert (held.answer, held.reason, list(held.fds)) == ("hold", "frame 5 is not where it was", [])
    (fd,) = client.claim("vm1", unverified=True).fds
    os.close(fd)


def test_unregister_and_finish(khod: Served, client: Client) -> None:
    with memfd() as fd:
        client.register("vm1", "guestmemfd", [("ram", fd)])
    assert list(client.finish()) == ["vm1"]
    client.unregister("vm1")
    assert khod.files.table == {}


def test_what_is_asked_of_a_registration_arrives(khod: Served, client: Client) -> None:
    with memfd() as fd:
        made = client.register(
            "vm1", "guestmemfd", [("ram", fd)], required=False, requires=["net"], options={"a": "b"}, lifetime="persistent",
            states=[("vcpus", 100), ("devices", 0)], shareable=True,
        )  # fmt: skip
    assert khod.service.of("vm1").asked == Registration(
        name="vm1", required=False, requires=("net",), options={"a": "b"}, lifetime=Lifetime.PERSISTENT,
        states=(StateBound("vcpus", 100), StateBound("devices", 0)), shareable=True,
    )  # fmt: skip
    assert made.handle == khod.service.of("vm1").handle
    for wrong, complaint in (
        ({"lifetime": "for ever"}, "'for ever' is no lifetime"),
        ({"states": [{"name": "a", "size": -1}]}, "size cannot be -1"),
        ({"states": [{"name": "a", "size": 1 << 200}]}, "size cannot be that"),
    ):
        with pytest.raises(InvalidRequest, match=complaint):
            client._ask("Register", {"name": "vm2", "fds": [], **wrong})
    with pytest.raises(InvalidRequest, match="pid cannot be 0"):
        client.adopt("vm2", "guestmemfd", 0, [])


def test_a_connection_keeps_what_it_registered_and_nothing_else(khod: Served, client: Client) -> None:
    with memfd() as fd, connect(khod.path, timeout=10) as other:
        for lifetime in ("connection", "process", "persistent"):
            other.register(lifetime, "guestmemfd", [("ram", fd)], lifetime=lifetime)
        client.register("mine", "guestmemfd", [("ram", fd)])
    khod.until(lambda: len(khod.service.held) == 3)
    assert [view.name for view in client.instances()] == ["mine", "persistent", "process"]


def test_a_process_keeps_what_it_registered(khod: Served) -> None:
    code = """
import sys; from pathlib import Path; from khod.api.client import connect; import os
fd = os.memfd_create("ram"); os.ftruncate(fd, 4096)
with connect(Path(sys.argv[1]), timeout=10) as client:
    client.register("vm1", "guestmemfd", [("ram", fd)], lifetime="process")
print(flush=True); sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code, khod.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        khod.until(lambda: khod.server.connections == 0)
        assert khod.service.of("vm1").view.keeper == f"process {child.pid}"
        child.kill()
    khod.until(lambda: not khod.service.held)


def test_when_khod_ends_nobody_has_left_it(tmp_path: Path) -> None:
    with served(tmp_path / "khod.sock") as khod, connect(khod.path, timeout=10) as client, memfd() as fd:
        client.register("vm1", "guestmemfd", [("ram", fd)])
        client.register("vm2", "guestmemfd", [("ram", fd)], lifetime="process")
        khod.run(khod.server.aclose())
        khod.call(lambda: None)
        assert len(khod.service.held) == 2


def test_who_hangs_up_because_khod_ends_has_not_ended(tmp_path: Path) -> None:
    """While khod waits for other calls to end: what was his would be let go of, and nobody's when khod is there again."""
    with served(tmp_path / "khod.sock") as khod, connect(khod.path, timeout=10) as client, memfd() as fd:
        handle = client.register("vm1", "guestmemfd", [("ram", fd)]).handle
        heard = client.subscribe([handle])
        next(heard)
        gone = khod.call(asyncio.Event)

        async def ends_later() -> None:
            with suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await gone.wait()

        khod.call(lambda: khod.server._shared.calls.start(ends_later()))
        closing = asyncio.run_coroutine_threadsafe(khod.server.aclose(), khod.loop)
        with pytest.raises(Lost, match="khod ended before it had answered"):
            next(heard)
        client.close()
        khod.until(lambda: khod.server.connections == 0)
        khod.call(gone.set)
        closing.result(10)
        assert khod.service.held


# --- the life cycle


def test_a_client_hears_and_answers(khod: Served, client: Client) -> None:
    with memfd() as fd, connect(khod.path, timeout=10) as other:
        handle = client.register("vm1", "guestmemfd", [("ram", fd)], states=[("vcpus", 100)]).handle
        heard = other.subscribe([handle])
        first = next(heard)
        assert (first.phase, first.reason, list(first.handles)) == ("subscribed", "idle", [handle])
        asked = LifecycleView(phase="quiesce", update="u1", handles=(handle,), deadline=9.5)
        khod.call(lambda: khod.service.tell("vm1", asked))
        assert same(next(heard), asked)
        written = client.states(handle)
        assert list(written) == ["vcpus"]
        os.pwrite(written["vcpus"], b"\5" + bytes(7) + b"hello", 0)
        client.ready("u1", "quiesce", [handle], quiet_for=2.5, stood=0.5)
        client.failed("u1", "commit", [handle], "no")
        assert khod.service.answers == [
            ("ready", "u1", "quiesce", "vm1", "2.5", "0.5"),
            ("failed", "u1", "commit", "vm1", "no"),
        ]
        os.close(written["vcpus"])
        claimed = client.claim("vm1")
        assert (list(claimed.names), list(claimed.states), claimed.handle) == (["ram", "vcpus"], ["vcpus"], handle)
        assert os.pread(claimed.fds[1], 5, 8) == b"hello"
        for fd in claimed.fds:
            os.close(fd)
        khod.call(lambda: khod.service.tell("vm1", None))
        assert list(heard) == []  # it has ended
        client.ready("u2", "preparing")
        client.unregister(handle=handle)


def test_who_hangs_up_has_unsubscribed(khod: Served, client: Client) -> None:
    with memfd() as fd:
        handle = client.register("vm1", "guestmemfd", [("ram", fd)]).handle
        with connect(khod.path, timeout=10) as other:
            assert next(other.subscribe([handle])).phase == "subscribed"
            with pytest.raises(Refused, match="there is a subscriber"):
                next(client.subscribe([handle]))
        khod.until(lambda: khod.service.of("vm1").told is None)
        client.unregister("vm1")
    assert khod.files.table == {}


def test_an_opaque_instance_gets_a_session(khod: Served, client: Client) -> None:
    handle = client.register_opaque("vm1").handle
    session = client.open_session(handle)
    os.pwrite(session, b"filled", 0)
    with pytest.raises(Refused, match="gets no session"):
        client.open_session(handle)
    claimed = client.claim("vm1")
    assert (list(claimed.names), os.pread(claimed.fds[0], 6, 0)) == (["session"], b"filled")
    os.close(claimed.fds[0])
    os.close(session)


def test_after_a_jump(khod: Served, client: Client) -> None:
    with memfd() as fd:
        before = client.register("vm1", "guestmemfd", [("ram", fd)], lifetime="persistent").handle
    khod.call(khod.service.came_through)
    with pytest.raises(Refused, match="came through a jump"):
        client.unregister("vm1")
    claimed = client.claim("vm1", owner=f"user:{ME}", lifetime="process")
    os.close(claimed.fds[0])
    assert claimed.handle != before
    assert khod.service.of("vm1").view.lifetime == "process"
    with pytest.raises(InvalidRequest):
        client.finished(before)
    client.finished(claimed.handle, ran=1.5)
    assert khod.service.answers[-1] == ("finished", "vm1", "1.5")
    client.discard("vm1")
    assert client.claim("vm1").answer == "cold"


# --- errors


def test_an_error_arrives_as_the_class_that_was_raised(client: Client) -> None:
    with pytest.raises(InvalidRequest) as invalid:
        client.unregister("nobody")
    assert (invalid.value.message, invalid.value.hint) == ("no instance is called 'nobody'", "khoctl instances lists them")
    with pytest.raises(NotAKernel) as refused:
        client.load("/etc/passwd")
    here = NotAKernel("/etc/passwd")
    assert (refused.value.message, refused.value.hint, refused.value.errno) == (here.message, here.hint, here.errno)
    assert refused.value.exit_status == 4
    client.status()  # the connection is as good as before


@pytest.mark.parametrize("kind", raising.KINDS.values(), ids=lambda kind: kind.__name__)
def test_every_error_crosses(kind: type[KhodError]) -> None:
    error = kind("it broke", hint="mend it")
    reply = json.loads(json.dumps(faults.fault(error).tojson()))
    back = raising.error_of(reply["error"], reply["parameters"])
    assert type(back) is kind
    assert (back.message, back.hint) == (error.message, error.hint)
    assert reply["parameters"]["exit_status"] == kind.exit_status
    if isinstance(error, MachineError) and isinstance(back, MachineError):
        assert back.errno == error.errno


def test_a_subclass_from_elsewhere_crosses_as_its_ancestor() -> None:
    class Narrower(errors.MapError):
        pass

    assert faults.fault(Narrower("chunk 5")).name == "org.khod.Host.MapError"


def test_a_bug_inside_is_not_shown_and_not_fatal(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with memfd() as fd, pytest.raises(KhodError, match="khod failed inside: ZeroDivisionError") as caught:
        client.register("vm1", "broken", [("ram", fd)])
    assert type(caught.value) is KhodError
    assert "a bug" in caplog.text
    client.status()


def test_nobody_answers(tmp_path: Path) -> None:
    with pytest.raises(Lost, match="does not answer"):
        connect(tmp_path / "none.sock")


def test_khod_ends_in_the_middle_of_a_call(tmp_path: Path) -> None:
    path = tmp_path / "khod.sock"
    with served(path) as here, connect(path, timeout=10) as client:
        client.load("bzImage")
        events = client.update("prepared")
        assert next(events).state == "preparing"
        here.until(lambda: here.service.waiting)
        closing = here.run(here.server.aclose())
        assert closing is None
        with pytest.raises(Lost, match="khod ended before it had answered"):
            list(events)


# --- updates


def test_an_update_streams_its_events_as_they_happen(khod: Served, client: Client) -> None:
    client.load("bzImage")
    events = client.update("frozen")
    seen = [next(events) for _ in range(5)]
    assert [(event.state, event.kind) for event in seen[-2:]] == [("frozen", "state"), ("frozen", "held")]
    with pytest.raises(InvalidRequest, match="Continue: events are still to come on this connection"):
        client.proceed()
    with connect(khod.path, timeout=10) as other:
        assert other.status().held
        other.proceed()
    assert [event.state for event in events] == ["executing"]
    assert client.status().state


def test_an_update_that_fails(khod: Served, client: Client) -> None:
    client.load("bzImage")
    khod.service.fails = "vm1 would not freeze"
    events = client.update()
    with pytest.raises(UpdateFailed, match="vm1 would not freeze") as caught:
        for event in events:
            last = event
    assert (last.state, caught.value.exit_status) == ("freezing", 6)


def test_an_update_that_may_not_start(client: Client) -> None:
    with pytest.raises(Refused, match="no kernel is loaded"):
        next(client.update())
    assert client.status().state
    with pytest.raises(InvalidRequest, match="'executing' is no state to hold at"):
        next(client.update("executing"))


def test_abort(khod: Served, client: Client) -> None:
    client.load("bzImage")
    events = client.update("prepared")
    khod.until(lambda: khod.service.waiting)
    with connect(khod.path, timeout=10) as other:
        assert other.abort() == "aborted"
        with pytest.raises(Refused, match="no update"):
            other.abort()
    with pytest.raises(UpdateFailed):
        list(events)


def test_a_client_that_hangs_up_does_not_stop_the_update(khod: Served) -> None:
    with connect(khod.path, timeout=10) as client:
        client.load("bzImage")
        next(client.update("frozen"))
        khod.until(lambda: khod.service.waiting)
    khod.until(lambda: khod.server.connections == 0 or khod.service.waiting)
    with connect(khod.path, timeout=10) as other:
        assert other.status().state == "frozen"
        other.proceed()
        khod.until(lambda: khod.service.state is State.EXECUTING)
    khod.until(lambda: khod.server.connections == 0)
    assert not khod.service.cancelled


# --- descriptors


def test_no_descriptor_is_left_over(khod: Served, client: Client) -> None:
    def everything() -> None:
        with memfd() as fd:
            client.register("vm1", "guestmemfd", [("ram", fd), ("rom", fd)])
            for descriptor in client.claim("vm1").fds:
                os.close(descriptor)
            for driver in ("guestmemfd", "unknown", "broken"):
                with pytest.raises(KhodError):
                    client.register("vm1", driver, [("ram", fd)])
            with pytest.raises(FdNotPreservable):
                client.register("vm3", "guestmemfd", [])
            # Descriptors beside a call that takes none, beside one that does not exist, beside parameters that are wrong.
            for method, parameters in (
                ("GetStatus", {}),
                ("Nothing", {}),
                ("Register", {"name": 5}),
                ("Register", {"name": "v", "driver": "guestmemfd", "fds": [{"name": "a", "fd": 0}, {"name": "b", "fd": 0}]}),
                ("Register", {"name": "v", "driver": "guestmemfd", "fds": [{"name": "a", "fd": 7}]}),
            ):
                client._send(method, parameters, [fd])
                try:
                    with client._answer():
                        assert method == "GetStatus"
                except InvalidRequest:
                    assert method != "GetStatus"
        client.unregister("vm1")

    everything()
    before = open_fds()
    for _ in range(20):
        everything()
    assert open_fds() == before
    assert khod.files.table == {}


def test_a_message_of_many_parts_keeps_its_descriptors(khod: Served, client: Client) -> None:
    with memfd() as fd:
        view = client.register("vm1", "guestmemfd", [("ram", fd)], options={"long": "x" * 200_000}).instance
        assert (view.size, len(view.detail["long"])) == (PAGE, 200_000)


def test_calls_sent_ahead_keep_their_own_descriptors(khod: Served, client: Client) -> None:
    with memfd(b"a") as one, memfd(b"bb") as two:
        for name, fd in (("vm1", one), ("vm2", two)):
            client._send("Register", {"name": name, "driver": "guestmemfd", "fds": [{"name": "ram", "fd": 0}]}, [fd])
        for size in (1, 2):
            with client._answer() as (parameters, _):
                assert parameters["instance"]["size"] == size


# --- the wire itself


def raw(path: Path, data: bytes) -> bytes:
    """What comes back before the connection ends, having said all."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))


def test_bytes_of_an_answer_and_of_an_error(khod: Served) -> None:
    assert raw(khod.path, b'{"method":"org.khod.Host.ListInstances"}\0') == b'{"parameters":{"instances":[]}}\0'
    assert raw(khod.path, b'{"method":"org.khod.Host.Continue"}\0') == (
        b'{"error":"org.khod.Host.Refused","parameters":{"message":"nothing is held","hint":"","exit_status":3}}\0'
    )
    assert raw(khod.path, b'{"method":"org.khod.Host.Continue","oneway":true}\0') == b""


def test_the_service_interface(khod: Served) -> None:
    info = json.loads(raw(khod.path, b'{"method":"org.varlink.service.GetInfo"}\0')[:-1])["parameters"]
    assert info["product"] == "khod"
    assert info["interfaces"] == ["org.khod.Host", "org.varlink.service"]
    asked = {"method": "org.varlink.service.GetInterfaceDescription", "parameters": {"interface": "org.khod.Host"}}
    answer = json.loads(raw(khod.path, json.dumps(asked).encode() + b"\0")[:-1])
    assert answer["parameters"]["description"] == HostInterface.render_interface_description()


@pytest.mark.parametrize(
    ("method", "parameters", "error"),
    [
        ("org.khod.Host.Nothing", {}, "MethodNotFound"),
        ("org.khod.Other.Plan", {}, "InterfaceNotFound"),
        ("org.khod.Host.Update", {}, "ExpectedMore"),
        ("org.khod.Host.Claim", {}, "InvalidParameter"),
        ("org.khod.Host.Claim", {"name": "a", "extra": 1}, "InvalidParameter"),
        ("org.khod.Host.Claim", {"name": ["a"]}, "InvalidParameter"),
    ],
)
def test_calls_that_are_none(khod: Served, method: str, parameters: dict[str, Any], error: str) -> None:
    answer = raw(khod.path, json.dumps({"method": method, "parameters": parameters}).encode() + b"\0")
    assert json.loads(answer[:-1])["error"] == f"org.varlink.service.{error}"


# --- the socket


def test_the_socket_is_its_owners_alone(khod: Served) -> None:
    assert stat.S_IMODE(khod.path.stat().st_mode) == 0o600
    assert [entry.name for entry in khod.path.parent.iterdir()] == ["khod.sock"]


def test_the_socket_goes_with_the_server(tmp_path: Path) -> None:
    path = tmp_path / "khod.sock"
    with served(path):
        assert path.exists()
    assert not path.exists()


def test_a_second_khod_is_refused_and_a_dead_ones_socket_replaced(khod: Served, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="somebody answers"):
        listen(khod.path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(tmp_path / "dead.sock"))
    listen(tmp_path / "dead.sock").close()


def test_sockets_that_cannot_be_made(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="cannot listen") as caught:
        listen(tmp_path / ("x" * 120))
    assert "shorter" in caught.value.hint
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="cannot listen"):
        listen(tmp_path / "file" / "khod.sock")


def test_the_interface_is_documented() -> None:
    page = DOCS / "varlink.md"
    before, begin, _, end, after = re.split(r"(```varlink\n)(.*?)(^```$)", page.read_text(), maxsplit=1, flags=re.M | re.S)
    text = "".join((before, begin, HostInterface.render_interface_description(), end, after))
    if os.environ.get("KHOD_WRITE_DOCS"):
        page.write_text(text)
    assert page.read_text() == text, "KHOD_WRITE_DOCS=1 pytest tests/integration/api/test_api.py writes it anew"
