# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.kernel.preserver with real helpers. No session is needed: what is sent is not one, and the kernel says so."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from khod.errors import MachineError, OutOfMemory
from khod.kernel.preserver import Preserver, _Helper

SIOCOUTQ = 0x5411


@pytest.fixture
def preserver() -> Iterator[Preserver]:
    preserver = Preserver()
    yield preserver
    preserver.close()


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("unit")
    yield fd
    os.close(fd)


def sent(helper: _Helper) -> int:
    """Bytes that the helper has been sent and has not read."""
    return int(struct.unpack("i", fcntl.ioctl(helper.channel, SIOCOUTQ, bytes(4)))[0])


def test_the_kernel_s_errno_comes_back(preserver: Preserver, memfd: int) -> None:
    assert preserver.preserve(memfd, memfd, (1 << 64) - 1) == errno.ENOTTY


def test_a_helper_is_the_first_to_be_killed_serves_again_and_keeps_nothing(preserver: Preserver, memfd: int) -> None:
    preserver.preserve(memfd, memfd, 0)
    (helper,) = preserver._idle
    proc = Path(f"/proc/{helper.process.pid}")
    assert (proc / "oom_score_adj").read_text() == "1000\n"
    for token in range(3):
        preserver.preserve(memfd, memfd, token)
    assert preserver._idle == [helper]
    links = [str(entry.readlink()) for entry in (proc / "fd").iterdir()]
    assert len(links) == 3
    assert not any("memfd" in link for link in links)


def test_a_killed_helper_is_out_of_memory_and_the_next_call_has_another(preserver: Preserver, memfd: int) -> None:
    preserver.preserve(memfd, memfd, 0)
    (helper,) = preserver._idle
    os.kill(helper.process.pid, signal.SIGSTOP)
    raised: list[BaseException] = []

    def call() -> None:
        try:
            preserver.preserve(memfd, memfd, 1)
        except OutOfMemory as e:
            raised.append(e)

    thread = threading.Thread(target=call)
    thread.start()
    while not sent(helper):
        pass
    os.kill(helper.process.pid, signal.SIGKILL)
    thread.join()
    assert len(raised) == 1
    assert preserver.preserve(memfd, memfd, 2) == errno.ENOTTY
    assert preserver._idle != [helper]


def test_a_helper_that_was_killed_while_idle_is_replaced(preserver: Preserver, memfd: int) -> None:
    preserver.preserve(memfd, memfd, 0)
    (helper,) = preserver._idle
    helper.process.kill()
    os.waitid(os.P_PID, helper.process.pid, os.WEXITED | os.WNOWAIT)
    assert preserver.preserve(memfd, memfd, 1) == errno.ENOTTY


def test_a_helper_that_ends_of_itself_is_no_lack_of_memory(preserver: Preserver, memfd: int) -> None:
    preserver.preserve(memfd, memfd, 0)
    (helper,) = preserver._idle
    os.kill(helper.process.pid, signal.SIGSTOP)  # or it might have ended before it is asked, and another be made
    helper.channel.send(b"not a token")  # it ends with a traceback
    before = sent(helper)

    def go_on() -> None:
        while sent(helper) == before:
            pass
        os.kill(helper.process.pid, signal.SIGCONT)

    thread = threading.Thread(target=go_on)
    thread.start()
    with pytest.raises(MachineError, match="status 1") as refused:
        preserver.preserve(memfd, memfd, 1)
    thread.join()
    assert not isinstance(refused.value, OutOfMemory)


def test_a_closed_descriptor_is_said_so(preserver: Preserver, memfd: int) -> None:
    preserver.preserve(memfd, memfd, 0)  # so that no helper's socket takes the number that comes free
    closed = os.dup(memfd)
    os.close(closed)
    with pytest.raises(OSError, match="Bad file descriptor"):
        preserver.preserve(memfd, closed, 1)
    assert preserver.preserve(memfd, memfd, 1) == errno.ENOTTY


def test_calls_at_the_same_time_have_a_helper_each(preserver: Preserver, memfd: int) -> None:
    preserver.preserve(memfd, memfd, 0)
    (helper,) = preserver._idle
    os.kill(helper.process.pid, signal.SIGSTOP)
    thread = threading.Thread(target=preserver.preserve, args=(memfd, memfd, 1))
    thread.start()
    while not sent(helper):
        pass
    assert preserver.preserve(memfd, memfd, 2) == errno.ENOTTY  # while the first is still at it
    os.kill(helper.process.pid, signal.SIGCONT)
    thread.join()
    assert len(preserver._idle) == 2
