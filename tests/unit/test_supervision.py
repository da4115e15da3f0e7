# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod as systemd's service: what it says, what it is passed, and two of them."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from khod.core.state import State
from khod.supervision import ANSWERABLE, UNANSWERABLE
from tests.unit.daemons import CODE, ROOT, Daemon
from tests.unit.test_house import tool


def answers(path: Path) -> bool:
    """Whether somebody speaks varlink there."""
    with socket.socket(socket.AF_UNIX) as peer:
        peer.settimeout(20)
        peer.connect(str(path))
        peer.sendall(b'{"method":"org.varlink.service.GetInfo","parameters":{}}\0')
        return b"org.khod" in peer.recv(65536)


def test_it_says_that_it_is_ready_lives_and_ends(tmp_path: Path) -> None:
    with Daemon(tmp_path, WATCHDOG_USEC="400000") as khod:
        assert not khod.restored.exists()
        khod.hear("READY=1")
        assert khod.restored.exists(), "whoever waits for READY=1 and asserts the file must find it"
        khod.hear("STATUS=idle: 0 instances")
        for _ in range(3):
            khod.forget()
            khod.hear("WATCHDOG=1", seconds=0.4)
        status, said = khod.end()
        khod.hear("STOPPING=1")
    assert status == 0, said


def test_a_watchdog_of_another_process_is_none_of_its_business(tmp_path: Path) -> None:
    with Daemon(tmp_path, WATCHDOG_USEC="200000", WATCHDOG_PID="1") as khod:
        khod.hear("STATUS=idle")
        khod.end()
        khod.hear("STOPPING=1")
        assert "WATCHDOG=1" not in khod.heard


def test_an_event_loop_that_stands_still_is_not_said_to_live(tmp_path: Path) -> None:
    code = f"import khod.core.host as h, time; h.Host.status = lambda self: time.sleep(60); {CODE}"
    with Daemon(tmp_path, code=code, WATCHDOG_USEC="1000000") as khod:
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


def test_a_second_khod_on_the_same_state_touches_nothing(tmp_path: Path) -> None:
    with Daemon(tmp_path) as first:
        first.hear("READY=1")
        (tmp_path / "other").mkdir()
        (tmp_path / "other/khod.yaml").write_text(f"socket: {tmp_path}/other/khod.sock\nstate_directory: {tmp_path}/state\n")
        with Daemon(tmp_path / "other") as second:
            status, said = second.ended()
        assert (status, f"another khod uses {tmp_path}/state" in said, "systemctl status khod" in said) == (3, True, True), said
        assert not (tmp_path / "other/khod.sock").exists()
        assert answers(first.socket)
        assert first.end()[0] == 0
    with Daemon(tmp_path) as third:
        third.hear("READY=1")


def test_a_socket_that_systemd_listens_with_is_used_and_stays(tmp_path: Path) -> None:
    """systemd-socket-activate listens, and starts khod when somebody comes."""
    config = tmp_path / "khod.yaml"
    config.write_text(f"socket: {tmp_path}/khod.sock\nstate_directory: {tmp_path}/state\n")
    program = f"import sys; sys.argv = ['khod', '--config', {str(config)!r}]; {CODE}"
    argv = [tool("systemd-socket-activate"), f"--listen={tmp_path}/khod.sock", sys.executable, "-c", program]
    with subprocess.Popen(argv, cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            assert "Listening on" in process.stderr.readline()
            before = (tmp_path / "khod.sock").stat().st_ino
            assert answers(tmp_path / "khod.sock")
            process.terminate()
            _, said = process.communicate(timeout=20)
            assert process.returncode == 0, said
            assert (tmp_path / "khod.sock").stat().st_ino == before
        finally:
            process.kill()


def test_a_socket_that_is_not_the_configured_one_is_an_error(tmp_path: Path) -> None:
    config = tmp_path / "khod.yaml"
    config.write_text(f"socket: {tmp_path}/configured.sock\nstate_directory: {tmp_path}/state\n")
    code = f"""
import os, socket
other = socket.socket(socket.AF_UNIX); other.bind({str(tmp_path / "other.sock")!r}); other.listen(1)
os.dup2(other.fileno(), 3); os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
{CODE}"""
    with Daemon(tmp_path, code=f"exec({code!r})") as khod:
        status, said = khod.ended()
    assert status == 2
    assert f"{tmp_path}/other.sock" in said
    assert "ListenStream=" in said


@pytest.mark.parametrize(
    ("mount", "said"),
    [
        ("mount -o remount,ro {state}", "cannot be written to: remount it read-write"),
        ("head -c 10M /dev/zero >{state}/filler", "bytes left: free some"),
    ],
)
def test_a_disk_that_takes_no_journal_is_told_and_stops_nobody_from_claiming(tmp_path: Path, mount: str, said: str) -> None:
    """What came through a jump can be restored without a journal; no update can start."""
    (tmp_path / "state").mkdir()
    if subprocess.run(["unshare", "-Urm", "true"], capture_output=True).returncode:
        pytest.skip("no mount namespaces here")
    prepare = f'mount -t tmpfs -o size=2M none {tmp_path}/state && {{ {mount.format(state=tmp_path / "state")}; exec "$@"; }}'
    with Daemon(tmp_path, before=("unshare", "-Urm", "sh", "-c", prepare, "sh")) as khod:
        khod.hear("READY=1")
        khod.hear("STATUS=idle: 0 instances; 1 problems")
        status, errors = khod.end()
    assert (status, said in errors) == (0, True), errors


def test_a_state_directory_that_cannot_be_made_is_an_error_with_a_hint(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "khod.yaml").write_text(f"socket: {tmp_path}/khod.sock\nstate_directory: {tmp_path}/file/state\n")
    with Daemon(tmp_path) as khod:
        status, said = khod.ended()
    assert (status, "[ENOTDIR]" in said, "set `state_directory`" in said) == (4, True, True), said
    assert not khod.socket.exists()


def test_a_broken_configuration_names_file_and_key(tmp_path: Path) -> None:
    (tmp_path / "khod.yaml").write_text("sockt: /run/khod.sock\n")
    with Daemon(tmp_path) as khod:
        status, said = khod.ended()
    assert status == 2
    assert f"{tmp_path}/khod.yaml: there is no setting sockt" in said
    assert "did you mean socket?" in said
    assert not list((tmp_path / "runtime").iterdir())


def test_every_state_that_khod_can_rest_in_is_one_or_the_other() -> None:
    assert not ANSWERABLE & UNANSWERABLE
    assert {state for state in State if state.resting} | {State.RESTORING} <= ANSWERABLE | UNANSWERABLE
