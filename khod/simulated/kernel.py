# SPDX-License-Identifier: LGPL-2.1-or-later
"""One boot of the simulated machine.

`Kernel.boot` builds a kernel from a directory alone: the memory file, and the boot parameters if another kernel jumped.
Until it has read the record that its predecessor left in memory it allocates from scratch only; then whatever was not
preserved is destroyed. Everything that a process does passes through `Kernel.syscall`, where faults strike.
"""

from __future__ import annotations

import errno
import os
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from khod.abi.cmdline import parse
from khod.core.ports import Boot
from khod.folio.units import PAGE_SHIFT, Range
from khod.simulated.buddy import Buddy
from khod.simulated.custodian import Custodian
from khod.simulated.devices import DeviceCalls
from khod.simulated.faults import CALLER, FIRST, SECOND, Fault, Faults, KernelPanic, ProcessDied
from khod.simulated.filecalls import FileCalls
from khod.simulated.hostcalls import HostCalls
from khod.simulated.kexec import Kexec
from khod.simulated.layout import BOOT_FILE, KERNEL_SIZE, MEMORY_FILE, BootParams, Hardware, Release, ram_ranges
from khod.simulated.luo import LiveUpdate, OutOfMemoryKill
from khod.simulated.pages import Pages
from khod.simulated.process import Process, RealFd
from khod.simulated.ram import Ram
from khod.simulated.record import Root, read_root, spared, write_root
from khod.simulated.special import HUGE_SIZE, Special
from khod.simulated.systemd import Systemd, absent
from khod.simulated.task import Task

Call = Callable[..., Any]


