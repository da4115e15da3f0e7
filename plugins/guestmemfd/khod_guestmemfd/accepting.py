# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is taken in, and how it will cross; what would come back otherwise than it went is turned down, with the reason."""

from __future__ import annotations

from dataclasses import dataclass

from khod.core.ports import F_SEAL_EXEC, FileStat, Machine
from khod.errors import InvalidRequest, KhodError, Refused
from khod.plugin import Request
from khod.plugin.probing import native
from khod_guestmemfd.properties import KINDS, Memory

SIZE_LIMIT = 1 << 40
"""7.3 keeps 16 bytes a folio in one allocation, which fails from 1 TiB of 4 KiB pages on with a kernel warning."""
_WORDS = {"yes": True, "no": False}


@dataclass(frozen=True, slots=True)
class Options:
    """What its owner chose."""

    carry: bool
    """Carry hugetlb memfds: for as long as it takes they need as much ordinary memory again."""
    hash: bool | None
    """Compare every byte after the jump. None: of what is carried alone."""

    @classmethod
    def parse(cls, request: Request) -> Options:
        """Raises InvalidRequest."""
        if strange := sorted(request.options.keys() - {"carry", "hash"}):
            raise InvalidRequest(
                f"{request.name}: guestmemfd has no option {', '.join(strange)}", hint="its options: carry=yes, hash=yes|no"
            )
        for name, word in request.options.items():
            if word not in _WORDS:
                raise InvalidRequest(f"{request.name}: option {name}={word}: say yes or no")
        chosen = {name: _WORDS[word] for name, word in request.options.items()}
        return cls(chosen.get("carry", False), chosen.get("hash"))

    def wants_hash(self, carried: bool) -> bool:
        """Whether all bytes of a file are compared, which is carried or not."""
        return carried if self.hash is None else self.hash


def accept(machine: Machine, request: Request, options: Options) -> list[Memory]:
    """The files of a request, each with the way that it takes. Raises InvalidRequest, Refused."""
    if not request.fds:
        raise InvalidRequest(f"{request.name}: a guestmemfd instance needs at least one memfd")
    stats = {name: machine.files.stat(fd) for name, fd in request.fds.items()}
    answers = {kind: _native(machine, kind) for kind in {s.kind for s in stats.values()} & set(KINDS)}
    return [_one(machine, request.name, name, stat, options, answers.get(stat.kind, False)) for name, stat in stats.items()]


def _native(machine: Machine, kind: str) -> bool | KhodError:
    """Whether the kernel preserves such files; why it cannot be asked now, or there is nothing to ask with."""
    if kind == "memfd":
        return True
    try:
        return native(machine, lambda: machine.files.specimen(kind))
    except KhodError as error:
        return error


def _one(machine: Machine, instance: str, name: str, stat: FileStat, options: Options, preserved: bool | KhodError) -> Memory:
    carried = preserved is not True  # not to know is no reason to turn down what can be carried on every kernel
    if isinstance(preserved, KhodError) and not stat.mappable:
        raise Refused(
            f"{instance}: descriptor {name!r} is a private guest_memfd, which nobody can copy; whether this kernel preserves it"
            f" cannot be told now: {preserved}",
            hint="register it again when nobody else has /dev/liveupdate open",
        )
    reason = refusal(stat, native=not carried)
    if reason is None and carried and stat.kind == "hugetlb" and not options.carry:
        figures = machine.memory.figures()
        free = max(0, figures.available - figures.cma_free)
        reason = (
            f"this kernel does not preserve hugetlb memfds; to carry it takes {stat.size} bytes of ordinary memory, and {free}"
            " can be had",
            "register it with the option carry=yes, or use an ordinary memfd with transparent huge pages"
            " (shmem_enabled=always or MADV_HUGEPAGE)",
        )
    if reason:
        raise Refused(f"{instance}: descriptor {name!r} cannot be carried across: {reason[0]}", hint=reason[1])
    if not carried and stat.kind == "guest_memfd" and options.hash:
        raise InvalidRequest(
            f"{instance}: this kernel preserves the guest_memfd {name!r} as it is, and nobody can read it to hash it",
            hint="register it without hash=yes",
        )
    return Memory(name, stat.kind, stat.size, stat.seals, stat.page_size, carried)


def refusal(stat: FileStat, *, native: bool) -> tuple[str, str] | None:
    """Why this file is turned down, and what to do; None if it is not."""
    if stat.kind not in KINDS:
        return f"it is a {stat.kind} file, not a memfd", "give the memfd that backs the memory"
    if stat.seals & F_SEAL_EXEC and stat.kind == "memfd":
        return (
            "it is sealed with F_SEAL_EXEC, and the kernel would give it back read-only",
            "create it with MFD_EXEC; the sysctl vm.memfd_noexec=1 makes F_SEAL_EXEC the default",
        )
    if stat.size >= SIZE_LIMIT:
        return f"it has {stat.size} bytes, and Linux 7.3 preserves files below {SIZE_LIMIT}", "use several memfds"
    if not native and not stat.mappable:
        return (
            "it is a private guest_memfd: nobody but the guest can read it, so it cannot be copied, and this kernel does not"
            " preserve it",
            "make it with GUEST_MEMFD_FLAG_MMAP and GUEST_MEMFD_FLAG_INIT_SHARED, or use an ordinary memfd",
        )
    if not native and not stat.readable:
        return "its descriptor is not open for reading, and it has to be copied", "register one that is opened O_RDWR"
    return None
