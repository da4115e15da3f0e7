# SPDX-License-Identifier: LGPL-2.1-or-later
"""khoctl against a served khod: what it prints, what it exits with, what it hands on."""

from __future__ import annotations

import json
import os
import pty
import pwd
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from typer.testing import CliRunner

from khod.cli import show
from khod.cli.application import COMMANDS, app
from khod.core.driver import StateBound
from khod.core.state import State
from tests.integration.api.served import Served

DOCS = Path(__file__).parents[3] / "docs"
PAGE = 4096


class Ran(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def khoctl(khod: Served, *arguments: str) -> Ran:
    result = CliRunner().invoke(app, ["--socket", str(khod.path), *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return Ran(result.exit_code, result.stdout, result.stderr)


def process(khod: Served, *arguments: str, **more: Any) -> subprocess.CompletedProcess[str]:
    """khoctl as a process of its own: for what a process alone can do, be replaced and inherit."""
    command = [sys.executable, "-c", "from khod.cli import main; main()", "--socket", str(khod.path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, **more)


@pytest.fixture
def vm1(khod: Served) -> int:
    """The descriptor of a memfd of one page that is registered as vm1."""
    fd = os.memfd_create("guest")
    os.write(fd, b"m" * PAGE)
    assert khoctl(khod, "register", "vm1", "--pid", str(os.getpid()), "--fd", str(fd)).status == 0
    os.close(fd)
    return fd


# --- looking


def test_status(khod: Served, vm1: int) -> None:
    ran = khoctl(khod, "status")
    assert "state        idle\n" in ran.out
    assert "instances    1, 4 KiB\n" in ran.out
    assert "next kernel  none: khoctl load" in ran.out
    khod.call(lambda: khod.service.damage("vm1"))
    assert "problem: frame 5 is not where it was" in khoctl(khod, "status").out
    assert khoctl(khod, "status", "--json").json["pinned"] == PAGE


def test_instances(khod: Served, vm1: int) -> None:
    ran = khoctl(khod, "instances")
    assert ran.out.splitlines()[0].split()[:6] == ["NAME", "OWNER", "DRIVER", "GRADE", "STATE", "SIZE"]
    me = f"user:{pwd.getpwuid(os.getuid()).pw_name}"
    assert ran.out.splitlines()[1].split()[:6] == ["vm1", me, "guestmemfd", "registered", "registered", "4"]
    assert f"kept by      process {os.getpid()}\n" in khoctl(khod, "instances", "vm1").out
    assert len(khoctl(khod, "instances", "--owner", me, "--json").json) == 1
    assert khoctl(khod, "instances", "vm1", "--owner", "user:other").status == 2
    assert khoctl(khod, "instances", "--json").json[0]["name"] == "vm1"
    assert "descriptors  ram\n" in khoctl(khod, "instances", "vm1").out
    assert khoctl(khod, "instances", "vm1", "--json").json["fds"] == ["ram"]
    assert khoctl(khod, "instances", "vm2").status == 2


def test_nothing_to_show(khod: Served) -> None:
    assert khoctl(khod, "instances").out == "nothing is registered\n"
    assert khoctl(khod, "history").out == "there was no update yet\n"


def test_inspect(khod: Served) -> None:
    ran = khoctl(khod, "inspect")
    assert ran.out.startswith('/dts-v1/;\n\n/ {\n    compatible = "linux-kho,v1";')
    assert "folio map  0x12345000, 174 pages" in ran.out
    table = ran.out.split("ORDER")[1].splitlines()[1:3]
    assert [line.split() for line in table] == [["9", "3", "1", "6", "MiB"], ["all", "3", "1", "6", "MiB"]]
    assert ran.out.endswith("the kernel's handover: khod speaks of another machine than this one\n")
    view = khoctl(khod, "inspect", "--json").json
    assert view["khod"]["orders"] == [{"order": 9, "folios": 3, "bitmaps": 1, "bytes": 6 << 20}]
    assert (view["outgoing"], view["incoming"]) == (None, None)


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (4096, "4 KiB"), (3 << 29, "1.5 GiB"), (1 << 50, "1 PiB"), (1 << 60, "1024 PiB")],
)
def test_sizes(count: int, shown: str) -> None:
    assert show.size(count) == shown


# --- registering


def test_register_an_inherited_descriptor(khod: Served) -> None:
    fd = os.memfd_create("guest")
    os.write(fd, b"m" * PAGE)
    ran = process(
        khod, "register", "vm1", "--memfd-fd", f"rom={fd}", "--memfd-fd", str(fd), "--optional", "--json", pass_fds=[fd]
    )
    assert ran.returncode == 0, ran.stderr
    made = json.loads(ran.stdout)
    view = made["instance"]
    assert (view["fds"], view["size"], view["required"]) == (["rom", "ram1"], 2 * PAGE, False)
    assert (view["lifetime"], made["handle"]) == ("persistent", khod.service.of("vm1").handle)
    (first, _) = khod.service.of("vm1").fds
    assert os.path.samestat(os.fstat(khod.files.table[first]), os.fstat(fd))
    os.close(fd)


def test_register_with_everything(khod: Served, vm1: int) -> None:
    fd = os.memfd_create("guest")
    ran = khoctl(
        khod, "register", "vm2", "--pid", str(os.getpid()), "--fd", f"a={fd}", "--requires", "vm1",
        "--option", "k=v=w", "--state", "vcpus=64K", "--state", "a=b=1", "--shareable", "--lifetime", "persistent", "--json",
    )  # fmt: skip
    os.close(fd)
    asked = khod.service.of("vm2").asked
    assert asked is not None
    assert (asked.requires, asked.options, asked.shareable, asked.lifetime) == (("vm1",), {"k": "v=w"}, True, "persistent")
    assert asked.states == (StateBound("vcpus", 64 << 10), StateBound("a=b", 1))
    assert ran.json["instance"]["fds"] == ["a", "vcpus", "a=b"]


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--fd", "3"],
        ["--pid", "1"],
        ["--pid", "1", "--fd", "3", "--memfd-fd", "4"],
        ["--memfd-fd", "three"],
        ["--memfd-fd", "=3"],
        ["--memfd-fd", "3", "--option", "k"],
        ["--memfd-fd", "3", "--pid", "7"],
        ["--memfd-fd", "3", "--lifetime", "process"],
        ["--memfd-fd", "3", "--lifetime", "connection"],
        ["--memfd-fd", "3", "--state", "vcpus"],
        ["--memfd-fd", "3", "--state", "vcpus=much"],
        ["--memfd-fd", "3", "--state", "=5"],
    ],
)
def test_descriptors_that_are_none(khod: Served, arguments: list[str]) -> None:
    ran = khoctl(khod, "register", "vm1", *arguments)
    assert ran.status == 2
    assert "hint: " in ran.err


