# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an operator would want to be woken for, or to count: each event has a MESSAGE_ID that never changes.

In systemd's journal the entry of an event carries it, so that `journalctl MESSAGE_ID=...` finds every one, whatever the
message says; `journalctl -x` explains it by the catalog, which is made of this table, as is the table in docs/systemd.md.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from enum import Enum

from khod.core.state import State


class Alert(Enum):
    """One kind of event: MESSAGE_ID, level, subject, and what it means or asks for."""

    UPDATE_STARTED = (
        "01529c62a5cd48ce9bac468ff52b8d7f",
        logging.INFO,
        "An update has started",
        "Memory is being preserved, the workload still runs. `khoctl abort` takes everything back.",
    )
    UPDATE_EXECUTING = (
        "5c885134b652478b91474ce335cb21b4",
        logging.INFO,
        "The jump into the next kernel is next",
        "The intent is on the disk. The next khod says what came across; if the kernel comes back, this one undoes the update.",
    )
    UPDATE_ABORTED = (
        "5c140e6ffbf84438b5cb6e8e549f0c5d",
        logging.WARNING,
        "An update was undone",
        "The workload goes on as before. `khoctl history` has the reason: mend it and update again.",
    )
    UPDATE_UNDONE_WITH_PROBLEMS = (
        "465a328329884ce3ab34a4e9539891bd",
        logging.ERROR,
        "An update could not be undone whole",
        "No memory is lost; part of the workload may stand still. Mend what `khoctl status` names; `khoctl abort` tries again.",
    )
    UPDATE_UNDONE_AT_START = (
        "0dc6e51e5df5412981c9bb6d46595c81",
        logging.WARNING,
        "An update that its khod did not end was undone",
        "khod ended in the middle of an update and was started again. Find out why: `journalctl -u khod -b`.",
    )
    INSTANCE_LEFT_BEHIND = (
        "7847cf9122484391994bdc6588459759",
        logging.WARNING,
        "An instance does not come along",
        "It is optional, or has ended, and the update goes on without it.",
    )
    RESTORED = (
        "d2ac27185ded4594baccad942a19bf56",
        logging.INFO,
        "Everything came through",
        "Every instance can be claimed: `khoctl claim`.",
    )
    RESTORED_WITH_PROBLEMS = (
        "f9c7a8d8d2ab49f4b4e257e0e4bb73c2",
        logging.ERROR,
        "What came through can be claimed, but not all of it is as it was",
        "`khoctl status` names the problems, `khoctl instances` the instances that must not be started from disk meanwhile.",
    )
    NOT_RESTORED = (
        "1c3f864785fc4b4fb346645fcbc5e14a",
        logging.CRITICAL,
        "Memory came through and was not restored",
        'khod cannot read its own notes. The memory is kept; start no guest that it belongs to. See "Failed" in the runbook.',
    )
    LOST = (
        "664858b5e7534183935778426508f1a4",
        logging.CRITICAL,
        "Nothing came across the jump",
        "Guests start cold, from their disks.",
    )
    UNREACHABLE = (
        "6034e444e5ef44babaccf2abda29fa68",
        logging.CRITICAL,
        "Memory came across and this kernel cannot reach it",
        'Start no guest that it belongs to. A cold boot frees it. See "Unreachable" in the runbook.',
    )
    INSTANCE_UNSOUND = (
        "8e67df2329994e5e9000693cadc06e71",
        logging.ERROR,
        "An instance came through and cannot be vouched for",
        "A claim answers `hold`, and no update starts. Hand it out by `khoctl claim --unverified`, or discard it.",
    )
    MEMORY_DIFFERS = (
        "e0b0c22d87c945efbe4e8ad59936ad26",
        logging.CRITICAL,
        "Memory that came through is not what it was",
        "Found after it was handed out. `khoctl status` names it; stop the guest that it belongs to.",
    )
    ORPHAN = (
        "5a89ac87123e482eb44bd0be42be17d6",
        logging.WARNING,
        "Nobody has claimed an instance that came through",
        "It is kept, and pins its memory. Claim it, or discard it.",
    )
    NO_JOURNAL = (
        "cd7aebafb077479884161d8609dcc1de",
        logging.ERROR,
        "khod's journal cannot be written to",
        "No update starts until it can. Free space on the disk of the state directory, or make it writable.",
    )
    NOT_STARTED = (
        "f9e020e1f01d49ca9517393cb81dcc3b",
        logging.ERROR,
        "khod could not start",
        "The message names what is wrong and where. systemd tries again.",
    )
    ANOTHER_KHOD = (
        "55b319096a214b97b7f047da1888641f",
        logging.ERROR,
        "Another khod is running",
        "One khod to a state directory and a socket; the second has touched nothing.",
    )
    NO_CUSTODY = (
        "b86225e824ab467984105859e4aa22cb",
        logging.CRITICAL,
        "Nobody answers for the descriptors in custody",
        "Memory that came through may have one holder less than it should. See `systemctl status khod-custodian`.",
    )
    SHUTDOWN = (
        "545b83eb8a1c46e3a00d39cd93189cf3",
        logging.WARNING,
        "A shutdown has begun during an update",
        "The update is being undone.",
    )
    STAYS = (
        "904d7d4945c7466dac1c75e69b9d3564",
        logging.WARNING,
        "khod was told to stop and cannot yet",
        "It stops when the update is over. The message says what it waits for.",
    )

    @property
    def ident(self) -> str:
        """MESSAGE_ID: 32 hexadecimal digits."""
        ident: str = self.value[0]
        return ident

    @property
    def level(self) -> int:
        """A level of logging."""
        level: int = self.value[1]
        return level

    @property
    def subject(self) -> str:
        """What happened, without a full stop."""
        subject: str = self.value[2]
        return subject

    @property
    def text(self) -> str:
        """What it means for an operator."""
        text: str = self.value[3]
        return text


