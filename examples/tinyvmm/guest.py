# SPDX-License-Identifier: LGPL-2.1-or-later
"""What runs in the guest: one loop for each vCPU, in 32-bit protected mode without paging, and what it leaves in memory.

Each round counts, checks one word of a pattern, and looks at the time stamp counter: how often it went backwards, and the
longest time in which this vCPU did not run.
"""

from __future__ import annotations

import mmap
import struct
from array import array
from dataclasses import dataclass

SIZE = 16 << 20
CODE = 0x1000
GDT = 0x3000
PATTERN = 0x100000
WORDS = 1 << 16
PAGE_A, PAGE_B = 0x200000, 0x300000
"""For the device."""
PROGRAM = bytes.fromhex(
    "0faee80f3189460889560c"  # lfence; rdtsc; mov [esi+8], eax; mov [esi+12], edx
    "8b064089062"  # again: mov eax, [esi]; inc eax; mov [esi], eax
    "5ffff000069c8b179379e"  # and eax, 0xffff; imul ecx, eax, 0x9e3779b1
    "390c85000010007403ff4648"  # cmp [eax*4+PATTERN], ecx; je whole; inc dword ptr [esi+0x48]
    "0faee80f3189c389d1"  # whole: lfence; rdtsc; mov ebx, eax; mov ecx, edx
    "2b46081b560c7305ff4640eb12"  # sub eax, [esi+8]; sbb edx, [esi+12]; jnc forward; inc dword ptr [esi+0x40]; jmp store
    "3b5624720d77053b46207606"  # forward: cmp edx, [esi+0x24]; jb store; ja longest; cmp eax, [esi+0x20]; jbe store
    "894620895624"  # longest: mov [esi+0x20], eax; mov [esi+0x24], edx
    "895e08894e0cebb4"  # store: mov [esi+8], ebx; mov [esi+12], ecx; jmp again
)


def page_of(vcpu: int) -> int:
    """Where a vCPU keeps its words; its register esi says so to it."""
    return 0x2000 + 0x100 * vcpu


def load(memory: mmap.mmap) -> None:
    """Code, segments, pattern."""
    memory[CODE : CODE + len(PROGRAM)] = PROGRAM
    memory[GDT : GDT + 24] = struct.pack("<3Q", 0, 0x00CF9B000000FFFF, 0x00CF93000000FFFF)
    pattern = array("I", (index * 0x9E3779B1 & 0xFFFFFFFF for index in range(WORDS)))
    memory[PATTERN : PATTERN + 4 * WORDS] = pattern.tobytes()


@dataclass(frozen=True, slots=True)
class Seen:
    """What a vCPU found."""

    counter: int
    tsc: int
    """Its last look at it."""
    gap: int
    """The longest between two looks, in ticks."""
    backwards: int
    broken: int
    """Words of the pattern that were not what they must be."""


def seen(memory: mmap.mmap, vcpu: int) -> Seen:
    """Of one vCPU."""
    at = page_of(vcpu)
    (counter,), (tsc,), (gap,) = (struct.unpack_from(f, memory, at + o) for f, o in (("<I", 0), ("<Q", 8), ("<Q", 0x20)))
    return Seen(counter, tsc, gap, *(struct.unpack_from("<I", memory, at + o)[0] for o in (0x40, 0x48)))


def forget_gap(memory: mmap.mmap, vcpu: int) -> None:
    """Measure anew. The vCPU stands still."""
    at = page_of(vcpu) + 0x20
    memory[at : at + 8] = bytes(8)
