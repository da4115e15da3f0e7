# SPDX-License-Identifier: LGPL-2.1-or-later
"""A participant of live updates: registers instances, answers for them, and claims them on the other side.

Two connections: one for calls, on which READY is a lease (decision 13), and one for what khod has to say. When either
breaks, both are given up, a workload that stands still is let go on (unless it has answered `commit`, see `_lose`), and the
participant comes back by handle as soon as a khod answers, for `patience` seconds.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Self, TypeVar

from khod.api.client import Asked
from khod.client.answers import Claimed, Cold, Hold, StateWriter, read_state
from khod.client.line import Line, open_line
from khod.client.workload import Notice, Workload
from khod.core.views import LifecycleView
from khod.errors import FormatError, InvalidRequest, KhodError, Lost, NotPermitted, Refused

logger = logging.getLogger(__name__)

DEFAULT_SOCKET = Path("/run/khod/khod.sock")
PATIENCE = 300.0
"""Seconds that a participant tries to come back to a khod that is away."""
ANSWER = 120.0
"""Seconds that one call may take."""
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 5.0
_STANDS = frozenset({"frozen", "executing"})
"""States in which a khod may still jump with those who answered `commit`."""

T = TypeVar("T")


class Stage(IntEnum):
    """How far this participant has gone along with an update."""

    FREE = 0
    PREPARING = 1
    STANDING = 2
    """Asked to stand still: the workload may be stopped."""
    COMMITTED = 3
    """READY was said to `commit`: only khod, or the deadline, lets it go on."""
    EXECUTING = 4
    """Only khod lets it go on."""


@dataclass(frozen=True, slots=True)
class _Instance:
    handle: str
    states: bool
    opaque: bool


class Participant:
    """Register or claim, then `start`; methods may be called from any thread.

    Raises Lost when no khod answers at `path`, NotPermitted when it may not be used. Every method raises the class of
    `khod.errors` that khod raised, and Lost while it is away.
    """

    def __init__(self, workload: Workload, *, path: str | Path = DEFAULT_SOCKET, patience: float = PATIENCE) -> None:
        self._workload = workload
        self._path = Path(path)
        self._patience = patience
        self._instances: dict[str, _Instance] = {}
        self._sessions: dict[str, int] = {}
        self._lock = threading.RLock()
        self._line = open_line(self._path, ANSWER)
        self._news: Line | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._over = False
        self._stage, self._update, self._due = Stage.FREE, "", 0.0
        self._taking: set[str] = set()
        """Handles of the instances that the update under way is asked about."""

    # --- what a VMM asks for

    def claim(
        self,
        name: str,
        *,
        owner: str = "",
        lifetime: str | None = None,
        unverified: bool = False,
        exclusive: bool = False,
        opaque: bool = False,
    ) -> Claimed | Cold | Hold:
        """Take over what came through a jump. When it did, it is registered again, by default with the lifetime that it had,
        and answered for from `start` on; `opaque` says that it is of those whose session the workload fills. `exclusive`: Hold
        while another process has it that lives, so that no two start the same workload."""
        self._not_started()
        claim = self._call(
            lambda line: line.claim(name, owner=owner, lifetime=lifetime, unverified=unverified, exclusive=exclusive)
        )
        fds = dict(zip(claim.names, claim.fds, strict=True))
        if claim.answer == "cold":
            return Cold(claim.reason)
        if claim.answer == "hold":
            return Hold(claim.reason, claim.process)
        try:
            if claim.answer != "fds" or not set(claim.states) <= set(fds):
                raise FormatError(f"khod's answer to the claim of {name} is not what it must be: {claim}")
            states = {state: read_state(state, fds[state]) for state in claim.states}
        except BaseException:
            _close_all(fds)
            raise
        _close_all({state: fds.pop(state) for state in claim.states})
        self._instances[name] = _Instance(claim.handle, bool(states), opaque)
        return Claimed(name, states, fds)

    def register(
        self,
        name: str,
        fds: Mapping[str, int],
        *,
        states: Mapping[str, int] | None = None,
        driver: str = "guestmemfd",
        required: bool = True,
        requires: tuple[str, ...] = (),
        options: Mapping[str, str] | None = None,
        lifetime: str = "connection",
        shareable: bool = False,
    ) -> None:
        """Register an instance. `fds` stay the caller's; `states` are names and the most bytes that each will need."""
        self._not_started()
        asked: Asked = {
            "required": required, "requires": requires, "options": options or {}, "lifetime": lifetime,
            "states": list((states or {}).items()), "shareable": shareable,
        }  # fmt: skip
        made = self._call(lambda line: line.register(name, driver, list(fds.items()), **asked))
        self._instances[name] = _Instance(made.handle, bool(states), False)

    def register_opaque(self, name: str, *, lifetime: str = "connection") -> None:
        """Register an instance whose kernel session the workload fills by itself, when it is given one in `preparing`."""
        self._not_started()
        made = self._call(lambda line: line.register_opaque(name, lifetime))
        self._instances[name] = _Instance(made.handle, False, True)

    def start(self) -> None:
        """Answer for everything that was registered and claimed, from the return of this on."""
        self._not_started()
        if not self._instances:
            raise InvalidRequest("there is nothing to answer for", hint="register or claim before start")
        news, views, _ = self._subscribe()
        self._news = news
        self._thread = threading.Thread(target=self._run, args=(views,), name="khod-participant", daemon=True)
        self._thread.start()

    def finished(self, name: str, *, since: float = 0.0) -> None:
        """Say of what was claimed that it lives: nothing of the jump is needed for it any more. `since`, by time.monotonic(),
        is when it began to run, 0 for now: khod's ledger has its blackout until then. Returns when khod has compared all that
        came through with what was noted of it, which takes minutes where that is terabytes."""
        handle = self._own(name).handle

        def ask(line: Line) -> None:
            line.patience(None)
            try:
                line.finished(handle, ran=time.monotonic() - since if since else 0.0)
            finally:
                line.patience(ANSWER)

        self._call(ask)

    def unregister(self, name: str) -> None:
        """Let khod forget it. Refused during an update."""
        mine = self._own(name)
        del self._instances[name]  # before: with the last one the subscription ends, which is no loss then
        try:
            self._call(lambda line: line.unregister(handle=mine.handle))
        except (Refused, InvalidRequest):
            self._instances[name] = mine
            raise

    def close(self) -> None:
        """Hang up, and wait for the call to the workload that is under way; instances of lifetime 'connection' end with it.
        Again: no effect. A workload that stands still is not told to go on: who closes, knows."""
        self.hang_up()
        if self._thread is None:
            self._let_go()
        elif self._thread is not threading.current_thread():
            self._thread.join()

    def hang_up(self) -> None:
        """Begin to close, and wait for nothing."""
        self._closing.set()
        self._hang_up()

    def _let_go(self) -> None:
        """Close everything: by the thread, where there is one."""
        with self._lock:
            self._over = True
            self._line.close()
            if self._news is not None:
                self._news.close()
        _close_all(self._sessions)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _own(self, name: str) -> _Instance:
        try:
            return self._instances[name]
        except KeyError:
            raise InvalidRequest(f"{name!r} was neither registered nor claimed here")

    def _not_started(self) -> None:
        if self._thread is not None:
            raise Refused("this participant has started", hint="register and claim before start, or make another for it")

    # --- connections

    def _call(self, ask: Callable[[Line], T]) -> T:
        """A call on the line that leases hang on. When it is lost, so is the subscription: its thread comes back with both.

        A line on which nothing hangs may have been closed for being idle; that is no loss, there is another.
        """
        with self._lock:
            if self._over:
                raise Lost("this participant has ended", hint="make another")
            if self._news is not None and self._stage < Stage.STANDING and not self._line.there():
                self._renew()
            try:
                return ask(self._line)
            except (Lost, FormatError):
                self._hang_up()
                raise

    def _renew(self) -> None:
        line = open_line(self._path, ANSWER)
        self._line.close()
        self._line = line

    def _hang_up(self) -> None:
        self._line.hang_up()
        if (news := self._news) is not None:
            news.hang_up()

    def _handles(self) -> list[str]:
        return [instance.handle for instance in self._instances.values()]

    def _subscribe(self) -> tuple[Line, Iterator[LifecycleView], LifecycleView]:
        news = open_line(self._path, ANSWER)
        try:
            views = news.subscribe(self._handles())
            first = next(views, None)
            if first is None or first.phase != "subscribed":
                raise FormatError(f"khod's subscription begins with {first}")
            news.patience(None)
        except BaseException:
            news.close()
            raise
        return news, views, first

    def _lose(self, error: Lost) -> None:
        """A connection ended. Leases end with it, so khod will not jump with us, and who stands still may go on: but not who
        has answered `commit`, for khod may be jumping at this moment."""
        self._hang_up()
        logger.warning("khod is away: %s", error)
        if self._stage < Stage.COMMITTED:
            self._resume(error.message)
        self._resume_if_overdue()

    def _come_back(self) -> Iterator[LifecycleView] | None:
        """A new subscription, on new connections; None when the participant is closed. Raises what says that there will be
        none."""
        give_up, pause = time.monotonic() + self._patience, FIRST_PAUSE
        while not self._closing.wait(self._pause(pause)):
            self._resume_if_overdue()
            try:
                return self._reconnect()
            except NotPermitted:
                raise
            except (Lost, Refused) as error:  # Refused: this khod has not noticed yet that we were gone
                if time.monotonic() >= give_up and self._stage is not Stage.COMMITTED:
                    raise error
            pause = min(2 * pause, LONGEST_PAUSE)
        return None

    def _pause(self, longest: float) -> float:
        return min(longest, max(0.0, self._due - time.monotonic())) if self._stage is Stage.COMMITTED else longest

    def _reconnect(self) -> Iterator[LifecycleView]:
        with self._lock:
            self._renew()
        try:
            news, views, first = self._subscribe()
        except BaseException:
            self._line.hang_up()
            raise
        if self._news is not None:
            self._news.close()
        self._news = news
        if self._closing.is_set():
            self._hang_up()
        if first.reason not in _STANDS:
            self._resume(f"khod came back and is {first.reason}")  # decision 14: it has undone what was under way
        return views

    # --- the thread

    def _run(self, views: Iterator[LifecycleView] | None) -> None:
        try:
            while views is not None:
                try:
                    for view in views:
                        self._hear(view)
                    raise Lost("khod ended the subscription")
                except Lost as error:
                    if self._closing.is_set() or not self._instances:
                        return
                    self._lose(error)
                views = self._come_back()
        except KhodError as error:
            self._end(error)
        finally:
            self._let_go()

    def _end(self, error: KhodError) -> None:
        self._hang_up()
        logger.error("khod is given up: %s", error)
        # Whoever does not know us will not jump with us either. A khod that stays away may be the one that is jumping.
        if self._stage is not Stage.EXECUTING or not isinstance(error, Lost):
            self._resume(error.message)
        try:
            self._workload.lost(error)
        except Exception:
            logger.exception("the workload failed at being told of it")

    def _hear(self, view: LifecycleView) -> None:
        match view.phase:
            case "preparing" | "quiesce" | "commit":
                self._asked(view)
            case "executing":
                self._stage = Stage.EXECUTING
                self._listen(None)
                self._tell(self._workload.executing, view)
            case "aborted" if view.handles and self._taking - set(view.handles):
                self._left_behind(view)
            case "aborted":
                self._resume(view.reason)
            case "restored":
                self._tell(self._workload.restored, view)
            case _ if view.deadline:
                self._answer(view, f"this client does not know what {view.phase!r} asks for")
            case _:
                logger.info("khod says %s %s", view.phase, view.reason)

    def _asked(self, view: LifecycleView) -> None:
        until = time.monotonic() + view.deadline
        ask = {"preparing": self._workload.preparing, "quiesce": self._workload.quiesce, "commit": self._workload.commit}
        stage = {"preparing": Stage.PREPARING, "quiesce": Stage.STANDING}.get(view.phase, self._stage)
        self._stage, self._update = max(stage, self._stage), view.update
        self._taking = set(view.handles or self._handles())
        with contextlib.ExitStack() as lent:
            try:
                notice = self._notice(view, until, lent)
            except Lost:
                raise
            except KhodError as error:
                self._answer(view, str(error))
                return
            told = time.monotonic()
            try:
                ask[view.phase](notice)
            except Exception as error:
                logger.exception("the workload fails %s at %s", ", ".join(notice.instances), view.phase)
                reason = str(error) or type(error).__name__
            else:
                reason = ""
        if view.phase == "commit" and not reason:
            self._stage, self._due = Stage.COMMITTED, until
            self._listen(max(0.001, until - time.monotonic()))
        self._answer(view, reason, time.monotonic() - told if view.phase == "quiesce" else 0.0)

    def _answer(self, view: LifecycleView, reason: str, stood: float = 0.0) -> None:
        """READY, or FAILED for a reason. A workload stands still from when it was told to, `stood` seconds ago."""
        handles = view.handles or self._handles()
        try:
            if reason:
                self._call(lambda line: line.failed(view.update, view.phase, handles, reason))
            else:
                self._call(lambda line: line.ready(view.update, view.phase, handles, stood=stood))
        except Refused as error:
            logger.warning("khod does not take the answer to %s: %s", view.phase, error)

    def _notice(self, view: LifecycleView, until: float, lent: contextlib.ExitStack) -> Notice:
        """With what is lent: states until `lent` ends, sessions until the update does."""
        meant = {name: mine for name, mine in self._instances.items() if not view.handles or mine.handle in view.handles}
        states = {}
        for name, mine in meant.items():
            if view.phase == "quiesce" and mine.states:
                handle = mine.handle
                fds = self._call(lambda line, handle=handle: line.states(handle))  # type: ignore[misc]
                lent.callback(_close_all, fds)
                states[name] = {state: StateWriter(state, fd) for state, fd in fds.items()}
            if view.phase == "preparing" and mine.opaque and name not in self._sessions:
                handle = mine.handle
                self._sessions[name] = self._call(lambda line, handle=handle: line.open_session(handle))  # type: ignore[misc]
        sessions = {name: fd for name, fd in self._sessions.items() if name in meant}
        return Notice(
            update=view.update, instances=tuple(meant), until=until, reason=view.reason, states=states, sessions=sessions
        )

    def _tell(self, told: Callable[[Notice], None], view: LifecycleView) -> None:
        meant = tuple(name for name, mine in self._instances.items() if not view.handles or mine.handle in view.handles)
        try:
            told(Notice(update=view.update, instances=meant, reason=view.reason))
        except Exception:
            logger.exception("the workload fails at being told %s", view.phase)

    def _listen(self, seconds: float | None) -> None:
        if self._news is not None:
            self._news.patience(seconds)

    def _resume_if_overdue(self) -> None:
        if self._stage is Stage.COMMITTED and time.monotonic() >= self._due:
            self._resume("no jump came before the deadline of commit")

    def _left_behind(self, view: LifecycleView) -> None:
        """It is over for these alone: the update goes on with the others, which must go on standing still."""
        self._taking -= set(view.handles)
        for name, mine in self._instances.items():
            if mine.handle in view.handles and name in self._sessions:
                os.close(self._sessions.pop(name))
        self._tell(self._workload.aborted, view)

    def _resume(self, reason: str) -> None:
        """Let the workload go on, if it went along with an update."""
        if self._stage is Stage.FREE:
            return
        self._stage = Stage.FREE
        self._listen(None)
        _close_all(self._sessions)
        self._tell(self._workload.aborted, LifecycleView(phase="aborted", update=self._update, reason=reason))


def _close_all(fds: dict[str, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])