OF_STATE = {
    State.PREPARING: Alert.UPDATE_STARTED,
    State.EXECUTING: Alert.UPDATE_EXECUTING,
    State.ABORTED: Alert.UPDATE_ABORTED,
    State.FAILED: Alert.UPDATE_UNDONE_WITH_PROBLEMS,
}
"""States that an update enters in the old kernel, and what that is to an operator."""
AT_START = {
    State.ABORTED: Alert.UPDATE_UNDONE_AT_START,
    State.FAILED: Alert.NOT_RESTORED,
    State.LOST: Alert.LOST,
    State.UNREACHABLE: Alert.UNREACHABLE,
}
"""States that a khod finds itself in, likewise."""


def alert(logger: logging.Logger, kind: Alert, message: str, *arguments: object, **fields: str) -> None:
    """Log an event. `fields` go into the journal's entry under their names, in capitals: KHOD_UPDATE and the like."""
    logger.log(kind.level, message, *arguments, extra={"MESSAGE_ID": kind.ident, **fields}, stacklevel=2)


def alert_start(logger: logging.Logger, state: State, update: str, problems: Sequence[str]) -> None:
    """Say what a khod that starts has found."""
    kind = AT_START.get(state)
    if state is State.RESTORED:
        kind = Alert.RESTORED_WITH_PROBLEMS if problems else Alert.RESTORED
    said = f"started in state {state}" + (f": {'; '.join(problems)}" if problems else "")
    if kind is None:
        logger.log(logging.WARNING if problems else logging.INFO, "%s", said)
    else:
        alert(logger, kind, "%s", said, KHOD_UPDATE=update, KHOD_STATE=state)


def catalog() -> str:
    """systemd/khod.catalog, in the format of systemd's message catalogs."""
    entries = [f"-- {kind.ident}\nSubject: {kind.subject}\nDefined-By: khod\n\n{kind.text}\n" for kind in Alert]
    return "# SPDX-License-Identifier: LGPL-2.1-or-later\n\n" + "\n".join(entries)


def table() -> str:
    """The rows of docs/systemd.md."""
    rows = [f"| `{kind.ident}` | {logging.getLevelName(kind.level).lower()} | {kind.subject} | {kind.text} |" for kind in Alert]
    return "\n".join(["| MESSAGE_ID | level | event | what it means |", "| --- | --- | --- | --- |", *rows])
