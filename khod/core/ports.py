# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod needs of a machine, in the kernel's words. ``khod.kernel`` is the running Linux, ``khod.simulated`` a machine
in a directory; ``tests/contract`` holds both to the same behaviour.

Conventions for every port:

* A descriptor parameter (``fd``, ``session``) is *borrowed*: the callee neither closes nor keeps it. A returned descriptor
  is *owned* by the caller, close-on-exec, and is closed with `Files.close`. Descriptors are of the machine: on a simulated
  one they are numbers in the simulated process's table, and `Files.adopt` / `Files.export` are the only bridge to real ones.
* Calls block and may take long (gigabytes); callers with an event loop use threads. Every port is safe to call from several
  threads at once.
* Failures are the classes of `khod.errors`; each docstring names those that are part of the contract. An OSError that no
  documented refusal explains leaves as `MachineError` with its errno.
* Sizes and offsets are bytes; frames are page numbers; times are nanoseconds.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, NoReturn, Protocol

from khod.core.devices import Devices
from khod.folio.units import PAGE_SIZE, Folio, PhysicalMemory, Range

if TYPE_CHECKING:
    from khod.abi.formats import Format  # not on the way to restored

WINDOW = 1 << 30
"""Frames are learned in windows of at most this many bytes of a file (decision 10)."""


class LiveUpdate(Protocol):
    """/dev/liveupdate and its sessions (include/uapi/linux/liveupdate.h)."""

    def probe(self) -> None:
        """Prove that the device can be used, by opening it.

        Raises DeviceMissing (with the reason in the hint), DeviceForbidden, DeviceBusy, DeviceBroken; so do
        `create_session` and `retrieve_session`.
        """
        ...

    def create_session(self, name: str) -> int:
        """A new outgoing session. Closing its last descriptor releases all that it preserves.

        Raises SessionNameInvalid, SessionExists.
        """
        ...

    def retrieve_session(self, name: str) -> int:
        """The incoming session that the previous kernel's `name` became. Closing it finishes it.

        Raises SessionUnknown, SessionTaken (while the first descriptor is open), SessionNameInvalid.
        """
        ...

    def preserve_fd(self, session: int, fd: int, token: int) -> None:
        """Preserve the file behind `fd` under `token`. Moves pages out of CMA, fills holes, forbids changes of size.

        The kernel may kill whoever asks for more than memory holds: the machine sees to it that this is not us.
        Raises FdNotPreservable, TokenExists, AlreadyPreserved, FileTooLarge, SealsUnknown, TooManyPreserved, OutOfMemory,
        BadDescriptor, SessionDirection, NotASession.
        """
        ...

    def retrieve_fd(self, session: int, token: int) -> int:
        """The file that was preserved under `token`; repeated, another descriptor of the same open file.

        A failure other than TokenUnknown frees the file for good (decision 19).
        Raises TokenUnknown, RetrieveFailed, SessionDirection, NotASession.
        """
        ...

    def finish(self, session: int) -> None:
        """End the session: what was not retrieved is freed. Again: no effect. Raises SessionDirection, NotASession."""
        ...

    def session_name(self, session: int) -> str:
        """The name it was created under. Raises NotASession."""
        ...


@dataclass(frozen=True, slots=True)
class FileStat:
    """What `Files.stat` says of a file."""

    kind: str
    """'memfd' (any shmem file without a link), 'hugetlb', 'guest_memfd', 'iommufd', 'vfio', 'session', 'other'."""
    size: int
    allocated: int
    """Bytes that have a page or are swapped; the rest of `size` is holes. 0 of a guest_memfd: the kernel counts none."""
    inode: tuple[int, int]
    """Device and inode number: the identity of the file, whatever descriptors lead to it."""
    seals: int
    """F_SEAL_* bits; 0 for files that cannot be sealed."""
    readable: bool = True
    writable: bool = True
    mappable: bool = True
    """False of a guest_memfd whose bytes only the guest may see: no mapping shows them."""
    page_size: int = PAGE_SIZE
    """Of a hugetlb file that of its huge pages."""


F_SEAL_SEAL, F_SEAL_SHRINK, F_SEAL_GROW, F_SEAL_WRITE, F_SEAL_FUTURE_WRITE, F_SEAL_EXEC = (1 << i for i in range(6))
"""linux/fcntl.h."""


