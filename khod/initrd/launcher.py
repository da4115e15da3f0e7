# SPDX-License-Identifier: LGPL-2.1-or-later
"""The first program of the next kernel: machine code that becomes the interpreter.

Why not the interpreter itself, or a script? The kernel gives an init no arguments but its own, and no LD_LIBRARY_PATH, and the
libraries of the host's initrd, which lie where the loader looks for them by itself, may be of another version. So this executes
our loader, with our libraries, our interpreter and the stage as its arguments, and the kernel's behind them. It notes the time
first. Should the loader not be executed, it becomes the host's own init.
"""

from __future__ import annotations

from collections.abc import Sequence
from struct import pack

_BASE = 0x400000
_HEADERS = 64 + 56
_CODE = (
    "48 8b 04 24"  # mov rax, [rsp]           argc
    "48 8d 6c c4 10"  # lea rbp, [rsp+rax*8+16]  the environment
    "bf 01 00 00 00"  # mov edi, CLOCK_MONOTONIC
    "be {time}"  # mov esi, time
    "b8 e4 00 00 00 0f 05"  # clock_gettime(2)
    "bf {digits}"  # mov edi, digits
    "31 db"  # xor ebx, ebx
    "48 8b 04 de"  # mov rax, [rsi+rbx*8]     both words,
    "b9 10 00 00 00"  # mov ecx, 16              sixteen digits each,
    "48 c1 c0 04"  # rol rax, 4               the highest first
    "88 c2 80 e2 0f 80 c2 61"  # dl = 'a' + (al & 15)
    "88 17 48 ff c7"  # mov [rdi], dl; inc rdi
    "ff c9 75 eb"  # dec ecx; jnz to rol
    "ff c3 83 fb 02 72 db"  # inc ebx; cmp ebx, 2; jb to mov rax
    "49 89 e4"  # mov r12, rsp
    "48 83 c4 10"  # add rsp, 16              where argv[1] is
    "be {words}"  # mov esi, words           pointers, the last one first
    "b9 {count}"  # mov ecx, count
    "ff 36 48 83 c6 08"  # push [rsi]; add rsi, 8
    "ff c9 75 f6"  # dec ecx; jnz to push
    "48 89 e6 48 89 ea"  # mov rsi, rsp; mov rdx, rbp
    "bf {program}"  # mov edi, program
    "b8 3b 00 00 00 0f 05"  # execve(2)
    "4c 89 e4 48 83 c4 10"  # it came back: mov rsp, r12; add rsp, 16
    "68 {instead}"  # push instead
    "48 89 e6 48 89 ea"  # mov rsi, rsp; mov rdx, rbp
    "bf {instead}"  # mov edi, instead
    "b8 3b 00 00 00 0f 05"  # execve(2)
    "bf 01 00 00 00 b8 3c 00 00 00 0f 05"  # exit(1)
)
_SIZE = len(bytes.fromhex(_CODE.replace("{instead}", "0" * 8).format(time="0" * 8, digits="0" * 8, words="0" * 8,
                                                                      count="0" * 8, program="0" * 8)))  # fmt: skip


def launcher(words: Sequence[str], instead: str) -> bytes:
    """A static program of x86-64 that executes `words`, the first of which is the path, then the time at which it began (32
    letters, see `khod.early.stage`), then its own arguments; `instead`, with its own arguments, where that fails."""
    at = _BASE + _HEADERS + _SIZE
    time, digits = at, at + 16
    strings, addresses = bytearray(), []
    end = digits + 33
    for word in (*words, instead):
        addresses.append(end + len(strings))
        strings += word.encode() + b"\0"
    arguments = [*addresses[:-1], digits]
    pointers = end + len(strings)
    fields = {
        "time": time,
        "digits": digits,
        "words": pointers,
        "count": len(arguments),
        "program": addresses[0],
        "instead": addresses[-1],
    }
    code = bytes.fromhex(_CODE.format(**{name: pack("<I", value).hex() for name, value in fields.items()}))
    body = code + bytes(16 + 33) + bytes(strings) + b"".join(pack("<Q", address) for address in reversed(arguments))
    size = _HEADERS + len(body)
    header = pack(
        "<16sHHIQQQIHHHHHH",
        b"\x7fELF\x02\x01\x01", 2, 62, 1, _BASE + _HEADERS, 64, 0, 0, 64, 56, 1, 0, 0, 0,
    )  # fmt: skip
    segment = pack("<IIQQQQQQ", 1, 7, 0, _BASE, _BASE, size, size, 4096)
    return header + segment + body
