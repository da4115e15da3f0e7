# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod says to logind, and hears from it, over D-Bus (org.freedesktop.login1(5)).

jeepney speaks the protocol. It is imported by the calls: nothing here is on the way to restored.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

from khod.errors import NotPermitted, Refused

if TYPE_CHECKING:
    from jeepney import DBusAddress, Message
    from jeepney.io.asyncio import DBusConnection

logger = logging.getLogger(__name__)

ANSWER = 5.0
"""Seconds within which logind answers a call; it does nothing that takes time for ours."""
FIRST_PAUSE, LONGEST_PAUSE = 0.1, 10.0
"""Seconds between attempts to reach a bus that is not there: at boot khod is there first."""


def inhibit(why: str) -> int:
    """A delay inhibitor for shutdown: an owned descriptor, close-on-exec, that lets go of it when closed. logind waits for it
    as long as InhibitDelayMaxSec= says. Raises Refused where there is no logind, NotPermitted when it says no."""
    from jeepney import new_method_call

    call = new_method_call(_manager(), "Inhibit", "ssss", ("shutdown", "khod", why, "delay"))
    (descriptor,) = _call(call, enable_fds=True)
    fd: int = descriptor.to_raw_fd()
    os.set_inheritable(fd, False)
    return fd


def preparing() -> bool:
    """Whether a shutdown is on its way, in the part where logind waits for inhibitors or longer. Raises Refused."""
    from jeepney import Properties

    ((_type, value),) = _call(Properties(_manager()).get("PreparingForShutdown"))
    return bool(value)


async def shutdowns() -> AsyncIterator[bool]:
    """Whether a shutdown is on its way, each time that logind says something about it (PrepareForShutdown): True that one
    begins, False that it does not happen after all, or is done. Never ends: a bus that is not there is tried again."""
    pause = FIRST_PAUSE
    while True:
        try:
            async for value in _shutdowns():
                pause = FIRST_PAUSE
                yield value
        except (OSError, EOFError, TimeoutError, RuntimeError) as error:
            logger.debug("the system bus: %r", error)
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)


async def _shutdowns() -> AsyncIterator[bool]:
    """The signals of one connection. Raises OSError, EOFError, TimeoutError or RuntimeError when it cannot be had, or ends."""
    from jeepney import MatchRule, message_bus
    from jeepney.io.asyncio import open_dbus_connection

    async with asyncio.timeout(ANSWER):
        connection = await open_dbus_connection("SYSTEM")
    rule = MatchRule(type="signal", sender=_BUS, interface=_INTERFACE, member="PrepareForShutdown", path=_PATH)
    ours = MatchRule(type="signal", interface=_INTERFACE, member="PrepareForShutdown", path=_PATH)
    try:
        await connection.send(message_bus.AddMatch(rule))
        # What was said before we listened is a property by now. It also decides what a signal means: anybody may send one
        # to us alone, past the rule, and only logind can change the property.
        if await _asked(connection):
            yield True
        while True:
            if ours.matches(await connection.receive()):
                yield await _asked(connection)
    finally:
        connection.writer.close()


async def _asked(connection: DBusConnection) -> bool:
    """PreparingForShutdown, over this connection. Signals that come before the answer are older than it."""
    from jeepney import HeaderFields, MessageFlag, MessageType, Properties

    question = Properties(_manager()).get("PreparingForShutdown")
    question.header.flags |= MessageFlag.no_auto_start  # a logind that is not there prepares no shutdown
    serial = next(connection.outgoing_serial)
    async with asyncio.timeout(ANSWER):
        await connection.send(question, serial=serial)
        while True:
            answer = await connection.receive()
            if answer.header.fields.get(HeaderFields.reply_serial) != serial:
                continue
            return answer.header.message_type is MessageType.method_return and bool(answer.body[0][1])


_BUS, _PATH, _INTERFACE = "org.freedesktop.login1", "/org/freedesktop/login1", "org.freedesktop.login1.Manager"


_ABSENT = ("ServiceUnknown", "NameHasNoOwner", "Spawn.", "NoReply", "Timeout")
"""What the bus itself answers, under org.freedesktop.DBus.Error., when nobody is there."""


def _manager() -> DBusAddress:
    from jeepney import DBusAddress

    return DBusAddress(_PATH, bus_name=_BUS, interface=_INTERFACE)


def _call(message: Message, *, enable_fds: bool = False) -> tuple[Any, ...]:
    """What logind answers. Raises NotPermitted when it says no, Refused when it says nothing."""
    from jeepney import DBusErrorResponse
    from jeepney.io.blocking import open_dbus_connection
    from jeepney.wrappers import unwrap_msg

    try:
        with open_dbus_connection("SYSTEM", enable_fds=enable_fds, auth_timeout=ANSWER) as connection:
            answer: tuple[Any, ...] = unwrap_msg(connection.send_and_get_reply(message, timeout=ANSWER))
            return answer
    except DBusErrorResponse as error:
        said = f"{error.name}: {' '.join(map(str, error.data))}"
        if error.name.removeprefix("org.freedesktop.DBus.Error.").startswith(_ABSENT):
            raise Refused(f"there is no logind: {said}")
        raise NotPermitted(f"logind refused: {said}", hint="a shutdown may be under way: see `systemctl list-jobs`")
    except (OSError, EOFError, RuntimeError) as error:  # TimeoutError is an OSError, jeepney's AuthenticationError is not
        said = str(error) or type(error).__name__
        raise Refused(f"logind cannot be reached: {said}", hint="see `systemctl status systemd-logind dbus`")