class Files(Protocol):
    """Files in memory, and descriptors."""

    def memfd(self, name: str, size: int) -> int:
        """A new memfd of `size` bytes, all holes: sealable, MFD_EXEC (an F_SEAL_EXEC one would come back read-only)."""
        ...

    def hugetlb(self, name: str, size: int, page_size: int) -> int:
        """A new hugetlb memfd, all holes, of `size` bytes, a multiple of `page_size`. Raises Refused where there are no pages
        of that size; how many are free is `Memory.free_huge_pages`."""
        ...

    def specimen(self, kind: str) -> int:
        """A new file of a kind ('hugetlb', 'guest_memfd', 'iommufd'), as small as there is, to try on it what the kernel does
        with such files. Raises Refused where none can be made."""
        ...

    def stat(self, fd: int) -> FileStat:
        """What the file is. Raises BadDescriptor."""
        ...

    def resident(self, fd: int) -> int:
        """Bytes that have a page now: the rest of a memfd's `FileStat.allocated` is swapped out. May look at every page, which
        takes a while: `stat` is for those who are in a hurry, and for files of strangers. Raises BadDescriptor."""
        ...

    def read(self, fd: int, offset: int, length: int) -> bytes:
        """Up to `length` bytes at `offset`; shorter only at the end of the file. Raises BadDescriptor."""
        ...

    def write(self, fd: int, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`. Raises FileFrozen where a preserved or sealed file would change its size."""
        ...

    def copy(self, source: int, target: int, offset: int, length: int) -> None:
        """Copy bytes of one file to the same place in another, through mappings of both: so also where there is no `read` and
        `write`. Both have all these bytes; where huge pages are behind one, `offset` and `length` are multiples of them. Holes
        of both are filled.

        Raises Refused where a file cannot be mapped, OutOfMemory where a hole cannot be filled, BadDescriptor.
        """
        ...

    def add_seals(self, fd: int, seals: int) -> None:
        """F_ADD_SEALS. Raises FileFrozen when sealing is sealed."""
        ...

    def truncate(self, fd: int, size: int) -> None:
        """Set the size. Raises FileFrozen on a preserved or sealed file."""
        ...

    def duplicate(self, fd: int) -> int:
        """Another descriptor of the same open file. Raises BadDescriptor."""
        ...

    def close(self, fd: int) -> None:
        """Close; a descriptor that is closed already is a bug and raises BadDescriptor."""
        ...

    def adopt(self, real: int) -> int:
        """A descriptor of this machine for one of the running process (as received over a socket), which is consumed."""
        ...

    def export(self, fd: int) -> int:
        """A descriptor of the running process for one of this machine, to be passed over a socket; owned by the caller."""
        ...


class FolioWindow(NamedTuple):
    """The folios behind one window of a file, in file order, each named once per window.

    A folio that reaches over the end of a window is named in every window that it backs.
    """

    offset: int
    """Where in the file the window begins."""
    pfns: array[int]
    """Typecode 'Q': the first frame of each folio."""
    orders: array[int]
    """Typecode 'B': the order of each folio."""


class Frames(Protocol):
    """Which physical frames back a file (on Linux: pagemap and kpageflags). True of a preserved file only: others move."""

    def windows(self, fd: int) -> Iterator[FolioWindow]:
        """The whole file in windows of at most `WINDOW` bytes, each mapped and populated only while it is read.

        Raises MachineError if a page of the file has no frame or frames are hidden from this process.
        """
        ...

    def pages(self, fd: int, indices: Sequence[int]) -> list[tuple[int, Folio]]:
        """For each page index of the file its frame, and the folio that holds it."""
        ...


@dataclass(frozen=True, slots=True)
class MemoryFigures:
    """What decision 8 reckons with, in bytes."""

    total: int
    available: int
    """MemAvailable."""
    cma_free: int
    cma_used: int
    """Pages in use inside CMA (scratch): an upper bound of what a preserve has to move out."""
    movable_used: int
    """Pages in use inside ZONE_MOVABLE, likewise."""


class Memory(PhysicalMemory, Protocol):
    """Physical memory: to read, and how it is laid out."""

    def ram(self) -> tuple[Range, ...]:
        """System RAM, ascending and disjoint."""
        ...

    def scratch(self) -> tuple[Range, ...]:
        """The regions that the next kernel boots in, where nothing preserved may lie; () if they cannot be known."""
        ...

    def figures(self) -> MemoryFigures:
        """The figures of this moment."""
        ...

    def free_huge_pages(self, page_size: int) -> int:
        """Huge pages of that size that are free in the pools and promised to nobody; 0 where there is no such pool."""
        ...


@dataclass(frozen=True, slots=True)
class Image:
    """A kernel to jump to, checked and held open (decision 11): `Kexec.open` makes it, `Kexec.release` ends it."""

    kernel: str
    initrd: str
    """Path, '' for none."""
    cmdline: str
    kernel_fd: int
    initrd_fd: int
    """-1 for none."""
    sha256: str
    """Of the kernel's bytes followed by the initrd's, hexadecimal."""
    size: int
    """Bytes of both files."""


class Kexec(Protocol):
    """kexec_file_load(2) and reboot(2)."""

    def open(self, kernel: str, initrd: str = "", cmdline: str | None = None) -> Image:
        """Open and check an image; loads nothing. `cmdline` None means that of the running kernel.

        Raises InvalidRequest for a path that cannot be read, NotAKernel for a file that is no kernel, ImageInvalid for a
        command line longer than the kernel takes with it (`khod.abi.bzimage`; 2016 bytes) or with a NUL.
        """
        ...

    def release(self, image: Image) -> None:
        """Close what `open` opened."""
        ...

    def load(self, image: Image) -> None:
        """Load it, replacing what is loaded. Raises Refused if its files changed since they were opened; NotAKernel,
        ImageTooLarge, ImageInvalid, KexecForbidden, KexecBusy."""
        ...

    def unload(self) -> None:
        """Drop the loaded image; none: no effect."""
        ...

    def loaded(self) -> bool:
        """Whether any image is loaded, whoever loaded it."""
        ...

    def running_cmdline(self) -> str:
        """The running kernel's command line."""
        ...

    def execute(self) -> NoReturn:
        """Jump. Returns never; raises NothingLoaded, KexecBusy, KexecForbidden, KexecFailed when the kernel came back."""
        ...


@dataclass(frozen=True, slots=True)
class Stamp:
    """One moment, by several clocks read together.

    `tsc` runs on through a kexec and `tsc_khz` is its rate as measured so far (0: unknown); both 0 where there is no TSC.
    """

    realtime: int
    monotonic: int
    tsc: int = 0
    tsc_khz: int = 0


class Clock(Protocol):
    """Time."""

    def stamp(self) -> Stamp:
        """Now, by every clock there is."""
        ...


class Store(Protocol):
    """One append-only file on a disk that outlives the kernel: the journal's bytes."""

    def read(self) -> bytes:
        """Everything; b'' when there is nothing yet."""
        ...

    def append(self, data: bytes) -> None:
        """Add `data` at the end. On return it is on the disk, and so is the directory entry; when it raises, a part of it
        may be."""
        ...

    def cut(self, length: int) -> None:
        """Keep the first `length` bytes, durably."""
        ...


class FileSystems(Protocol):
    """The host's mounted file systems."""

    def sync(self) -> None:
        """syncfs(2) every writable file system that has a disk behind it. Raises SyncFailed naming the mount point."""
        ...


@dataclass(frozen=True, slots=True)
class Boot:
    """Which boot this is (decision 21)."""

    boot_id: str
    release: str
    handover: bool
    """Whether this kernel was handed something by its predecessor."""
    kexec_count: int = 0
    """Kexecs since the last cold boot, from kexec-metadata; 0 when the kernel does not say."""
    previous_release: str = ""


class BootInfo(Protocol):
    """Facts about the running boot."""

    def boot(self) -> Boot:
        """The same answer throughout a boot."""
        ...


@dataclass(frozen=True, slots=True)
class Process:
    """A process of user space."""

    pid: int
    name: str


class Processes(Protocol):
    """Other processes."""

    def listing(self) -> tuple[Process, ...]:
        """Every process of user space but the calling one: what a direct jump kills."""
        ...

    def descriptor(self, pid: int, fd: int) -> int:
        """A duplicate of descriptor `fd` of process `pid` (pidfd_getfd(2)).

        Raises InvalidRequest when there is no such process or descriptor, NotPermitted when it may not be taken.
        """
        ...


class Custody(Protocol):
    """Descriptors that outlive khod (decisions 18 and 20): kept by a custodian, two processes that share one table of
    descriptors, and by PID 1's store behind them where there is one.

    It also makes the calls whose results must never be khod's alone: `LiveUpdate.retrieve_session` and
    `LiveUpdate.retrieve_fd` go through it, and what they return is a duplicate of what it keeps. Asked again, by a khod
    that was started anew, they answer from what is kept. Every method raises CustodianGone when nobody answers.
    """

    def keep(self, name: str, fd: int) -> None:
        """Keep a duplicate of `fd`; on return it is safe. What was kept under that name before is let go of, after.

        `name`: 1 to 10 of a-z and 0-9. Raises CustodyFull when no more descriptors can be kept, InvalidRequest.
        """
        ...

    def kept(self) -> Sequence[str]:
        """Names of all that is kept by `keep`."""
        ...

    def take(self, name: str) -> int:
        """A duplicate of what is kept. Raises InvalidRequest when there is nothing of that name."""
        ...

    def drop(self, names: Sequence[str]) -> None:
        """Let go of these; a name that is not there has no effect."""
        ...

    def sessions(self) -> Sequence[str]:
        """Names of the incoming sessions that are held."""
        ...

    def release(self, session: str) -> None:
        """Let go of an incoming session and of all that was retrieved from it: unless it is finished, that frees what nobody
        else holds. None of that name: no effect."""
        ...

    def offer(self, sessions: Sequence[int]) -> None:
        """For a jump that PID 1 makes (decision 17): these outgoing sessions go into its store, and everything else out of it.

        Raises CustodyFull, and Refused where there is no store.
        """
        ...

    def withdraw(self) -> None:
        """Undo `offer`: let go of outgoing sessions, put everything else back into the store. Nothing offered: no effect."""
        ...

    def room(self) -> int:
        """How many more descriptors can be kept."""
        ...

    def doubt(self, size: int, files: int) -> str:
        """Why retrieving `files` files of `size` bytes in all might fail, with what to raise; '' when it is proven to succeed
        (decision 19): memory.max and memory.high on the path of the control group that would be charged, overcommit, room for
        descriptors."""
        ...


class ServiceManager(Protocol):
    """systemd, where it is PID 1 (decision 17)."""

    def present(self) -> bool:
        """Whether PID 1 is a systemd that this port can talk to."""
        ...

    def doubt(self) -> str:
        """Why a jump by PID 1 would lose the sessions in its store, '' when it carries them: systemd does since 261."""
        ...

    def stop_commands(self, units: Collection[str], pids: Collection[int]) -> Mapping[str, str]:
        """What is run when the host is stopped, by unit (ExecStop= and ExecStopPost=): of these units, and of those that these
        processes belong to. Units that run nothing are not named; nor are any where systemd does not say."""
        ...

    def inhibit(self, why: str) -> int:
        """Hold off a shutdown by others, as long as logind lets a delay inhibitor do so: an owned descriptor, which lets go
        of it when closed. Raises Refused where there is no logind, NotPermitted when it says no: a shutdown is under way."""
        ...

    def kexec(self) -> None:
        """Ask PID 1 to stop everything and to jump (``systemctl kexec``). Once it has returned there is no way back, unless
        PID 1 says so itself: a shutdown that it has accepted can still be cancelled.

        Raises KexecFailed when PID 1 refused, NothingLoaded, and Refused where there is `doubt`: then nothing has happened.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFacts:
    """What decides about a jump and is the running kernel's own."""

    machine: str
    """Architecture: 'x86-64', as `khod.abi.elf` calls them."""
    cmdline: str
    config: Mapping[str, str] | None
    """Its configuration, as `khod.abi.ikconfig` has it; None when nobody kept it."""
    lockdown: str
    """'none', 'integrity', 'confidentiality'; '' where the kernel has no lockdown."""
    load_disabled: bool
    """kernel.kexec_load_disabled."""
    loads_left: int | None
    """kernel.kexec_load_limit_reboot; None for no limit."""
    debugfs: bool
    """Whether KHO's files there can be read."""
    lacking: tuple[str, ...]
    """Capabilities that khod needs, and this process has not."""
    headroom: int | None
    """Bytes that the control group of this process may still be charged; None for no limit."""
    cgroup: str
    """The one whose limit that is."""
    scratch: tuple[Range, ...]
    """The scratch areas in the kernel's order, empty ones among them; () when they cannot be known."""
    formats: tuple[Format, ...]
    """Those that it writes, as far as they can be known."""
    formats_source: str
    """Where they were found, in words."""


class RunningKernel(Protocol):
    """The kernel that runs."""

    def facts(self) -> KernelFacts:
        """As of now."""
        ...


@dataclass(frozen=True, slots=True)
class Machine:
    """All ports of one machine."""

    liveupdate: LiveUpdate
    files: Files
    frames: Frames
    memory: Memory
    kexec: Kexec
    clock: Clock
    store: Store
    filesystems: FileSystems
    boot: BootInfo
    processes: Processes
    custody: Custody
    manager: ServiceManager
    kernel: RunningKernel
    devices: Devices
