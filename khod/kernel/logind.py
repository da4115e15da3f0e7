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

from khod.errors import Refused

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
    as long as InhibitDelayMaxSec= says. Raises Refused."""
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
    """What logind says with PrepareForShutdown, from now on: True that a shutdown begins, False that it does not happen after
    all. Never ends: a bus that is not there, or goes away, is tried again."""
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
        before = await _asked(connection)
        if before:
            yield True
        while True:
            if ours.matches(await connection.receive()) and (now := await _asked(connection)) != before:
                before = now
                yield now
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


def _manager() -> DBusAddress:
    from jeepney import DBusAddress

    return DBusAddress(_PATH, bus_name=_BUS, interface=_INTERFACE)


def _call(message: Message, *, enable_fds: bool = False) -> tuple[Any, ...]:
    """What logind answers. Raises Refused when it says no, or nothing."""
    from jeepney import DBusErrorResponse
    from jeepney.io.blocking import open_dbus_connection
    from jeepney.wrappers import unwrap_msg

    try:
        with open_dbus_connection("SYSTEM", enable_fds=enable_fds, auth_timeout=ANSWER) as connection:
            answer: tuple[Any, ...] = unwrap_msg(connection.send_and_get_reply(message, timeout=ANSWER))
            return answer
    except DBusErrorResponse as error:
        raise Refused(f"logind refused: {error.name}: {' '.join(map(str, error.data))}")
    except (OSError, EOFError, RuntimeError) as error:  # TimeoutError is an OSError, jeepney's AuthenticationError is not
        said = str(error) or type(error).__name__
        raise Refused(f"logind cannot be reached: {said}", hint="see `systemctl status systemd-logind dbus`")
