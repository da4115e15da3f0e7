# SPDX-License-Identifier: LGPL-2.1-or-later
"""``khod-custodian [--socket PATH] [--device PATH] [--say-ready]``.

Run by systemd (khod-custodian.service), or, without systemd, by khod. By path it needs no site packages and no environment:
``python3 -I -S …/khod/custodian/__main__.py`` starts soonest.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # the half that is written in C: see the package
import _socket
import fcntl
import os
import resource
import sys

if not __package__:  # by path, and -I leaves the directory of the program out
    sys.path.append(__file__.rpartition("/khod/")[0])

from khod.custodian import protocol
from khod.custodian.keeper import Keeper
from khod.custodian.log import ERROR, say
from khod.custodian.luo import DEVICE
from khod.custodian.server import SIGHUP, SIGINT, Server
from khod.custodian.store import LISTEN_FDS_START, Store, listened
from khod.custodian.table import MOST, Table
from khod.custodian.takeover import take_over

BACKLOG = 128


def main() -> int:
    """The program; returns only when it could not start."""
    options = _options(sys.argv[1:])
    if options is None:
        os.write(2, b"usage: khod-custodian [--socket PATH] [--device PATH] [--say-ready]\n")
        return 2
    for number in (SIGHUP, SIGINT):
        _signal.signal(number, _signal.SIG_IGN)
    _, numbers = resource.getrlimit(resource.RLIMIT_NOFILE)
    numbers = MOST if numbers == resource.RLIM_INFINITY else min(numbers, MOST)
    resource.setrlimit(resource.RLIMIT_NOFILE, (numbers, numbers))
    try:
        with open("/proc/self/oom_score_adj", "w") as f:
            f.write("-1000")
    except PermissionError:
        pass
    given = listened()
    os.closerange(LISTEN_FDS_START + len(given), numbers)  # whatever whoever started us had open
    path = options["--socket"]
    try:
        lock = _lock(path)
        listener = _listen(path)
    except OSError as error:
        say(f"{path}: {error.strerror}", ERROR)
        return 1
    store = Store(os.environ.get("NOTIFY_SOCKET", ""), _number(os.environ.get("FDSTORE", "")))
    with open("/proc/sys/kernel/random/boot_id") as f:
        boot = f.read()
    keeper = Keeper(Table(numbers), store, options["--device"], boot)
    keeper.adopt(given)
    ready = b"ready\n" if options["--say-ready"] else b""
    server = Server(keeper, listener, {0, 1, 2, lock, listener.fileno(), store.fileno})
    server.run(ready, lambda inherited: take_over(keeper))
    return 0


def _options(arguments: list[str]) -> dict[str, str] | None:
    # argparse takes longer to import than all that is done here.
    options = {"--socket": protocol.SOCKET, "--device": DEVICE, "--say-ready": ""}
    while arguments:
        name = arguments.pop(0)
        if name == "--say-ready":
            options[name] = "yes"
        elif name in options and arguments:
            options[name] = arguments.pop(0)
        else:
            return None
    return options


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _lock(path: str) -> int:
    """The lock of whoever serves at `path`: it lasts as long as either twin, since the descriptor is in their table."""
    os.makedirs(os.path.dirname(path) or ".", 0o755, exist_ok=True)
    fd = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(None, "a custodian serves there already")
    return fd


def _listen(path: str) -> _socket.socket:
    # A socket that is there is that of twins which are both dead: we have the lock.
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    listener = _socket.socket(_socket.AF_UNIX, _socket.SOCK_SEQPACKET | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC)
    mask = os.umask(0o177)
    try:
        listener.bind(path)
    finally:
        os.umask(mask)
    listener.listen(BACKLOG)
    return listener


if __name__ == "__main__":
    sys.exit(main())