def test_unregister(khod: Served, vm1: int) -> None:
    assert khoctl(khod, "unregister", "vm1").out == "vm1 is no longer registered\n"
    ran = khoctl(khod, "unregister", "vm1", "--json")
    assert ran.status == 2
    assert ran.json["error"] == {
        "kind": "InvalidRequest",
        "message": "no instance is called 'vm1'",
        "hint": "khoctl instances lists them",
        "exit_status": 2,
    }
    assert ran.err == "khoctl: no instance is called 'vm1'\nkhoctl: hint: khoctl instances lists them\n"


def test_discard_and_unregister_of_another(khod: Served, vm1: int) -> None:
    me = khod.service.of("vm1").view.owner
    khod.call(khod.service.came_through)
    ran = khoctl(khod, "unregister", "vm1", "--owner", me)
    assert (ran.status, "hint: khoctl discard" in ran.err) == (3, True)
    assert khoctl(khod, "discard", "vm1", "--owner", "user:other").status == 2
    assert khoctl(khod, "discard", "vm1", "--owner", me).out == "vm1 is discarded\n"
    assert khod.service.held == {}


# --- an update


def test_load(khod: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert khoctl(khod, "load", "bzImage", "--initrd", "initrd", "--json").json == {
        "kernel": str(tmp_path / "bzImage"),
        "initrd": str(tmp_path / "initrd"),
        "cmdline": "root=/dev/vda console=ttyS0",
        "sha256": "ab" * 32,
        "size": 12 << 20,
    }
    assert khoctl(khod, "load", "bzImage", "--append", "quiet", "--json").json["cmdline"] == "quiet"
    both = khoctl(khod, "load", "bzImage", "--reuse-cmdline", "--append", "quiet", "--json").json
    assert both["cmdline"] == "root=/dev/vda console=ttyS0 quiet"
    assert "command line  root=/dev/vda console=ttyS0\n" in khoctl(khod, "load", "bzImage", "--reuse-cmdline").out
    assert khoctl(khod, "load", "not-a-kernel").status == 4


def test_a_plan(khod: Served) -> None:
    refused = khoctl(khod, "update", "--dry-run")
    assert refused.status == 3
    assert "would be refused: no kernel is loaded" in refused.out
    khoctl(khod, "load", "bzImage")
    ran = khoctl(khod, "update", "--dry-run")
    assert ran.status == 0
    assert "preserve vm1 [1 descriptor]" in ran.out
    assert "memory needed  8 MiB (8 MiB holes)" in ran.out
    assert "the jump ends  40 processes: sshd[12], bash[13] and 38 more" in ran.out
    assert khod.service.state is State.IDLE
    assert khoctl(khod, "update", "--dry-run", "--json").json["kills_total"] == 40


def test_an_update_a_line_an_event(khod: Served) -> None:
    assert khoctl(khod, "update").status == 3
    khoctl(khod, "load", "bzImage")
    ran = khoctl(khod, "update")
    assert ran.status == 0
    lines = ran.out.splitlines()
    assert lines[0] == "    0.000  preparing   now preparing"
    assert lines[4] == "    0.004  executing   now executing"
    assert lines[5].startswith("the jump")


def test_an_update_goes_the_way_that_is_asked_for(khod: Served) -> None:
    khoctl(khod, "load", "bzImage")
    assert khoctl(khod, "update", "--jump", "rocket").status == 2
    assert khoctl(khod, "update", "--jump", "systemd").status == 0
    assert khod.service.jumps == ["systemd"]


def test_an_update_as_json_lines(khod: Served) -> None:
    khoctl(khod, "load", "bzImage")
    khod.service.fails = "vm1 would not freeze"
    ran = khoctl(khod, "update", "--json")
    assert ran.status == 6
    *events, error = [json.loads(line) for line in ran.out.splitlines()]
    assert [event["state"] for event in events] == ["preparing", "prepared", "freezing"]
    assert error["error"]["message"] == "vm1 would not freeze"


def test_a_hold_leaves_and_continue_goes_on(khod: Served) -> None:
    khoctl(khod, "load", "bzImage")
    assert khoctl(khod, "continue").status == 3
    ran = khoctl(khod, "update", "--hold-at", "frozen")
    assert ran.status == 0
    assert ran.out.splitlines()[-1] == "held at frozen: khoctl continue, or khoctl abort"
    assert "held: khoctl continue" in khoctl(khod, "status").out
    assert khoctl(khod, "continue").status == 0
    khod.until(lambda: khod.service.state is State.EXECUTING)
    assert khoctl(khod, "update", "--hold-at", "running").status == 2


def test_abort(khod: Served) -> None:
    assert khoctl(khod, "abort").status == 3
    khoctl(khod, "load", "bzImage")
    khoctl(khod, "update", "--hold-at", "prepared")
    ran = khoctl(khod, "abort", "--json")
    assert (ran.status, ran.json) == (0, {"state": "aborted"})


@contextmanager
def ending(khod: Served) -> Iterator[None]:
    """khod ends as soon as the update stands still."""

    def end() -> None:
        khod.until(lambda: khod.service.waiting)
        khod.run(khod.server.aclose())

    thread = threading.Thread(target=end)
    thread.start()
    yield
    thread.join(10)


def test_the_connection_ends_at_the_jump(khod: Served) -> None:
    khoctl(khod, "load", "bzImage")
    khod.service.hangs_at = State.EXECUTING
    with ending(khod):
        ran = khoctl(khod, "update")
    assert ran.status == 0
    assert ran.out.splitlines()[-1].startswith("the jump")


def test_khod_ends_before_the_jump(khod: Served) -> None:
    khoctl(khod, "load", "bzImage")
    khod.service.hangs_at = State.FREEZING
    with ending(khod):
        ran = khoctl(khod, "update")
    assert ran.status == 7


def test_history(khod: Served) -> None:
    khoctl(khod, "load", "bzImage")
    khoctl(khod, "update")
    ran = khoctl(khod, "history")
    assert ran.out.splitlines()[1].startswith("u1      2023-11-14 22:13:20Z  executing  7.3.0 -> 7.3.1")
    one = khoctl(khod, "history", "u")
    assert "checked  16 pages of each\n" in one.out
    assert "preparing            1.25 s ±10.0 ms" in one.out
    assert khoctl(khod, "history", "u1", "--json").json["to_release"] == "7.3.1"
    assert khoctl(khod, "history", "nothing").status == 2
    assert khoctl(khod, "history", "--limit", "0").status == 2


def test_finish(khod: Served, vm1: int) -> None:
    assert khoctl(khod, "finish").out == "finished\nnot claimed yet, registered again: vm1\n"
    assert khoctl(khod, "finish", "--json").json == {"unclaimed": ["vm1"]}
    khod.call(lambda: khod.service.damage("vm1"))
    assert khoctl(khod, "finish").status == 3


# --- claims

REPORT = """
import json, os
names = os.environ["LISTEN_FDNAMES"].split(":")
count = int(os.environ["LISTEN_FDS"])
fds = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
print(json.dumps({
    "names": names, "open": fds[:-1], "mine": int(os.environ["LISTEN_PID"]) == os.getpid(),
    "read": [os.pread(3 + n, 4, 0).decode() for n in range(count)],
}))
"""


def test_a_claim_becomes_the_command(khod: Served) -> None:
    fds = []
    for content in (b"one!", b"two!"):
        fds.append(os.memfd_create("guest"))
        os.write(fds[-1], content)
    khoctl(khod, "register", "vm1", "--pid", str(os.getpid()), "--fd", f"ram={fds[0]}", "--fd", f"rom={fds[1]}")
    for fd in fds:
        os.close(fd)
    ran = process(khod, "claim", "vm1", "--", sys.executable, "-c", REPORT)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout) == {
        "names": ["ram", "rom"],
        "open": [0, 1, 2, 3, 4],
        "mine": True,
        "read": ["one!", "two!"],
    }
    assert process(khod, "claim", "vm1", "--", "sh", "-c", "exit 42").returncode == 42


