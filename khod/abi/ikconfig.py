# SPDX-License-Identifier: LGPL-2.1-or-later
"""kernel/configs.c: the configuration that a kernel built with CONFIG_IKCONFIG carries in itself."""

from __future__ import annotations

from khod.abi.compression import decompress
from khod.errors import FormatError

START, END = b"IKCFG_ST", b"IKCFG_ED"
LIMIT = 8 << 20
"""Bytes; today's are a quarter of a megabyte."""


def find(kernel: bytes) -> dict[str, str] | None:
    """The options of an uncompressed kernel, 'CONFIG_X' to its value ('y', 'm', a number, a string); None when it has none.

    Raises FormatError when it is there and damaged."""
    start = kernel.find(START)
    if start < 0:
        return None
    end = kernel.find(END, start)
    if end < 0:
        raise FormatError("its embedded configuration has no end")
    try:
        return parse(decompress(kernel[start + len(START) : end], LIMIT).decode("utf-8", "replace"))
    except FormatError as error:
        raise FormatError(f"its embedded configuration: {error.message}")


def parse(text: str) -> dict[str, str]:
    """The options that a .config sets."""
    pairs = (line.partition("=") for line in text.splitlines() if line.startswith("CONFIG_"))
    return {name: value.strip().strip('"') for name, equals, value in pairs if equals}
