# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod as systemd's service: what it says, what it is passed, and two of them."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.core.state import State
from khod.supervision import ANSWERABLE, PILE, UNANSWERABLE, Answerable, Notifier
from tests.unit.daemons import CODE, ROOT, Daemon, powered
from tests.unit.test_house import tool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with powered(tmp_path_factory.mktemp("powered")) as directory:
        yield directory


@pytest.fixture
def place(tmp_path: Path, machine: Path) -> Path:
    """A directory with a machine in it."""
    (tmp_path / "machine").symlink_to(machine)
    return tmp_path


def answers(path: Path) -> bool:
    """Whether somebody speaks varlink there."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(20)
        peer.connect(str(path))
        peer.sendall(b'{"method":"org.varlink.service.GetInfo","parameters":{}}\0')
        return b"org.khod" in peer.recv(65536)


def test_it_says_that_it_is_ready_lives_and_ends(place: Path) -> None:
    with Daemon(place, WATCHDOG_USEC="2000000") as khod:
        assert not khod.restored.exists()
        khod.hear("READY=1")
        assert khod.restored.exists(), "whoever waits for READY=1 and asserts the file must find it"
        khod.hear("STATUS=idle: 0 instances")
        for _ in range(2):
            khod.forget()
            khod.hear("WATCHDOG=1", seconds=2.0)
        status, said = khod.end()
        khod.hear("STOPPING=1")
    assert status == 0, said


def test_a_systemd_that_does_not_listen_holds_nothing_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PID 1 may be waiting for khod: khod must not wait for it."""
    with contextlib.ExitStack() as closing, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notifier = Notifier()
        closing.callback(notifier.close)
        room = int(Path("/proc/sys/net/unix/max_dgram_qlen").read_text())
        told = [f"STATUS={number}" for number in range(PILE + room)]
        for text in told:
            notifier.tell(text)
        assert not notifier.flush(0.01), "the socket has no room for so many"
        heard = []
        while not notifier.flush(0):
            heard.append(systemd.recv(4096).decode())
        systemd.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                heard.append(systemd.recv(4096).decode())
        assert heard == told, "in order, and nothing is lost of what there is room for"


def test_progress_buys_time_and_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with contextlib.ExitStack() as closing, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        notifier = Notifier()
        closing.callback(notifier.close)
        notifier.progress("Restored 1 of 2 instances", 150.0)
        assert systemd.recv(4096) == b"STATUS=Restored 1 of 2 instances\nEXTEND_TIMEOUT_USEC=150000000"
        notifier.status("Restored 1 of 2 instances")
        notifier.status("restored: 2 of 2 instances not claimed yet")
        assert systemd.recv(4096) == b"STATUS=restored: 2 of 2 instances not claimed yet", "said once as long as it is the same"


def test_a_watchdog_of_another_process_is_none_of_its_business(place: Path) -> None:
    with Daemon(place, WATCHDOG_USEC="200000", WATCHDOG_PID="1") as khod:
        khod.hear("STATUS=idle")
        khod.end()
        khod.hear("STOPPING=1")
        assert "WATCHDOG=1" not in khod.heard


def test_an_event_loop_that_stands_still_is_not_said_to_live(place: Path) -> None:
    code = f"import khod.core.host as h, time; h.Host.status = lambda self: time.sleep(60); {CODE}"
    with Daemon(place, code=code, WATCHDOG_USEC="1000000") as khod:
        khod.hear("READY=1")
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(str(khod.socket))
            peer.sendall(b'{"method":"org.khod.Host.GetStatus","parameters":{}}\0')
            # What was said before the call took effect may still lie there; then there is silence.
            silent = False
            for _ in range(5):
                khod.forget()
                try:
                    khod.hear("WATCHDOG=1", seconds=1.0)
                except AssertionError:
                    silent = True
                    break
            assert silent


def test_clients_of_luo_agent_are_served_where_that_is_asked_for_and_nowhere_else(place: Path) -> None:
    config, luod = place / "khod.yaml", place / "luod.sock"
    for enabled in (False, True):
        config.write_text(
            f"socket: {place}/khod.sock\nmachine: simulated:{place}/machine\n"
            f"luo_agent:\n  socket: {luod}\n  enabled: {str(enabled).lower()}\n"
        )
        with Daemon(place) as khod:
            khod.hear("READY=1")
            assert luod.exists() is enabled
            if enabled:
                with socket.socket(socket.AF_UNIX) as peer:
                    peer.settimeout(20)
                    peer.connect(str(luod))
                    peer.sendall(b'{"cmd": "CLAIM", "id": "nobody"}\n')
                    assert b'"answer": "cold"' in peer.recv(4096)
            assert khod.end()[0] == 0
        assert not luod.exists()


def test_a_luod_that_is_there_already_stops_it(place: Path) -> None:
    luod = place / "luod.sock"
    (place / "khod.yaml").write_text(
        f"socket: {place}/khod.sock\nmachine: simulated:{place}/machine\nluo_agent: {{enabled: true, socket: {luod}}}\n"
    )
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(luod))
        other.listen(1)
        with Daemon(place) as khod:
            status, said = khod.ended()
    assert (status, f"somebody answers at {luod}" in said, "is luod running?" in said) == (3, True, True), said


def test_it_may_open_as_many_descriptors_as_its_user_may(place: Path) -> None:
    """A hundred guests have more than the customary thousand."""
    with Daemon(place, before=("prlimit", "--nofile=1024:3000")) as khod:
        khod.hear("READY=1")
        limits = Path(f"/proc/{khod.process.pid}/limits").read_text()
    assert re.search(r"^Max open files +3000 +3000 ", limits, re.M), limits