def test_a_claimant_says_that_it_has_taken_over(khod: Served, vm1: int) -> None:
    khod.call(khod.service.came_through)
    finished = "from khod.cli import main; main()"
    code = (
        f"import os, sys; sys.argv = ['khoctl', '--socket', {str(khod.path)!r}, 'finished']; assert os.environ['KHOD_HANDLE'];"
        f" assert os.environ['KHOD_STATES'] == ''; {finished}"
    )
    ran = process(khod, "claim", "vm1", "--lifetime", "persistent", "--", sys.executable, "-c", code)
    assert (ran.returncode, ran.stdout) == (0, "finished\n"), ran.stderr
    assert khod.service.of("vm1").view.lifetime == "persistent"
    assert khoctl(khod, "claim", "vm1", "--lifetime", "connection", "--", "true").status == 2
    assert khoctl(khod, "finished", "nonsense").status == 2


def test_descriptors_get_their_numbers_whatever_they_were() -> None:
    code = """
import os, sys
from khod.cli.claim import execute
from khod.core.views import ClaimView
for content, number in ((b"one!", 11), (b"two!", 10)):
    fd = os.memfd_create("x")
    os.write(fd, content)
    os.dup2(fd, number, inheritable=False)
    os.close(fd)
claim = ClaimView(answer="fds", reason="", names=["a:b", "c"], fds=[11, 10])
execute(sys.executable, [sys.executable, "-c", sys.argv[1]], claim)
"""
    ran = subprocess.run([sys.executable, "-c", code, REPORT], capture_output=True, text=True, timeout=30, check=True)
    said = json.loads(ran.stdout)
    assert (said["read"], said["names"], said["open"]) == (["one!", "two!"], ["a-b", "c"], [0, 1, 2, 3, 4])


