# SPDX-License-Identifier: LGPL-2.1-or-later
"""A D-Bus of one's own with a logind on it that answers what a test wants: the real one would shut this machine down."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jeepney import DBusAddress, HeaderFields, MessageType, message_bus, new_error, new_method_return, new_signal
from jeepney.io.blocking import DBusConnection, open_dbus_connection

from tests.unit.test_house import tool
from tests.waiting import readable

CONFIGURATION = """<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig><listen>unix:path={socket}</listen><policy context="default">
<allow send_destination="*"/><allow own="*"/><allow receive_sender="*"/></policy></busconfig>
"""
MANAGER = DBusAddress("/org/freedesktop/login1", interface="org.freedesktop.login1.Manager")


@contextmanager
def bus(directory: Path) -> Iterator[str]:
    """A bus; its address, for DBUS_SYSTEM_BUS_ADDRESS."""
    socket = directory / "bus"
    (directory / "bus.conf").write_text(CONFIGURATION.format(socket=socket))
    argv = [tool("dbus-daemon"), f"--config-file={directory}/bus.conf", "--nofork", "--nopidfile", "--print-address"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        try:
            yield daemon.stdout.readline().strip()
        finally:
            daemon.kill()


class Logind:
    """A logind. `preparing` is its property; `refuses` makes it refuse to inhibit."""

    def __init__(self, address: str) -> None:
        self.preparing = False
        self.refuses = False
        self.asked: list[tuple[str, ...]] = []
        self.listening = threading.Event()
        """Somebody has asked whether a shutdown is being prepared."""
        self._held: list[int] = []
        self._connection: DBusConnection = open_dbus_connection(address, enable_fds=True)
        self._call(message_bus.RequestName("org.freedesktop.login1"))
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _call(self, message: Any) -> None:
        answer = self._connection.send_and_get_reply(message, timeout=10)
        assert answer.header.message_type is MessageType.method_return, answer.body

    def prepare(self, value: bool) -> None:
        """Say that a shutdown begins, or does not happen after all."""
        self.preparing = value
        self._connection.send(new_signal(MANAGER, "PrepareForShutdown", "b", (value,)))

    def let_go(self, seconds: float) -> bool:
        """Whether the last inhibitor is let go of within that time; the bus may hold the message that it came in a while."""
        return bool(readable(self._held[-1], seconds=seconds))

    def close(self) -> None:
        """End it."""
        with suppress(OSError):
            self._connection.sock.shutdown(2)
        self._thread.join(10)
        self._connection.close()
        while self._held:
            os.close(self._held.pop())

    def _serve(self) -> None:
        with suppress(OSError, ValueError):
            while True:
                message = self._connection.receive()
                if message.header.message_type is MessageType.method_call:
                    self._answer(message)

    def _answer(self, message: Any) -> None:
        member = message.header.fields[HeaderFields.member]
        if member == "Get":
            self._connection.send(new_method_return(message, "v", (("b", self.preparing),)))
            self.listening.set()
        elif member == "Inhibit" and not self.refuses:
            self.asked.append(message.body)
            ours, theirs = os.pipe()
            self._held.append(ours)
            self._connection.send(new_method_return(message, "h", (theirs,)))
            os.close(theirs)
        else:
            self._connection.send(new_error(message, "org.freedesktop.DBus.Error.AccessDenied", "s", ("not you",)))


def impostor(address: str, to: str) -> None:
    """Send the signal to one peer alone, as anybody can."""
    with open_dbus_connection(address) as connection:
        signal = new_signal(MANAGER, "PrepareForShutdown", "b", (True,))
        signal.header.fields[HeaderFields.destination] = to
        connection.send(signal)
        connection.send_and_get_reply(message_bus.GetId(), timeout=10)  # the bus has passed it on
