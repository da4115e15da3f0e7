# SPDX-License-Identifier: LGPL-2.1-or-later
"""A handover tree as device-tree source, for people.

A property's bytes are shown as strings, cells or bytes, whichever they look like: the form is a guess, the bytes are not.
dtc compiles the text back into the same tree (a test).
"""

from __future__ import annotations

from khod.abi.fdt_door import RawNode
from khod.abi.tree import HandoverTree, raw_tree

_INDENT = "    "


def to_source(tree: HandoverTree) -> str:
    """The tree as dtc reads it. Raises TreeError for a tree that has no form on the wire."""
    return "/dts-v1/;\n\n" + "\n".join(_node(raw_tree(tree), 0)) + "\n"


def _node(node: RawNode, depth: int) -> list[str]:
    outer, inner = _INDENT * depth, _INDENT * (depth + 1)
    lines = [f"{outer}{node.name or '/'} {{"]
    for name, value in node.properties.items():
        lines.append(f"{inner}{name} = {_value(value)};" if value else f"{inner}{name};")
    for child in node.children:
        lines.append("")
        lines.extend(_node(child, depth + 1))
    lines.append(f"{outer}}};")
    return lines


def _value(raw: bytes) -> str:
    if _looks_like_strings(raw):
        return ", ".join(f'"{_escaped(part)}"' for part in raw[:-1].decode("ascii").split("\0"))
    # A digest is a multiple of four bytes as well; more than four cells are read by nobody.
    if len(raw) % 4 == 0 and len(raw) <= 16:
        return "<" + " ".join(f"{int.from_bytes(raw[at : at + 4], 'big'):#x}" for at in range(0, len(raw), 4)) + ">"
    return f"[{raw.hex(' ')}]"


def _looks_like_strings(raw: bytes) -> bool:
    """Every part printable ASCII and none empty: what a number hardly ever is."""
    if raw[-1]:
        return False
    return all(part and all(0x20 <= char < 0x7F for char in part) for part in raw[:-1].split(b"\0"))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')