def test_a_claim_of_what_did_not_come(khod: Served) -> None:
    ran = khoctl(khod, "claim", "vm1", "--json", "--", "true")
    assert (ran.status, ran.json["answer"]) == (9, "cold")
    assert "hint: start it from disk" in ran.err


def test_a_claim_of_what_must_not_be_started(khod: Served, vm1: int) -> None:
    khod.call(lambda: khod.service.damage("vm1"))
    ran = khoctl(khod, "claim", "vm1", "--", "true")
    assert ran.status == 8
    assert "frame 5 is not where it was" in ran.err
    assert process(khod, "claim", "--unverified", "vm1", "--", "true").returncode == 0


def test_nothing_is_claimed_for_a_command_that_does_not_exist(khod: Served, vm1: int) -> None:
    ran = khoctl(khod, "claim", "vm1", "--", "no-such-command")
    assert ran.status == 2
    assert khod.service.of("vm1").view.state == "registered"


def test_a_command_that_cannot_be_run(khod: Served, vm1: int, tmp_path: Path) -> None:
    (tmp_path / "script").write_text("no interpreter")
    (tmp_path / "script").chmod(0o755)
    ran = process(khod, "claim", "vm1", "--", str(tmp_path / "script"))
    assert ran.returncode == 4
    assert "cannot be run" in ran.stderr


