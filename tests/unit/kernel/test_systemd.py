# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemctl as a program that says what a test wants, and logind on a bus of its own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from jeepney import message_bus
from jeepney.io.blocking import open_dbus_connection

from khod.errors import KexecFailed, NothingLoaded, NotPermitted, Refused
from khod.kernel import kexec, logind, systemd
from khod.kernel.systemd import Systemd
from tests.unit.kernel.buses import Logind, bus, impostor


@pytest.fixture
def address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with bus(tmp_path) as address:
        monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", address)
        yield address


@pytest.fixture
def login(address: str) -> Iterator[Logind]:
    login = Logind(address)
    yield login
    login.close()


class Systemctl:
    """A systemctl: what it prints and its exit status, by the word that it is asked."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "systemctl"
        self.directory = directory
        self.log = directory / "asked"
        self.path.write_text(
            f'#!/bin/sh\necho "$*" >>{self.log}\n'
            f"for word; do [ -e {directory}/on.$word ] && . {directory}/on.$word; done\nexit 9\n"
        )
        self.path.chmod(0o755)
        self.on("--property=Version", "echo 262.1-1; exit 0")
        self.on("--property=Job", "echo 0; exit 0")
        self.on("kexec", "exit 0")

    def on(self, word: str, script: str) -> None:
        (self.directory / f"on.{word}").write_text(script)

    def asked(self) -> list[str]:
        """What it was told to do, without the questions."""
        return [line.split()[-1] for line in self.log.read_text().splitlines() if "show" not in line]


@pytest.fixture
def systemctl(tmp_path: Path) -> Systemctl:
    return Systemctl(tmp_path)


@pytest.fixture
def manager(tmp_path: Path, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch) -> Systemd:
    loaded = tmp_path / "kexec_loaded"
    loaded.write_text("1\n")
    monkeypatch.setattr(kexec, "LOADED", loaded)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", os.environ.get("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/none"))
    return Systemd(str(systemctl.path), tmp_path)


def test_an_inhibitor_delays_a_shutdown_until_its_descriptor_is_closed(login: Logind) -> None:
    fd = logind.inhibit("an update is under way")
    assert login.asked == [("shutdown", "khod", "an update is under way", "delay")]
    assert not os.get_inheritable(fd)
    assert not login.let_go(0)
    os.close(fd)
    assert login.let_go(10)


def test_a_logind_that_says_no_and_one_that_is_not_there_are_refusals(login: Logind, monkeypatch: pytest.MonkeyPatch) -> None:
    login.refuses = True
    with pytest.raises(NotPermitted, match=r"AccessDenied: not you"):
        logind.inhibit("why")
    login.close()
    with pytest.raises(Refused, match=r"there is no logind") as caught:
        logind.inhibit("why")
    assert not isinstance(caught.value, NotPermitted)
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", "unix:path=/nonexistent/bus")
    with pytest.raises(Refused, match=r"cannot be reached.*systemctl status"):
        logind.inhibit("why")


def test_a_shutdown_is_heard_and_so_is_its_end(login: Logind) -> None:
    async def hear() -> list[bool]:
        heard: list[bool] = []
        async for value in logind.shutdowns():
            heard.append(value)
            if len(heard) == 3:
                return heard
            login.prepare(not value)
        return heard

    async def play() -> list[bool]:
        task = asyncio.create_task(hear())
        await asyncio.to_thread(login.listening.wait, 10)
        login.prepare(True)
        return await asyncio.wait_for(task, 10)

    assert asyncio.run(play()) == [True, False, True]


def test_a_shutdown_that_began_before_anybody_listened_is_heard(login: Logind) -> None:
    login.preparing = True

    async def first() -> bool:
        return await anext(aiter(logind.shutdowns()))

    assert asyncio.run(asyncio.wait_for(first(), 10))


def test_a_signal_that_somebody_else_sends_to_us_alone_begins_no_shutdown(login: Logind, address: str) -> None:
    async def play() -> bool:
        task = asyncio.ensure_future(anext(aiter(logind.shutdowns())))
        await asyncio.to_thread(login.listening.wait, 10)
        with open_dbus_connection(address) as connection:
            (names,) = connection.send_and_get_reply(message_bus.ListNames(), timeout=10).body
        for name in names:
            if name.startswith(":") and name != login._connection.unique_name:
                await asyncio.to_thread(impostor, address, name)
        return await asyncio.wait_for(task, 10)

    assert asyncio.run(play()) is False


def test_a_bus_that_comes_late_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DBUS_SYSTEM_BUS_ADDRESS", f"unix:path={tmp_path}/bus")

    async def play() -> bool:
        task = asyncio.ensure_future(anext(aiter(logind.shutdowns())))
        await asyncio.sleep(0)
        with bus(tmp_path) as address:
            login = Logind(address)
            login.preparing = True
            try:
                return await asyncio.wait_for(task, 10)
            finally:
                login.close()

    assert asyncio.run(play())


def test_a_request_that_was_taken_is_one_systemctl_kexec(manager: Systemd, systemctl: Systemctl) -> None:
    manager.kexec()
    assert systemctl.asked() == ["kexec"]
    assert "--no-ask-password" in systemctl.log.read_text()


def test_a_refused_request_has_changed_nothing_and_says_why(manager: Systemd, systemctl: Systemctl, login: Logind) -> None:
    systemctl.on("kexec", 'echo "Operation inhibited by apt" >&2; exit 1')
    with pytest.raises(KexecFailed, match="Operation inhibited by apt"):
        manager.kexec()
    systemctl.on("--property=Job", 'echo "Failed to connect to bus: No such file or directory" >&2; exit 1')
    with pytest.raises(KexecFailed, match="Operation inhibited by apt"):
        manager.kexec()


def test_a_request_without_an_answer_that_became_a_job_is_a_jump(manager: Systemd, systemctl: Systemctl) -> None:
    """Undoing what is on its way would take its memory out of it."""
    systemctl.on("kexec", 'echo "Connection timed out" >&2; exit 1')
    systemctl.on("--property=Job", "echo 1234; exit 0")
    manager.kexec()


def test_while_logind_prepares_nobody_knows_yet(manager: Systemd, systemctl: Systemctl, login: Logind) -> None:
    login.preparing = True
    systemctl.on("kexec", "exit 1")
    # The second question finds the job that the first one did not.
    systemctl.on(
        "--property=Job", f"[ -e {systemctl.directory}/twice ] && echo 7 || echo 0; touch {systemctl.directory}/twice; exit 0"
    )
    manager.kexec()


def test_a_systemctl_that_hangs_is_ended(manager: Systemd, systemctl: Systemctl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(systemd, "LIMIT", 0.3)
    systemctl.on("kexec", "exec sleep 60")
    with pytest.raises(KexecFailed, match=r"no end within 0.3 s"):
        manager.kexec()


@pytest.mark.parametrize(
    ("version", "doubt"), [("262.1-1", ""), ("261", ""), ("260.3", "does not carry"), ("", "does not say")]
)
def test_a_systemd_that_carries_nothing_is_not_asked(manager: Systemd, systemctl: Systemctl, version: str, doubt: str) -> None:
    systemctl.on("--property=Version", f"echo {version}; exit 0")
    assert doubt in manager.doubt()
    assert bool(doubt) == bool(manager.doubt())
    if doubt:
        with pytest.raises(Refused, match="--jump direct"):
            manager.kexec()
        assert systemctl.asked() == []


def test_nothing_is_asked_without_an_image(manager: Systemd, systemctl: Systemctl, tmp_path: Path) -> None:
    """systemctl would load another one, in the way that carries nothing."""
    (tmp_path / "kexec_loaded").write_text("0\n")
    with pytest.raises(NothingLoaded):
        manager.kexec()
    assert systemctl.asked() == []


def test_without_systemd_there_is_nobody_to_ask(systemctl: Systemctl, tmp_path: Path) -> None:
    manager = Systemd(str(systemctl.path), tmp_path / "none")
    assert not manager.present()
    assert not manager.stopping()
    with pytest.raises(Refused, match="systemd is not PID 1 here"):
        manager.kexec()
    assert not Systemd("systemctl-that-is-not-there", tmp_path).present()


def test_a_system_on_its_way_down_is_told_from_one_that_is_not(manager: Systemd, systemctl: Systemctl) -> None:
    systemctl.on("is-system-running", "echo degraded; exit 1")
    assert not manager.stopping()
    systemctl.on("is-system-running", "echo stopping; exit 1")
    assert manager.stopping()


SHOWN = """Id=vm-1.service
ExecStop={ path=/usr/bin/virsh ; argv[]=/usr/bin/virsh destroy vm-1 ; ignore_errors=no ; start_time=[n/a] ; pid=0 ; status=0/0 }

Id=quiet.service

Id=late.service
ExecStopPost={ path=/bin/rm ; argv[]=/bin/rm -r /run/late ; ignore_errors=yes ; start_time=[n/a] ; pid=0 ; status=0/0 }
"""


def test_units_that_would_stop_a_guest_are_found(manager: Systemd, systemctl: Systemctl, tmp_path: Path) -> None:
    (tmp_path / "shown").write_text(SHOWN)
    systemctl.on("--property=Id,ExecStop,ExecStopPost", f"cat {tmp_path}/shown; exit 0")
    found = manager.stop_commands({"vm-1.service", "late.service", "quiet.service"}, {os.getpid()})
    assert found == {"vm-1.service": "/usr/bin/virsh destroy vm-1", "late.service": "/bin/rm -r /run/late"}
    assert "late.service quiet.service vm-1.service" in systemctl.log.read_text()
    systemctl.log.write_text("")
    assert manager.stop_commands((), ()) == {}
    assert systemctl.log.read_text() == ""