class Kernel:
    """A running kernel. Made by `boot`; ends by `execute`, or by `power_off`."""

    def __init__(self, directory: Path, hardware: Hardware, params: BootParams) -> None:
        self.directory = directory
        self.params = params
        self.jumped = False
        """Whether it executed the next kernel, and is no more."""
        self._lock = threading.RLock()
        self._tasks: dict[int, Task] = {}
        self._next_pid = 1
        scratch = tuple(Range(start, end) for start, end in params.scratch)
        ram = ram_ranges(hardware.memory)
        self.pages = Pages(Ram(directory / MEMORY_FILE), Buddy(ram, scratch))
        self.options = _options(params.cmdline)
        self.text = self.pages.take_early(KERNEL_SIZE.bit_length() - 1 - PAGE_SHIFT)
        """First frame of the kernel itself."""
        root = self._inherit()
        self.special = Special(self.pages, parse(params.cmdline).huge_pages() // HUGE_SIZE)
        self.luo = LiveUpdate(self.pages, params.kernel.memfd, self.special, params.kernel.preserves, self._why_no_device())
        self.luo.handed = root.sessions if root and not self.luo.missing else []
        self.kexec = Kexec(params.kernel, params.cmdline, scratch, carries=self.options["kho"])
        self.files = FileCalls(self.pages, self.special, self.task)
        self.devices = DeviceCalls(directory, self.luo)
        self.luo.make = self.devices.revive
        self.host = HostCalls(directory, self.pages, ram, scratch, params.reset)
        seen = root if self.options["kho"] else None
        self.host.boot_info = Boot(
            str(uuid.uuid4()),
            params.kernel.release,
            root is not None,
            seen.kexec_count if seen else 0,
            seen.release if seen else "",
        )
        self._count = seen.kexec_count if seen else 0
        self.systemd = Systemd(self._fork("systemd"), self.luo) if hardware.systemd else None
        self.custodian = Custodian(self.luo, self.systemd, self._fork)
        self._calls = self._table()
        self.faults = Faults(lambda: frozenset(self._calls))
        if self.systemd is not None:
            self.systemd.take_back()
        self.custodian.start()

    @classmethod
    def boot(cls, directory: Path | str, *, release: Release | None = None, cmdline: str | None = None) -> Kernel:
        """Start the machine in `directory`: after a jump the kernel that was jumped to, else the one on its disk.

        `release` and `cmdline` are the disk's, for a cold boot. Raises KernelPanic, InvalidRequest when there is no machine.
        """
        path = Path(directory)
        hardware = Hardware.read(path)
        params = BootParams.read(path)
        if params is None:
            line = hardware.cmdline if cmdline is None else cmdline
            params = BootParams(release or Release(), line, hardware.scratch, reset=time.monotonic_ns())
        else:
            (path / BOOT_FILE).unlink()
        return cls(path, hardware, params)

    # Booting.

    def _inherit(self) -> Root | None:
        """Read the record, spare what it lists, destroy the rest; None when nothing was handed over."""
        root = self._read_record()
        if root is not None:
            for pfns, order in spared(self.pages.ram, self.params.record):
                self.pages.buddy.reserve(pfns, order)
        self.pages.buddy.open()
        for begin, end in list(self.pages.ram.data(0, self.pages.ram.end)):
            for first, stop in self.pages.buddy.unused(begin >> PAGE_SHIFT, end >> PAGE_SHIFT):
                self.pages.ram.destroy(first << PAGE_SHIFT, stop << PAGE_SHIFT)
        return root

    def _read_record(self) -> Root | None:
        """The record, if this kernel understands it. Raises KernelPanic as luo_early_startup does."""
        if not self.params.record:
            return None
        root, _ = read_root(self.pages.ram, self.params.record)
        if root.kho != self.params.kernel.kho:
            return None  # "incompatible, disabling KHO revival": to this kernel, it is a cold boot
        if self.options["kho"] and root.luo != self.params.kernel.luo:
            self.pages.ram.close()
            raise KernelPanic(f"luo: LUO state is incompatible with {self.params.kernel.luo!r}: {root.luo!r}")
        return root

    def _why_no_device(self) -> str:
        if not self.options["kho"]:
            return "kho=off on the kernel's command line"
        if not self.options["liveupdate"]:
            return "liveupdate=on is missing on the kernel's command line"
        return ""

    # Processes.

    def spawn(self, name: str) -> Process:
        """Start a process; what it calls, it calls in the caller's thread."""
        return self.seen(self.new_task(name))

    def seen(self, task: Task) -> Process:
        """A process that runs already, from outside the kernel."""
        return Process(_Direct(self, task), task.name)

    def new_task(self, name: str) -> Task:
        """A process as the kernel knows it. Raises ProcessDied when there is no kernel any more."""
        with self._lock:
            self._check_alive()
            return self._fork(name)

    def _fork(self, name: str, twin: Task | None = None) -> Task:
        """A process; if it is the twin of one, with the same descriptors."""
        task = self._tasks[self._next_pid] = twin.clone(self._next_pid) if twin else Task(self._next_pid, name)
        self._next_pid += 1
        return task

    def task(self, pid: int) -> Task:
        """The living process `pid`. Raises OSError(ESRCH)."""
        try:
            return self._tasks[pid]
        except KeyError:
            raise OSError(errno.ESRCH, f"no process {pid}")

    def end(self, *tasks: Task) -> None:
        """These processes are killed all at once, or exited: their descriptors close."""
        with self._lock:
            for task in tasks:
                if self._tasks.pop(task.pid, None) is not None and not self.jumped:
                    task.exit()
                task.dead = True
            if not self.jumped:
                self.custodian.mourn()

    def _end_all(self) -> None:
        """Every process but PID 1 ends for good: nobody starts another custodian."""
        self.custodian.twins, self.custodian.systemd = [], None
        self.end(*(task for task in self._tasks.values() if self.systemd is None or task is not self.systemd.task))

    def _check_alive(self) -> None:
        if self.jumped:
            raise ProcessDied("this kernel has jumped")

    # System calls.

    def syscall(self, task: Task, name: str, *args: Any) -> Any:
        """Make a call. Raises OSError as the kernel's answer, ProcessDied when the caller is no more, ValueError for a
        call that does not exist."""
        with self._lock:
            self._check_alive()
            if task.dead:
                raise ProcessDied(f"{task.name}[{task.pid}]")
            call = self._calls.get(name)
            if call is None:
                raise ValueError(f"no call {name!r}")
            fault = self.faults.strike(name, task.pid)
            if fault is not None and not fault.after:
                self._strike(fault, name, task, args)
            try:
                result = call(task, *args)
            except OutOfMemoryKill as kill:
                self.end(task)
                raise ProcessDied(f"out of memory: {kill}")
            if fault is not None and fault.after:
                self.end(*self._victims(fault, task))
            if task.dead:
                raise ProcessDied(f"{task.name}[{task.pid}] died after {name}")
            return result

    def _strike(self, fault: Fault, name: str, task: Task, args: tuple[Any, ...]) -> None:
        """Raise what a fault before the call means; returns when the caller lives through it."""
        if fault.torn:
            self.host.store_torn(args[0], fault.torn)
        if fault.errno:
            if name in ("retrieve_fd", "kernel_retrieve_fd"):
                self.luo.retrieve_failed(task, fault.errno, *args)
            raise OSError(fault.errno, "injected")
        self.end(*self._victims(fault, task))
        if task.dead:
            raise ProcessDied(f"{task.name}[{task.pid}] died in {name}")

    def _victims(self, fault: Fault, caller: Task) -> list[Task]:
        """Who dies of it, as far as they live."""
        twins = dict(zip((FIRST, SECOND), self.custodian.twins, strict=False))
        return [task for name, task in {CALLER: caller, **twins}.items() if name in fault.victims]

    def _table(self) -> dict[str, Call]:
        luo, files, host, kexec, custody = self.luo, self.files, self.host, self.kexec, self.custodian
        calls: tuple[Call, ...] = (
            *(luo.open_device, luo.probe, luo.create_session, luo.session_name, luo.finish),
            *(custody.keep, custody.kept, custody.take, custody.drop, custody.sessions, custody.release),
            *(custody.retrieve_session, custody.retrieve_fd, custody.offer, custody.withdraw, custody.room, custody.doubt),
            custody.limit_custody,
            *(
                files.memfd,
                files.special,
                files.specimen,
                files.hugetlb,
                files.reopen,
                files.stat,
                files.resident,
                files.read,
                files.write,
            ),
            *(files.peek, files.poke, files.copy, files.free_huge_pages, files.populate),
            *(files.punch, files.truncate, files.add_seals, files.seek, files.duplicate, files.close),
            *(files.pass_fd, files.descriptor, files.window, files.frames, files.adopt, files.export),
            *(host.memory_read, host.ram, host.scratch, host.figures, host.stamp, host.boot),
            *(host.store_read, host.store_append, host.store_cut, host.sync),
            *(kexec.load, kexec.load_old, kexec.unload, kexec.loaded, kexec.command_line, kexec.facts, kexec.lock_down),
            *(self._preserve_fd, self._execute, self._listing, self._kill, self._inject),
            *self.devices.calls(),
            *(self._manager_present, self._manager_doubt, self._manager_inhibit, self._manager_kexec),
        )
        raw: dict[str, Call] = {
            "kernel_retrieve_session": luo.retrieve_session,  # past the custodian
            "kernel_retrieve_fd": luo.retrieve_fd,
        }
        return {call.__name__.lstrip("_"): call for call in calls} | raw

    def _preserve_fd(self, task: Task, session: int, fd: int, token: int, disposable: bool = False) -> None:
        """PRESERVE_FD; `disposable`: made in a child whom the kernel may kill, and whose death is told as ENOMEM."""
        try:
            self.luo.preserve_fd(task, session, fd, token)
        except OutOfMemoryKill as kill:
            if not disposable:
                raise
            raise OSError(errno.ENOMEM, f"the kernel killed the caller: {kill}")

    def _listing(self, task: Task) -> list[tuple[int, str]]:
        return [(other.pid, other.name) for other in self._tasks.values() if other is not task]

    def _kill(self, task: Task, *pids: int) -> None:
        """kill(2) with SIGKILL, of several processes at once."""
        victims = [self.task(pid) for pid in pids]
        if self.systemd is not None and self.systemd.task in victims:
            raise OSError(errno.EPERM, "PID 1 takes no such signal")
        self.end(*victims)

    def _inject(self, task: Task, call: str, fields: dict[str, Any]) -> None:
        """Plan a fault from outside the kernel's process (`khod.simulated.faults.Fault`)."""
        self.faults.add(Fault(call, fields.pop("nth", 1), **fields))

    # systemd's.

    def _manager_present(self, task: Task) -> bool:
        """Whether PID 1 is a systemd."""
        return self.systemd is not None

    def _manager_doubt(self, task: Task) -> str:
        """Why it would not carry its store across a jump."""
        return "systemd is not PID 1 here" if self.systemd is None else self.systemd.doubt

    def _manager_inhibit(self, task: Task, why: str) -> int:
        """A delay inhibitor of logind's."""
        if self.systemd is None:
            raise absent("inhibit: systemd is not PID 1 here")
        return self.systemd.inhibit(task, why)

    def _manager_kexec(self, task: Task) -> None:
        """systemctl kexec: asks PID 1 to do as `shut_down` does, and only returns if `Systemd.at_once` is not set."""
        systemd = self.systemd
        if systemd is None or systemd.doubt:
            raise absent(f"kexec: {self._manager_doubt(task)}")
        if self.kexec.image is None:
            raise OSError(errno.EINVAL, "no image is loaded")
        systemd.asked.set()
        if systemd.at_once:
            self.shut_down()
            raise ProcessDied("PID 1 has stopped everybody")

    def shut_down(self) -> None:
        """PID 1 ends every process, and jumps with what is in its store. When the kernel refuses (no image is loaded any more,
        or a fault of `execute`), it resets the machine."""
        with self._lock:
            assert self.systemd is not None, "nobody here to shut the machine down"
            self._end_all()
            self.systemd.hand_over()
            refused = self.faults.strike("execute", self.systemd.task.pid) is not None
            if refused or self.kexec.image is None:
                self.power_off()
                return
            with suppress(ProcessDied):
                self._execute(self.systemd.task)

    def _execute(self, task: Task) -> None:
        """reboot(LINUX_REBOOT_CMD_KEXEC). Returns to nobody: every process dies with the kernel."""
        image = self.kexec.image
        if image is None:
            raise OSError(errno.EINVAL, "no image is loaded")
        record = 0
        if image.carries:
            kernel = self.params.kernel
            sessions = self.luo.serialise()
            record = write_root(self.pages, Root(kernel.kho, kernel.luo, kernel.release, self._count + 1, sessions))
        following = replace(self.params, kernel=image.kernel, cmdline=image.cmdline, record=record, reset=self.host.reset)
        following.write(self.directory)
        self.devices.jump()
        self.jumped = True
        self.pages.ram.close()
        for other in self._tasks.values():
            other.dead = True
        raise ProcessDied("the machine has jumped")

    def power_off(self) -> None:
        """Stop the machine: memory is gone, the disk stays."""
        with self._lock:
            if not self.jumped:
                self._end_all()
                self.jumped = True
                for task in self._tasks.values():
                    task.dead = True
                self.pages.ram.close()
            (self.directory / BOOT_FILE).unlink(missing_ok=True)


def _options(cmdline: str) -> dict[str, bool]:
    """The two switches; the last word counts. KHO is on unless switched off, live update off unless switched on."""
    options = {"kho": True, "liveupdate": False}
    for word in cmdline.split():
        name, _, value = word.partition("=")
        if name in options:
            options[name] = value.lower() in ("on", "1", "y", "yes", "true")
    return options


class _Direct:
    """The way from a process to its kernel when both are in one Python process."""

    def __init__(self, kernel: Kernel, task: Task) -> None:
        self._kernel = kernel
        self._task = task
        self.pid = task.pid

    def call(self, name: str, *args: Any) -> Any:
        given = [os.dup(arg.fd) if isinstance(arg, RealFd) else arg for arg in args]
        return self._kernel.syscall(self._task, name, *given)

    def end(self) -> None:
        self._kernel.end(self._task)
