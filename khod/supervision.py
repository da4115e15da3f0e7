# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod tells systemd, and what it hears from there.

systemd is told by notifications (sd_notify(3)): that khod is ready, alive, at work, about to end, and in a sentence how it is
doing. It tells khod to end by SIGTERM, which by itself undoes nothing, and logind tells that a shutdown begins, which does.
"""

from __future__ import annotations

import asyncio
import logging
import os
import select
import socket
import time
from collections import deque
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Protocol, TypeVar

from khod.core.alerts import Alert, alert
from khod.core.host import Host
from khod.core.state import State
from khod.errors import KhodError
from khod.kernel import logind

logger = logging.getLogger(__name__)
T = TypeVar("T")

STATUS_INTERVAL = 1.0
"""Seconds within which a change of what khod does shows in systemd, and within which one who waits to end sees that he may."""
ANY_MOMENT = 0.02
"""Seconds."""
PILE = 64
"""Notifications that may wait to be taken."""
ANSWERABLE = frozenset({State.IDLE, State.RESTORED, State.LOST, State.ABORTED})
"""States in which `khoctl claim` has an answer for everybody: khod-restored.target is reached (decision 24)."""
UNANSWERABLE = frozenset({State.RESTORING, State.FAILED, State.UNREACHABLE})
"""States in which some must not be started. All others follow upon one of the first, and change nothing."""


class Manager(Protocol):
    """What is asked of systemd itself."""

    def stopping(self) -> bool:
        """Whether the system is on its way down. Raises KhodError when nobody knows."""
        ...

    def coming(self) -> bool:
        """Whether a kexec is under way, or the system is stopping. Raises KhodError when nobody knows."""
        ...


class Notifier:
    """Notifications, where systemd listens for them. Made once, before the environment is passed on to anybody.

    By the protocol of sd_notify(3) over a socket that does not block: libsystemd's call waits while the receiver's queue is
    full, and a PID 1 that waits for khod must not have khod wait for it. What is not taken is said again with the next.
    """

    def __init__(self) -> None:
        self._socket: socket.socket | None = None
        self._status = ""
        self._pile: deque[str] = deque(maxlen=PILE)
        self.watchdog = _watchdog()
        """Seconds within which systemd wants to hear that khod is alive; 0 when it does not."""
        if address := os.environ.get("NOTIFY_SOCKET", ""):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
            try:
                self._socket.connect("\0" + address[1:] if address[0] == "@" else address)
            except OSError as error:  # systemd being told is no condition of anything that khod does
                logger.warning("systemd cannot be told anything at %s: %s", address, error)
                self._socket.close()
                self._socket = None

    def status(self, text: str) -> None:
        """What khod is doing, for `systemctl status`; said once as long as it is the same."""
        if text != self._status:
            self._status = text
            self.tell(f"STATUS={text}")

    def progress(self, text: str, seconds: float) -> None:
        """Something is done on the way to ready, and the next will be within `seconds`: the start may take that much longer."""
        self._status = text
        self.tell(f"STATUS={text}\nEXTEND_TIMEOUT_USEC={round(seconds * 1e6)}")

    def tell(self, text: str) -> None:
        """One notification, now or as soon as it is taken; the oldest of very many are dropped."""
        self._pile.append(text)
        self.flush(0)

    def flush(self, seconds: float) -> bool:
        """Wait at most so long until everything is taken; whether it is."""
        deadline = time.monotonic() + seconds
        while self._pile and self._socket is not None:
            try:
                self._socket.send(self._pile[0].encode())
            except BlockingIOError:
                poll = select.poll()  # select(2) knows descriptors below 1024 alone
                poll.register(self._socket, select.POLLOUT)
                left = deadline - time.monotonic()
                if left <= 0 or not poll.poll(left * 1000):
                    return False
                continue
            except OSError as error:
                logger.warning("systemd cannot be told %r: %s", self._pile[0], error)
            self._pile.popleft()
        return True

    def close(self) -> None:
        """Say no more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def keep_alive(self) -> None:
        """Say that khod is alive, twice in the time that systemd gives: from the event loop, since that is what must live."""
        while self.watchdog:
            self.tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog / 2)


def _watchdog() -> float:
    """WATCHDOG_USEC, if it is meant for this process (sd_watchdog_enabled(3))."""
    try:
        if int(os.environ.get("WATCHDOG_PID", os.getpid())) != os.getpid():
            return 0.0
        return max(0, int(os.environ.get("WATCHDOG_USEC", 0))) / 1e6
    except ValueError:
        return 0.0


