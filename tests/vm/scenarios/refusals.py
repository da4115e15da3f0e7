# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the kernel refuses, and how khod.kernel says it: each documented errno as its own exception, on a real kernel."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from khod import errors
from khod.core import ports
from khod.kernel.liveupdate import KernelLiveUpdate
from khod.kernel.machine import machine
from tests.vm.guest import Guest


def refused(kind: type[errors.KhodError], call: Callable[[], object]) -> str:
    """The message of the refusal, whose class must be exactly `kind`."""
    try:
        call()
    except errors.KhodError as e:
        assert type(e) is kind, f"{type(e).__name__} instead of {kind.__name__}: {e}"
        return str(e)
    raise AssertionError(f"{kind.__name__} was not raised")


def before(vm: Guest) -> None:
    m = machine(vm.state)
    busy(vm)
    sessions(m)
    preserves(m)
    frozen(m)
    seals_and_kinds(m)
    out_of_memory(vm, m)
    images(vm, m)


def busy(vm: Guest) -> None:
    held = os.open("/dev/liveupdate", os.O_RDWR)
    message = refused(errors.DeviceBusy, KernelLiveUpdate(patience=0.1).probe)
    assert f"pid {os.getpid()}" in message, message
    os.close(held)
    KernelLiveUpdate(patience=0.1).probe()


def sessions(m: ports.Machine) -> None:
    lu = m.liveupdate
    session = lu.create_session("a/b c")
    assert lu.session_name(session) == "a/b c"
    assert m.files.stat(session).kind == "session"
    refused(errors.SessionExists, lambda: lu.create_session("a/b c"))
    refused(errors.SessionUnknown, lambda: lu.retrieve_session("a/b c"))
    refused(errors.SessionDirection, lambda: lu.finish(session))
    refused(errors.SessionDirection, lambda: lu.retrieve_fd(session, 1))
    m.files.close(session)
    m.files.close(lu.create_session("a/b c"))


def preserves(m: ports.Machine) -> None:
    lu, files = m.liveupdate, m.files
    session, memfd = lu.create_session("preserves"), files.memfd("one", 8192)
    lu.preserve_fd(session, memfd, 0)
    refused(errors.TokenExists, lambda: lu.preserve_fd(session, files.memfd("two", 1), 0))
    refused(errors.AlreadyPreserved, lambda: lu.preserve_fd(session, files.duplicate(memfd), 1))
    refused(errors.FdNotPreservable, lambda: lu.preserve_fd(session, session, 1))
    refused(errors.FdNotPreservable, lambda: lu.preserve_fd(session, os.eventfd(0), 1))
    refused(errors.FdNotPreservable, lambda: lu.preserve_fd(session, os.memfd_create("huge", os.MFD_HUGETLB), 1))
    refused(errors.FdNotPreservable, lambda: lu.preserve_fd(session, os.open("/dev/iommu", os.O_RDWR), 1))
    refused(errors.FileTooLarge, lambda: lu.preserve_fd(session, files.memfd("large", 1 << 45), 1))
    refused(errors.BadDescriptor, lambda: lu.preserve_fd(session, os.open(f"/proc/self/fd/{memfd}", os.O_PATH), 1))
    refused(errors.NotASession, lambda: lu.preserve_fd(memfd, memfd, 1))
    empty = files.memfd("empty", 0)
    lu.preserve_fd(session, empty, (1 << 64) - 1)
    refused(errors.FileFrozen, lambda: files.truncate(empty, 1))
    files.close(session)
    # Closing a session lets its files go: a helper that kept a descriptor of it would show here.
    files.truncate(memfd, 4096)


def frozen(m: ports.Machine) -> None:
    session, memfd = m.liveupdate.create_session("frozen"), m.files.memfd("ram", 8192)
    m.files.write(memfd, 0, b"x")
    assert m.files.stat(memfd).allocated == 4096
    m.liveupdate.preserve_fd(session, memfd, 1)
    assert m.files.stat(memfd).allocated == 8192  # the hole was filled
    m.files.write(memfd, 8190, b"ok")
    for size in (0, 4096, 1 << 20):
        refused(errors.FileFrozen, lambda size=size: m.files.truncate(memfd, size))  # type: ignore[misc]
    refused(errors.FileFrozen, lambda: m.files.write(memfd, 8191, b"beyond"))
    m.files.add_seals(memfd, ports.F_SEAL_GROW)
    m.files.close(session)


def seals_and_kinds(m: ports.Machine) -> None:
    noexec = os.memfd_create("sealed", os.MFD_CLOEXEC | 0x8)  # MFD_NOEXEC_SEAL
    assert m.files.stat(noexec).seals == ports.F_SEAL_EXEC
    assert m.files.stat(m.files.memfd("ours", 1)).seals == 0
    Path("/proc/sys/vm/memfd_noexec").write_text("1")
    assert m.files.stat(m.files.memfd("ours", 1)).seals == 0  # not what the sysctl makes the default
    assert m.files.stat(os.open("/dev/iommu", os.O_RDWR)).kind == "iommufd"
    assert m.files.stat(os.memfd_create("huge", os.MFD_HUGETLB)).kind == "hugetlb"


def out_of_memory(vm: Guest, m: ports.Machine) -> None:
    """The helper is given less memory than the file has holes, and the kernel kills it: not us.

    By a cgroup of its own. Out of the whole machine's memory it is killed just so, but what it has filled by then stays
    filled, and this machine, whose programs are read over 9p, does not get out of the thrashing within minutes."""
    cgroups = Path("/sys/fs/cgroup")
    subprocess.run(["mount", "-t", "cgroup2", "cgroup2", str(cgroups)], check=True)
    (cgroups / "cgroup.subtree_control").write_text("+memory")
    (cgroups / "helper").mkdir()
    (cgroups / "helper/memory.max").write_text(str(64 << 20))
    for pid in helpers():
        (cgroups / "helper/cgroup.procs").write_text(str(pid))
    session, memfd = m.liveupdate.create_session("oom"), m.files.memfd("more than there is", 128 << 20)
    refused(errors.OutOfMemory, lambda: m.liveupdate.preserve_fd(session, memfd, 1))
    assert "oom_kill 1\n" in (cgroups / "helper/memory.events").read_text()
    m.liveupdate.preserve_fd(session, memfd, 1)  # by a new helper, outside that cgroup; the session is as before
    vm.record("alive", pid=os.getpid())


def helpers() -> list[int]:
    """Our processes that run the helper's program."""
    me = f"\nPPid:\t{os.getpid()}\n"
    found = [p.parent for p in Path("/proc").glob("[0-9]*/status") if me in p.read_text()]
    pids = [int(p.name) for p in found if b"preserve_helper.py" in (p / "cmdline").read_bytes()]
    assert pids
    return pids


def images(vm: Guest, m: ports.Machine) -> None:
    refused(errors.NothingLoaded, m.kexec.execute)
    refused(errors.NotAKernel, lambda: m.kexec.open("/etc/passwd"))
    image = m.kexec.open(str(vm.kernel))
    m.kexec.unload()
    m.kexec.load(image)
    assert m.kexec.loaded()
    m.kexec.unload()
    assert not m.kexec.loaded()
    Path("/proc/sys/kernel/kexec_load_disabled").write_text("1")
    refused(errors.KexecForbidden, lambda: m.kexec.load(image))
