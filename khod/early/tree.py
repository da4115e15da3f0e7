# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of the handover tree the stage needs, read by struct alone.

`khod.abi.tree` judges a tree, and takes longer to import than the kernel takes to retrieve one. The tree was made by a khod of
this host a few seconds ago, and has a digest behind it: what is not as it was written is found by that, and then the stage
leaves everything to the khod that starts later, which judges it whole.
"""

from __future__ import annotations

from struct import Struct, unpack

_MAGIC = 0xD00DFEED
_HEADER = Struct(">10I")
_DIGEST = 32
_BEGIN, _END_NODE, _PROP, _END = 1, 2, 3, 9
_MAX = 1 << 20

TYPE_CHECKING = False  # typing takes longer to import than all that is done here
if TYPE_CHECKING:
    from collections.abc import Callable

    from khod.early.sampling import Hash


class Instance:
    """One instance of the tree. `names` are its descriptors' (`files` of them) and its states', in token order; `memory` the
    indices of those that are sampled, `sizes` their bytes and then the states', `seen` the frames of the sample. `why`: it
    cannot be started here, for this reason; '' for none."""

    __slots__ = (
        "checked",
        "clients",
        "digest",
        "files",
        "label",
        "memory",
        "name",
        "names",
        "owner",
        "seen",
        "session",
        "sizes",
        "why",
    )

    def __init__(self, properties: dict[bytes, bytes]) -> None:
        self.name, self.owner = _string(properties[b"khod,name"]), _string(properties[b"khod,owner"])
        self.label = self.name if self.owner == "user:root" else f"{self.name} of {self.owner}"
        self.session = properties[b"khod,session"].rstrip(b"\0")
        fds, states = _strings(properties[b"khod,fds"]), _strings(properties[b"khod,states"])
        self.names, self.files = [*fds, *states], len(fds)
        self.clients = _strings(properties.get(b"khod,client-states", b""))
        self.memory = _numbers(properties[b"khod,memory"], "I")
        self.sizes = _numbers(properties[b"khod,sizes"], "Q")
        self.seen = _numbers(properties[b"khod,sample-frames"], "Q")
        self.checked = _numbers(properties[b"khod,sample-checked"], "I")[0]
        self.digest = properties[b"khod,sample-sha256"]
        self.why = ""
        if properties.get(b"khod,grade", b"registered\0") != b"registered\0":
            self.why = "its contents are its owner's"
        for name, why in (
            (b"khod,shares", "it shares a file with another instance"),
            (b"khod,made", "its driver makes descriptors of it anew"),
            (b"khod,requires", "it requires another instance"),
            (b"khod,content-sha256", "every byte of it is to be compared"),
        ):
            if properties.get(name):
                self.why = why


class Tree:
    """A tree."""

    __slots__ = ("instances", "update")

    def __init__(self, update: str, instances: list[Instance]) -> None:
        self.update, self.instances = update, instances


def read(data: bytes, sha256: Callable[[bytes], Hash]) -> Tree:
    """Raises ValueError for anything that is no tree as khod writes it."""
    try:
        _, total, at, strings, *_, size_strings, size = _HEADER.unpack_from(data)
        if data[:4] != _MAGIC.to_bytes(4, "big") or not total <= min(len(data) - _DIGEST, _MAX):
            raise ValueError("no tree")
        if sha256(data[:total]).digest() != data[total : total + _DIGEST]:
            raise ValueError("its digest is another")
        root, nodes = _walk(data[at : at + size], data[strings : strings + size_strings])
        if root[b"compatible"] != b"linux-kho,v1\0":
            raise ValueError("it is of another version")
        return Tree(_string(root[b"khod,update-id"]), [Instance(node) for node in nodes])
    except (KeyError, IndexError, ArithmeticError, UnicodeError) as error:
        raise ValueError(repr(error))
    except Exception as error:  # struct.error, whose module is not worth its name here
        raise ValueError(str(error))


def _walk(block: bytes, strings: bytes) -> tuple[dict[bytes, bytes], list[dict[bytes, bytes]]]:
    """The root's properties, and those of each node below it."""
    root: dict[bytes, bytes] = {}
    nodes: list[dict[bytes, bytes]] = []
    depth = position = 0
    while True:
        tag = int.from_bytes(block[position : position + 4], "big")
        position += 4
        if tag == _BEGIN:
            depth += 1
            if depth == 2:
                nodes.append({})
            position = (block.index(b"\0", position) + 4) & ~3
        elif tag == _END_NODE:
            depth -= 1
        elif tag == _PROP:
            length, name = unpack(">II", block[position : position + 8])
            into = root if depth == 1 else nodes[-1] if depth == 2 else {}
            into[strings[name : strings.index(b"\0", name)]] = block[position + 8 : position + 8 + length]
            position = (position + 8 + length + 3) & ~3
        elif tag == _END and depth == 0:
            return root, nodes
        else:
            raise ValueError(f"tag {tag:#x} at {position - 4}")


def _string(value: bytes) -> str:
    (text,) = _strings(value)
    return text


def _strings(value: bytes) -> list[str]:
    return value[:-1].decode().split("\0") if value else []


def _numbers(value: bytes, code: str) -> list[int]:
    size = 4 if code == "I" else 8
    return list(unpack(f">{len(value) // size}{code}", value))