class Answerable:
    """The file `restored` in systemd's runtime directory, which khod-restored.target asserts. None without such a directory."""

    def __init__(self) -> None:
        directory = os.environ.get("RUNTIME_DIRECTORY", "").split(":")[0]
        self._path = Path(directory, "restored") if directory else None

    def say(self, state: State) -> None:
        """There in the states in which a claim has an answer, not there in those in which it has none."""
        if self._path is None:
            return
        try:
            if state in ANSWERABLE:
                self._path.touch()
            elif state in UNANSWERABLE:
                self._path.unlink(missing_ok=True)
        except OSError as error:
            logger.error("khod-restored.target cannot be told: %s", error)


def sentence(host: Host) -> str:
    """How khod is doing, for an operator in a hurry."""
    instances = len(host.registry)
    unclaimed = sum(entry.state.unclaimed for entry in host.registry)
    update = host.last_update
    match host.state:
        case State.RESTORED if unclaimed:
            text = f"restored: {unclaimed} of {instances} instances not claimed yet"
        case State.RESTORED | State.IDLE | State.ABORTED:
            text = f"{host.state}: {instances} instances"
        case State.LOST:
            text = "lost: nothing came across the last jump; start guests cold"
        case State.UNREACHABLE:
            text = "unreachable: memory came across and cannot be had; start nothing that it belongs to"
        case State.FAILED:
            text = "failed: see `khoctl status`"
        case state:
            text = f"update {update.id}: {state}" if update is not None else str(state)
            text += ", held" if update is not None and update.held else ""
    problems = len(host.problems) + (len(update.problems) if update is not None else 0)
    return f"{text}; {problems} problems, see `khoctl status`" if problems else text


async def show(host: Host, notifier: Notifier, answerable: Answerable, told: asyncio.Event) -> None:
    """Keep systemd informed of how khod is doing, until it was told to end: then what it waits for is the news."""
    while not told.is_set():
        notifier.status(sentence(host))
        answerable.say(host.state)
        await asyncio.sleep(STATUS_INTERVAL)


async def undo_at_shutdown(host: Host, manager: Manager) -> None:
    """When a shutdown begins that is not the jump of an update, undo the update that is under way; logind waits for that
    while the update's inhibitor lasts. And when the shutdown that is its jump does not happen after all, say so. Never ends."""
    async for begins in logind.shutdowns():
        update = host.last_update
        if update is not None and update.accepted:
            # logind says False as well when its job is done, and that is the jump.
            if not begins and not await _asked(manager.coming, unknown=True):
                update.came_back("logind says that the shutdown does not happen")
        elif begins and not _left_to_systemd(host):
            await undo(host, "a shutdown begins")


async def undo(host: Host, why: str) -> None:
    """Undo the update under way, if there is one."""
    if not host.state.outgoing:
        return
    alert(logger, Alert.SHUTDOWN, "%s: undoing the update", why)
    try:
        await host.abort()
    except KhodError as error:
        logger.error("%s, and the update could not be undone: %s", why, error)


async def until_it_may_end(told: asyncio.Event, host: Host, manager: Manager, say: Callable[[str], None]) -> bool:
    """Wait to be told to end, and then until that loses nothing: until the update is over, and somebody else holds what came
    through (decision 25). A system that goes down without logind having said so is a reason to undo as well.

    Returns whether khod must go at once and let go of nothing: the jump is PID 1's (decision 17).
    """
    await told.wait()
    said = ""
    while not _accepted(host) and (reason := host.keeps_from_exit()):
        if _left_to_systemd(host):  # whether PID 1 accepts is known any moment, and nobody is to wait for us then
            await asyncio.sleep(ANY_MOMENT)
            continue
        if reason != said:
            alert(logger, Alert.STAYS, "not stopping yet: %s", reason)
            said = reason
        say(f"Not stopping yet: {reason}")
        if host.state.outgoing and await _asked(manager.stopping, unknown=False):
            await undo(host, "the system is going down")
            continue
        await asyncio.sleep(STATUS_INTERVAL)
    return _accepted(host)


def _accepted(host: Host) -> bool:
    return host.last_update is not None and host.last_update.accepted


def _left_to_systemd(host: Host) -> bool:
    return host.last_update is not None and host.last_update.left_to_systemd


async def _asked(question: Callable[[], bool], *, unknown: bool) -> bool:
    try:
        return await asyncio.to_thread(question)
    except KhodError as error:
        logger.warning("systemd does not say what it is doing: %s", error)
        return unknown


async def beside(main: Awaitable[T], *others: Awaitable[None]) -> T:
    """Await `main` with the others running beside it; one that fails is logged and missed, no more."""
    tasks = [asyncio.ensure_future(other) for other in others]
    for task in tasks:
        task.add_done_callback(_failed)
    try:
        return await main
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _failed(task: asyncio.Future[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.error("khod goes on without what failed: %r", error, exc_info=error)
