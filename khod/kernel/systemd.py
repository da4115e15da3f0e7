# SPDX-License-Identifier: LGPL-2.1-or-later
"""systemd as PID 1: the port `ServiceManager` of the running Linux (decision 17).

What ``systemctl kexec`` does: it asks logind to reboot by way of kexec.target, and where logind cannot be asked, PID 1 itself.
Both only accept the request and return. So exit status 0 says that a shutdown begins, and another one that this call began
none: usually because nothing was asked (an inhibitor of the mode "block", another shutdown that was first), but also when
somebody did not answer in time, who may have heard it all the same. Hence the second question, below: is kexec.target
queued, or logind preparing? Only when neither is so, nothing has happened and everything may be undone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from khod.errors import DeadlinePassed, KexecFailed, NothingLoaded, Refused
from khod.kernel import logind
from khod.kernel.kexec import KernelKexec

BOOTED = Path("/run/systemd/system")
"""Exists where systemd is PID 1 (sd_booted(3))."""
CARRIES = 261
"""The first systemd that hands its descriptor store to the next kernel as live-update sessions."""
LIMIT = 30.0
"""Seconds for one systemctl; D-Bus itself gives up after 25."""
SETTLING = 10.0
"""Seconds in which an unanswered request becomes a job of PID 1, or nothing: longer than InhibitDelayMaxSec= is by default."""


class Systemd:
    """The port `ServiceManager` of the running Linux. `systemctl` is the program."""

    def __init__(self, systemctl: str = "systemctl", booted: Path = BOOTED) -> None:
        self._systemctl, self._booted = systemctl, booted
        self._kexec = KernelKexec()

    def present(self) -> bool:
        """See the port."""
        from shutil import which

        return self._booted.is_dir() and which(self._systemctl) is not None

    def doubt(self) -> str:
        """See the port."""
        if not self.present():
            return "systemd is not PID 1 here"
        said = self._ask("show", "--property=Version", "--value")
        version = re.match(r"\d+", said)
        if version is None:
            return f"systemd does not say which version it is: {said!r}"
        if int(version[0]) < CARRIES:
            return f"systemd {version[0]} does not carry its descriptor store across a kexec, systemd {CARRIES} does"
        return ""

    def stop_commands(self, units: Collection[str], pids: Collection[int]) -> Mapping[str, str]:
        """See the port."""
        named = sorted({*units, *filter(None, map(_service_of, pids))})
        if not named or not self.present():
            return {}
        said = self._ask("show", "--property=Id,ExecStop,ExecStopPost", "--", *named)
        found = {}
        for block in said.split("\n\n"):
            unit = re.search(r"^Id=(.*)$", block, re.M)
            commands = re.findall(r"^ExecStop(?:Post)?=\{.* argv\[\]=(.*?) ; ", block, re.M)
            if unit and commands:
                found[unit[1]] = "; ".join(commands)
        return found

    def inhibit(self, why: str) -> int:
        """See the port."""
        return logind.inhibit(why)

    def stopping(self) -> bool:
        """Whether PID 1 is on its way down, whoever asked for that. Raises DeadlinePassed when it does not say."""
        return self.present() and self._ask("is-system-running") == "stopping"

    def coming(self) -> bool:
        """Whether a kexec, or another shutdown, is under way. Raises DeadlinePassed when PID 1 does not say."""
        return self._queued() or self.stopping()

    def kexec(self) -> None:
        """See the port."""
        if doubt := self.doubt():
            raise Refused(f"no jump by systemd: {doubt}", hint="`khoctl update --jump direct` needs no systemd")
        if not self._kexec.loaded():
            # systemctl would load the boot loader's default entry, in the way that carries nothing.
            raise NothingLoaded("systemctl kexec: no image is loaded")
        try:
            status, said = self._run(["kexec"])
        except DeadlinePassed as error:
            status, said = -1, error.message
        if status == 0 or self._under_way():
            return
        raise KexecFailed(f"systemctl kexec: {said or f'exit status {status}'}", errno=0, hint="see `systemd-inhibit --list`")

    def _under_way(self) -> bool:
        """Whether a kexec comes all the same: then the memory is on its way. A shutdown of another kind, ours or not, is none:
        what can be undone must be."""
        deadline = time.monotonic() + SETTLING
        while True:
            if self._queued():
                return True
            try:
                settled = not logind.preparing()
            except Refused:
                settled = True  # nobody there who could be preparing anything
            if settled or time.monotonic() > deadline:
                return False
            time.sleep(0.1)  # neither PID 1 nor logind tells anybody that a job was queued: ask again

    def _queued(self) -> bool:
        job = self._ask("show", "kexec.target", "--property=Job", "--value")  # a number, or nothing, or an error
        return job.isdecimal() and job != "0"

    def _ask(self, *arguments: str) -> str:
        """What systemctl answers to a question; its exit status is part of the answer. Raises DeadlinePassed."""
        return self._run(arguments)[1]

    def _run(self, arguments: Sequence[str]) -> tuple[int, str]:
        """Exit status of systemctl and what it said: on standard output, or else on standard error. Raises DeadlinePassed,
        after having ended it."""
        import subprocess

        argv = [self._systemctl, "--no-ask-password", "--no-pager", "--no-wall", *arguments]
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, env=_environment(), timeout=LIMIT, check=False
            )
        except subprocess.TimeoutExpired:
            raise DeadlinePassed(f"{' '.join(argv)}: no end within {LIMIT:g} s")
        text = (done.stdout.strip() or done.stderr.strip())[-2000:]
        return done.returncode, text.decode("utf-8", "replace")


def _service_of(pid: int) -> str:
    """The service that a process belongs to; '' for none, or no such process. Good enough for a warning, not for a right."""
    try:
        path = Path(f"/proc/{pid}/cgroup").read_text().strip().rpartition("/")[2]
    except OSError:
        return ""
    return path if path.endswith(".service") else ""


def _environment() -> dict[str, str]:
    """What systemctl is to know of ours: where the bus is, and nothing that changes how it answers."""
    kept = {name: os.environ[name] for name in ("PATH", "DBUS_SYSTEM_BUS_ADDRESS") if name in os.environ}
    return {"LANG": "C.UTF-8", "SYSTEMD_COLORS": "0", **kept}
