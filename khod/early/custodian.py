# SPDX-License-Identifier: LGPL-2.1-or-later
"""The stage's custodian: khod.custodian, with a restore before it serves, where files and paths go away beneath it.

It serves at an abstract address, which no mount can hide, until the host's own custodian has taken over what it has
(khod.custodian.takeover), and ends then. It finds /proc by its working directory, whatever the root has become meanwhile.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the half that is written in C: see khod.custodian
import _socket
import os
import resource

import khod.custodian.doubt  # noqa: F401  # not to be looked for when it is needed: its file is gone by then
from khod.custodian import luo, protocol
from khod.custodian.keeper import Keeper
from khod.custodian.server import SIGHUP, SIGINT, Server
from khod.custodian.store import Store
from khod.custodian.table import MOST, Table
from khod.early import paths, rootfs, system
from khod.early.plan import read
from khod.early.restore import Restore

BACKLOG = 16
TYPE_CHECKING = False  # typing takes longer to import than all that is done here
if TYPE_CHECKING:
    from collections.abc import Callable


def main(marks: dict[str, int], word: int, say: Callable[[str], None]) -> None:
    """Restore, let the boot go on by a word to `word` (see khod.early.rootfs), and serve until everything is taken over; or,
    holding nothing, end."""
    os.setsid()
    for number in (SIGHUP, SIGINT):
        _signal.signal(number, _signal.SIG_IGN)
    system.survive()
    try:
        with open("/proc/self/oom_score_adj", "w") as score:
            score.write("-1000")
        resource.setrlimit(resource.RLIMIT_NOFILE, (MOST, MOST))
    except OSError as error:
        say(str(error))
    os.chdir("/proc")
    luo.FDS = "self/fd"
    kmsg = os.open("/dev/kmsg", os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(kmsg, 2)
    os.environ["JOURNAL_STREAM"] = "kmsg"  # whose priorities are written as the journal's
    with open(paths.PLAN, "rb") as f:
        plan = read(f.read())
    for path in plan.modules:
        try:
            system.load_module(path)
        except FileExistsError:
            pass
        except OSError as error:
            say(f"a module is not loaded: {error}")
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    try:
        # Anybody can connect, and who let go of a descriptor that he sent might wait for him. Whom it serves later sends none.
        system.pass_descriptors(listener.fileno(), False)
    except OSError as error:
        say(f"descriptors cannot be refused: {error}")
    listener.bind(protocol.EARLY)
    listener.listen(BACKLOG)
    keeper = Keeper(Table(MOST), Store("", 0), luo.DEVICE, "")
    server = Server(keeper, listener, {0, 1, 2, kmsg, listener.fileno()})

    def work(inherited: bool) -> None:
        if not inherited:  # else this is the twin of the one that restored, and has what it had
            restore = Restore(keeper, plan, marks, say)
            restore.run()
            said = rootfs.SOMEBODY if restore.began else rootfs.NOBODY
            os.write(word, said + rootfs.MORE + bytes([listener.fileno()]) if restore.more else said)
            os.close(word)
        if not keeper.holds():
            server.end()

    server.run(b"", work)
