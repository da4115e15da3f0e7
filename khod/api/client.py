# SPDX-License-Identifier: LGPL-2.1-or-later
"""A client of khod: blocking, one connection, one call at a time, the views of `khod.core.views` as answers.

It speaks the wire itself (JSON objects that end in a NUL, descriptors beside them): a program that asks a question needs no
event loop, and the server is tested against something that is not its own library.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self, TypedDict, TypeVar, Unpack

import msgspec

from khod.api.raising import error_of
from khod.api.wire import INTERFACE
from khod.core.views import (
    ClaimView,
    EventView,
    ImageView,
    InspectionView,
    InstanceView,
    LifecycleView,
    PlanView,
    PreflightView,
    RegisteredView,
    StatusView,
    UpdateView,
)
from khod.errors import FormatError, InvalidRequest, Lost, NotPermitted

MAX_ANSWER = 64 << 20
_MAX_FDS = 253  # SCM_MAX_FD, include/net/scm.h
_READ = 1 << 16

V = TypeVar("V")


def connect(path: Path, timeout: float | None = None) -> Client:
    """A client of the khod that listens at `path`; `timeout` is in seconds and for each read and write.

    Raises Lost when nobody answers there, NotPermitted when the socket may not be used.
    """
    return Client(dial(path, timeout))


def dial(path: Path, timeout: float | None = None) -> socket.socket:
    """The connection alone."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(timeout)
    try:
        sock.connect(str(path))
    except PermissionError:
        sock.close()
        raise NotPermitted(
            f"the socket {path} may not be used", hint="try again with sudo, or have a rule of khod's policy let you in"
        )
    except OSError as error:
        sock.close()
        raise Lost(f"khod does not answer at {path}: {error.strerror or error}", hint="is it running? systemctl status khod")
    return sock


class Asked(TypedDict, total=False):
    """What can be asked of a registration, beside name, driver and descriptors."""

    required: bool
    requires: Sequence[str]
    options: Mapping[str, str]
    lifetime: str
    states: Sequence[tuple[str, int]]
    """Names, and the most bytes of each."""
    shareable: bool


