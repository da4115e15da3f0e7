# SPDX-License-Identifier: LGPL-2.1-or-later
"""README's first update by hand, followed by hand: its commands, typed at the console of `make lab-shell`."""

from __future__ import annotations

import os
import pty
import re
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from tests.vm.conftest import Play
from tests.vm.runner import ROOT
from tests.waiting import readable

PROMPT = "lab# "


class Terminal:
    """A program on a pseudo-terminal, and who sits at it."""

    def __init__(self, argv: list[str]) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(ROOT)
            os.execv(argv[0], argv)

    def read_until(self, end: str, seconds: float) -> str:
        """What appears until it ends with `end`; '' waits for the program's end, which is too early before anything else.
        Raises TimeoutError or EOFError with what there was."""
        seen, deadline = b"", time.monotonic() + seconds
        while not seen.endswith(end.encode()) or not end:
            ready = readable(self.fd, seconds=deadline - time.monotonic())
            if not ready:
                raise TimeoutError(f"no {end!r} within {seconds} s after: {seen.decode(errors='replace')}")
            try:
                part = os.read(self.fd, 65536)
            except OSError:  # EIO: the program has closed its side
                part = b""
            if not part and end:
                raise EOFError(f"the program ended before {end!r}, after: {seen.decode(errors='replace')}")
            if not part:
                break
            seen += part
        return seen.decode(errors="replace")

    def type(self, line: str) -> None:
        os.write(self.fd, line.encode() + b"\n")


@pytest.fixture
def terminal(vm: Play) -> Iterator[Terminal]:
    """`make lab-shell`, where it can be run."""
    terminal = Terminal([sys.executable, "-m", "tests.vm.shell"])
    yield terminal
    try:
        os.kill(terminal.pid, signal.SIGTERM)  # QEMU goes with it (setpriv --pdeathsig)
    except ProcessLookupError:
        pass
    else:
        os.waitpid(terminal.pid, 0)
    os.close(terminal.fd)


@pytest.mark.vm
@pytest.mark.full
@pytest.mark.timeout(900)
def test_the_first_update_can_be_followed_from_the_readme(terminal: Terminal) -> None:
    commands = re.findall(rf"^ +{PROMPT}(.+)$", (ROOT / "README.md").read_text(), re.M)
    assert commands[-1] == "exit"
    terminal.read_until(PROMPT, 400)  # another machine of the lab may have to end first
    answers = {}
    for command in commands[:-1]:
        terminal.type(command)
        answers[command] = terminal.read_until(PROMPT, 120)
    assert "state        registered" in answers["khoctl register note --memfd-fd ram=5"]
    assert "bash[" in answers["khoctl update --dry-run"], "what the jump ends"
    # The machine may be gone before khoctl has shown the last event.
    assert re.search(r"frozen.*starting khod.*state +restored", answers["khoctl update"], re.S), answers["khoctl update"]
    # The command is echoed, too; this is what it read from memory that the previous kernel left.
    claimed = answers["khoctl claim note -- cat /proc/self/fd/3"].split("\n")[1]
    assert claimed.strip("\r") == "written before the kexec"  # two terminals, two carriage returns
    assert "finished" in answers["khoctl finish"]
    assert "7.3.4 -> 7.3.4" in answers["khoctl history"]
    terminal.type("exit")
    assert "reboot: Restarting system" in terminal.read_until("", 60)
    _, status = os.waitpid(terminal.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