def test_a_second_khod_on_the_same_state_touches_nothing(place: Path) -> None:
    with Daemon(place) as first:
        first.hear("READY=1")
        (place / "other").mkdir()
        (place / "other/khod.yaml").write_text(f"socket: {place}/other/khod.sock\nmachine: simulated:{place}/machine\n")
        with Daemon(place / "other") as second:
            status, said = second.ended()
        assert (status, f"another khod uses {place}/machine" in said, "systemctl status khod" in said) == (3, True, True), said
        assert not (place / "other/khod.sock").exists()
        assert answers(first.socket)
        assert first.end()[0] == 0
    with Daemon(place) as third:
        third.hear("READY=1")


def test_a_socket_that_systemd_listens_with_is_used_and_stays(place: Path) -> None:
    """systemd-socket-activate listens, and starts khod when somebody comes."""
    config = place / "khod.yaml"
    config.write_text(f"socket: {place}/khod.sock\nmachine: simulated:{place}/machine\n")
    program = f"import sys; sys.argv = ['khod', '--config', {str(config)!r}]; {CODE}"
    argv = [tool("systemd-socket-activate"), f"--listen={place}/khod.sock", sys.executable, "-c", program]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "Listening on" in process.stderr.readline()
            before = (place / "khod.sock").stat().st_ino
            assert answers(place / "khod.sock")
            process.terminate()
            _, said = process.communicate(timeout=20)
            assert process.returncode == 0, said
            assert (place / "khod.sock").stat().st_ino == before
        finally:
            process.kill()


def test_nobody_is_refused_while_khod_is_started_again(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as client:
        listener.bind(str(place / "khod.sock"))
        listener.listen()
        with Daemon(place, listener=listener.fileno()) as first:
            first.hear("READY=1")
            assert answers(first.socket)
            assert first.end()[0] == 0
        client.settimeout(20)
        client.connect(str(place / "khod.sock"))
        client.sendall(b'{"method":"org.varlink.service.GetInfo","parameters":{}}\0')
        with Daemon(place, listener=listener.fileno()):
            assert b"org.khod" in client.recv(65536)


def test_a_socket_that_is_not_the_configured_one_is_an_error(place: Path) -> None:
    config = place / "khod.yaml"
    config.write_text(f"socket: {place}/configured.sock\nmachine: simulated:{place}/machine\n")
    code = f"""
import os, socket
other = socket.socket(socket.AF_UNIX); other.bind({str(place / "other.sock")!r}); other.listen(1)
os.dup2(other.fileno(), 3); os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
{CODE}"""
    with Daemon(place, code=f"exec({code!r})") as khod:
        status, said = khod.ended()
    assert status == 2
    assert f"{place}/other.sock" in said
    assert "ListenStream=" in said


def in_a_namespace(*command: str) -> list[str]:
    """A command that a shell runs where mounts are nobody else's."""
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    return ["unshare", "-Urm", "sh", "-ec", *command]


def test_a_read_only_disk_is_told_and_stops_nobody_from_claiming(place: Path) -> None:
    """What came through a jump can be restored without a journal; no update can start."""
    machine = (place / "machine").resolve()
    prepare = f'mount --bind {machine} {machine}; mount -o remount,ro,bind {machine}; exec "$@"'
    with Daemon(place, before=in_a_namespace(prepare, "sh")) as khod:
        khod.hear("READY=1")
        khod.hear("STATUS=idle: 0 instances; 1 problems")
        status, errors = khod.end()
    assert (status, "cannot be written to: remount it read-write" in errors) == (0, True), errors


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    code = f"from khod.kernel.occupation import trouble; from pathlib import Path; print(trouble(Path({str(tmp_path)!r})))"
    look = f'{sys.executable} -c "{code}"'
    fill = f"mount -t tmpfs -o size=2M none {tmp_path}; {look}; head -c 1500K /dev/zero >{tmp_path}/filler; {look}"
    done = subprocess.run(in_a_namespace(fill), capture_output=True, text=True, cwd=ROOT, timeout=30)
    before, after = done.stdout.splitlines()
    assert (before, f"of the state directory {tmp_path} has 561152 bytes left: free some" in after) == ("", True), done


def test_a_state_directory_that_cannot_be_made_is_an_error_with_a_hint(place: Path) -> None:
    (place / "file").touch()
    (place / "khod.yaml").write_text(f"socket: {place}/khod.sock\nstate_directory: {place}/file/state\n")
    with Daemon(place) as khod:
        status, said = khod.ended()
    assert (status, "[ENOTDIR]" in said, "set `state_directory`" in said) == (4, True, True), said
    assert not khod.socket.exists()


def test_a_broken_configuration_names_file_and_key(place: Path) -> None:
    (place / "khod.yaml").write_text("sockt: /run/khod.sock\n")
    with Daemon(place) as khod:
        status, said = khod.ended()
    assert status == 2
    assert f"{place}/khod.yaml: there is no setting sockt" in said
    assert "did you mean socket?" in said
    assert not list((place / "runtime").iterdir())


def test_the_target_is_told_of_what_may_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUNTIME_DIRECTORY", f"{tmp_path}:/run/other")
    answerable, file = Answerable(), tmp_path / "restored"
    there = []
    for state in (State.RESTORING, State.RESTORED, State.FINISHING, State.IDLE, State.PREPARING, State.ABORTED, State.FAILED):
        answerable.say(state)
        there.append(file.exists())
    assert there == [False, True, True, True, True, True, False]
    answerable.say(State.UNREACHABLE)
    assert not file.exists()
    answerable.say(State.LOST)
    assert file.exists(), "start cold"


def test_every_state_that_khod_can_rest_in_is_one_or_the_other() -> None:
    assert not ANSWERABLE & UNANSWERABLE
    assert {state for state in State if state.resting} | {State.RESTORING} <= ANSWERABLE | UNANSWERABLE