class Client:
    """One connection. Every method raises the `khod.errors` class that khod raised, and Lost when the connection ends.

    khod answers a connection's calls one after another. While the events of an update or a subscription are to come, another
    call would be answered after them, and raises InvalidRequest instead.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()
        self._more_to_come = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Hang up."""
        self._sock.close()

    # --- the interface

    def status(self) -> StatusView:
        """khod in one look."""
        return _view(self._ask("GetStatus"), "status", StatusView)

    def register(self, name: str, driver: str, fds: Sequence[tuple[str, int]], **asked: Unpack[Asked]) -> RegisteredView:
        """Register an instance; `fds` are names and descriptors of this process, which stay its own."""
        described = [{"name": fd_name, "fd": index} for index, (fd_name, _) in enumerate(fds)]
        parameters = {"name": name, "driver": driver, "fds": described, **_asked(asked)}
        return _registered(self._ask("Register", parameters, [fd for _, fd in fds]))

    def adopt(self, name: str, driver: str, pid: int, fds: Sequence[tuple[str, int]], **asked: Unpack[Asked]) -> RegisteredView:
        """Register an instance whose descriptors (names and numbers) khod takes from the process `pid`."""
        described = [{"name": fd_name, "number": number} for fd_name, number in fds]
        return _registered(self._ask("Adopt", {"name": name, "driver": driver, "pid": pid, "fds": described, **_asked(asked)}))

    def register_opaque(self, name: str, lifetime: str = "connection") -> RegisteredView:
        """Register an instance whose session its client fills by itself."""
        return _registered(self._ask("RegisterOpaque", {"name": name, "lifetime": lifetime}))

    def unregister(self, name: str = "", *, owner: str = "", handle: str = "") -> None:
        """Forget an instance."""
        self._ask("Unregister", {"name": name, "owner": owner, "handle": handle})

    def instances(self) -> Sequence[InstanceView]:
        """All of them, by name."""
        return _view(self._ask("ListInstances"), "instances", list[InstanceView])

    def load(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> ImageView:
        """Check and record the image for the next update; the paths are khod's to open."""
        parameters = {"kernel": kernel, "initrd": initrd} | ({} if cmdline is None else {"cmdline": cmdline})
        return _view(self._ask("Load", parameters), "image", ImageView)

    def plan(self) -> PlanView:
        """What an update would do now."""
        return _view(self._ask("Plan"), "plan", PlanView)

    def preflight(
        self, kernel: str = "", initrd: str = "", cmdline: str | None = None, *, overrides: Sequence[str] = ()
    ) -> PreflightView:
        """Whether an update would go through, to this kernel or, '', to the one that was loaded."""
        asked: dict[str, Any] = {"overrides": list(overrides)}
        if kernel:
            asked |= {"kernel": kernel, "initrd": initrd} | ({} if cmdline is None else {"cmdline": cmdline})
        return _view(self._ask("PreflightImage" if kernel else "Preflight", asked), "preflight", PreflightView)

    def update(self, hold_at: str | None = None, *, jump: str = "", overrides: Sequence[str] = ()) -> Iterator[EventView]:
        """Start an update, now, and follow it. Leaving early does not stop it; the connection is of no more use then.

        The iterator raises Refused before its first event when the update may not start, UpdateFailed when it was undone,
        and Lost when the connection ends first, as it does at the jump.
        """
        asked: dict[str, Any] = {"jump": jump, "overrides": list(overrides)}
        self._send("Update", asked | ({} if hold_at is None else {"hold_at": hold_at}), more=True)
        return self._events(EventView)

    def subscribe(self, handles: Sequence[str]) -> Iterator[LifecycleView]:
        """What becomes of these instances, from now on; the connection is of no other use."""
        self._send("Subscribe", {"handles": list(handles)}, more=True)
        return self._events(LifecycleView)

    def ready(
        self, update: str, phase: str, handles: Sequence[str] = (), *, quiet_for: float = 0.0, stood: float = 0.0
    ) -> None:
        """The answer to 'preparing', 'quiesce' or 'commit'."""
        answered = {"update": update, "phase": phase, "handles": list(handles)}
        said = {"quiet_for": quiet_for, "stood": stood}
        self._ask("Ready", answered | {name: value for name, value in said.items() if value})

    def failed(self, update: str, phase: str, handles: Sequence[str] = (), reason: str = "") -> None:
        """The other answer."""
        self._ask("Failed", {"update": update, "phase": phase, "handles": list(handles), "reason": reason})

    def states(self, handle: str) -> dict[str, int]:
        """The state memfds of an instance that is asked to stand still, by name, owned by the caller."""
        self._send("GetStates", {"handle": handle})
        with self._answer() as (parameters, fds):
            return dict(_received(_view(parameters, "states", list[_Sent]), fds))

    def open_session(self, handle: str) -> int:
        """A kernel session for an opaque instance, owned by the caller."""
        self._send("OpenSession", {"handle": handle})
        with self._answer() as (parameters, fds):
            return _received([_Sent("session", _view(parameters, "session", int))], fds)[0][1]

    def _events(self, kind: type[V]) -> Iterator[V]:
        while self._more_to_come:
            with self._answer() as (parameters, _):
                event = _view(parameters, "event", kind) if parameters.get("event") is not None else None
            if event is not None:
                yield event

    def proceed(self) -> None:
        """Go on from a hold."""
        self._ask("Continue")

    def abort(self) -> str:
        """Undo the update under way; the state reached."""
        return _view(self._ask("Abort"), "state", str)

    def claim(
        self,
        name: str,
        *,
        owner: str = "",
        lifetime: str | None = None,
        unverified: bool = False,
        exclusive: bool = False,
    ) -> ClaimView:
        """An instance's descriptors, close-on-exec and owned by the caller, or why there are none. `exclusive`: none while
        another process has it that lives."""
        parameters: dict[str, object] = {"name": name, "owner": owner, "unverified": unverified}
        if exclusive:  # an earlier khod does not know it, and refuses it
            parameters["exclusive"] = True
        self._send("Claim", parameters | ({} if lifetime is None else {"lifetime": lifetime}))
        with self._answer() as (answer, fds):
            claim = _view(answer, "claim", _ClaimAnswer)
            received = _received(claim.fds, fds)
        return ClaimView(
            answer=claim.answer,
            reason=claim.reason,
            names=[name for name, _ in received],
            fds=[fd for _, fd in received],
            states=claim.states,
            handle=claim.handle,
            lifetime=claim.lifetime,
            process=claim.process,
            early=claim.early,
        )

    def finished(self, handle: str, *, ran: float = 0.0) -> None:
        """The claimant has taken over, and its workload runs since `ran` seconds ago."""
        self._ask("Finished", {"handle": handle} | ({"ran": ran} if ran else {}))

    def discard(self, name: str, *, owner: str = "") -> None:
        """Let go, for good, of something that came through a jump."""
        self._ask("Discard", {"name": name, "owner": owner})

    def finish(self) -> Sequence[str]:
        """End the update that brought us here; what nobody claimed."""
        return _view(self._ask("Finish"), "unclaimed", list[str])

    def history(self, limit: int = 20) -> Sequence[UpdateView]:
        """Updates, newest first."""
        return _view(self._ask("GetHistory", {"limit": limit}), "updates", list[UpdateView])

    def inspect(self) -> InspectionView:
        """The handover tree and the folio map in force."""
        return _view(self._ask("Inspect"), "inspection", InspectionView)

    # --- the wire

    def _ask(self, method: str, parameters: Mapping[str, Any] | None = None, fds: Sequence[int] = ()) -> Mapping[str, Any]:
        self._send(method, parameters or {}, fds)
        with self._answer() as (answer, _):
            return answer

    def _send(self, method: str, parameters: Mapping[str, Any], fds: Sequence[int] = (), more: bool = False) -> None:
        if self._more_to_come:
            raise InvalidRequest(f"{method}: events are still to come on this connection", hint="use another")
        call = {"method": f"{INTERFACE}.{method}", "parameters": parameters} | ({"more": True} if more else {})
        data = json.dumps(call).encode() + b"\0"
        try:
            sent = socket.send_fds(self._sock, [data], list(fds)) if fds else 0
            self._sock.sendall(data[sent:])
        except OSError as error:
            raise _gone(error)
        self._more_to_come = more

    @contextmanager
    def _answer(self) -> Iterator[tuple[Mapping[str, Any], list[int]]]:
        """The next answer: its parameters and its descriptors.

        Those descriptors that are still in the list at the end of the context are closed.
        """
        fds: list[int] = []
        try:
            answer = _object(self._read(fds))
            self._more_to_come = bool(answer.get("continues"))
            parameters = answer.get("parameters") or {}
            if "error" in answer:
                raise error_of(str(answer["error"]), parameters)
            yield parameters, fds
        finally:
            for fd in fds:
                os.close(fd)

    def _read(self, fds: list[int]) -> bytes:
        """Bytes up to a NUL, which is left out; descriptors that came along are added to `fds`."""
        while (end := self._buffer.find(b"\0")) < 0:
            if len(self._buffer) > MAX_ANSWER:
                raise FormatError(f"khod's answer is longer than {MAX_ANSWER} bytes")
            try:
                # Not socket.recv_fds: it drops the flags that it is given (CPython 3.11), and with them close-on-exec.
                data, beside, flags, _ = self._sock.recvmsg(_READ, socket.CMSG_SPACE(4 * _MAX_FDS), socket.MSG_CMSG_CLOEXEC)
            except OSError as error:
                raise _gone(error)
            for level, kind, content in beside:
                if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                    fds.extend(memoryview(content[: len(content) // 4 * 4]).cast("i"))
            if flags & socket.MSG_CTRUNC:
                raise Lost("descriptors were lost on the way", hint="this process has too many open: raise RLIMIT_NOFILE")
            if not data:
                raise Lost("khod hung up before it had answered", hint="its log says why")
            self._buffer += data
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        return message


class _Sent(msgspec.Struct):
    name: str
    fd: int


class _ClaimAnswer(msgspec.Struct):
    answer: str
    reason: str
    fds: list[_Sent]
    states: list[str]
    handle: str
    lifetime: str = ""
    process: int = 0
    early: bool = False


def _gone(error: OSError) -> Lost:
    if isinstance(error, TimeoutError):
        return Lost("khod did not answer in time")
    return Lost(f"the connection to khod ended: {error.strerror or error}", hint="its log says why")


def _object(message: bytes) -> Mapping[str, Any]:
    try:
        return msgspec.json.decode(message, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise FormatError(f"khod's answer is not what it must be: {error}")


def _view(parameters: Mapping[str, Any], name: str, kind: type[V]) -> V:
    """The parameter `name` of an answer as `kind`; what a newer khod adds to a view is ignored."""
    try:
        return msgspec.convert(parameters.get(name), kind)
    except msgspec.ValidationError as error:
        raise FormatError(f"khod's answer is not what it must be: {name}: {error}")


def _registered(answer: Mapping[str, Any]) -> RegisteredView:
    return RegisteredView(instance=_view(answer, "instance", InstanceView), handle=_view(answer, "handle", str))


def _received(sent: Sequence[_Sent], fds: list[int]) -> list[tuple[str, int]]:
    """Descriptors with their names, taken out of `fds`. Raises FormatError, and takes none, when they do not match."""
    if sorted(entry.fd for entry in sent) != list(range(len(fds))) or len({entry.name for entry in sent}) != len(fds):
        raise FormatError(f"khod's answer names {len(sent)} descriptors and brings {len(fds)}")
    received = [(entry.name, fds[entry.fd]) for entry in sent]
    fds.clear()
    return received


def _asked(asked: Asked) -> dict[str, Any]:
    """What is asked for beyond the defaults, as parameters."""
    states = [{"name": name, "size": size} for name, size in asked.get("states", ())]
    return {**asked, "states": states, "requires": list(asked.get("requires", ())), "options": dict(asked.get("options", {}))}