# --- khoctl itself


def test_nobody_answers(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["--socket", str(tmp_path / "none"), "status"])
    assert result.exit_code == 7
    assert "hint: is it running?" in result.stderr


def test_every_command_has_json_an_example_and_help() -> None:
    for name, _ in COMMANDS:
        text = help_of(name)
        assert "--json" in text, name
        assert f"Example:\n      khoctl {name}" in text or "khoctl update --hold-at frozen && khoctl continue" in text, name


def test_on_a_terminal_nothing_is_lost(khod: Served, vm1: int) -> None:
    khoctl(khod, "load", "bzImage")
    for arguments, expected in ((["instances"], b"vm1"), (["update"], b"now executing")):
        main, side = pty.openpty()
        command = [sys.executable, "-c", "from khod.cli import main; main()", "--socket", str(khod.path), *arguments]
        with subprocess.Popen(
            command, stdout=side, stderr=side, env={**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        ) as running:
            os.close(side)
            shown = b""
            try:
                while chunk := os.read(main, 4096):
                    shown += chunk
            except OSError:
                pass  # EIO: the last process with the other side is gone
            os.close(main)
        assert running.returncode == 0
        assert expected in shown
        assert b"\x1b[" in shown  # it is rich's


def help_of(*command: str) -> str:
    result = CliRunner().invoke(app, [*command, "--help"], env={"COLUMNS": "100", "TERMINAL_WIDTH": "100"}, prog_name="khoctl")
    assert result.exit_code == 0, result.output
    return result.stdout


def test_the_commands_are_documented() -> None:
    page = DOCS / "khoctl.md"
    text = "# khoctl\n\n```text\n" + help_of() + "```\n"
    for name, _ in COMMANDS:
        text += f"\n## {name}\n\n```text\n{help_of(name)}```\n"
    if os.environ.get("KHOD_WRITE_DOCS"):
        page.write_text(text)
    assert page.read_text() == text, "KHOD_WRITE_DOCS=1 pytest tests/integration/api/test_khoctl.py writes it anew"
