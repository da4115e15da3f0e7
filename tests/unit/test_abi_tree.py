# SPDX-License-Identifier: LGPL-2.1-or-later
"""The handover tree, against dtc, against the fdt package's own reader, and against whoever wants to harm."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable

import fdt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from khod.abi import cells, fdt_door
from khod.abi.fdt_door import RawNode
from khod.abi.tree import COMPATIBLE, MAX_STRING, HandoverTree, InstanceNode, decode, encode
from khod.abi.tree_source import to_source
from khod.errors import TreeError

# No deadline per example: the machine that runs this may be busy.
quick = settings(max_examples=60, deadline=None)
needs_dtc = pytest.mark.skipif(shutil.which("dtc") is None, reason="dtc is not installed (device-tree-compiler)")


def sealed(blob: bytes) -> bytes:
    return blob + hashlib.sha256(blob).digest()


def sample(count: int = 3, **changes: object) -> HandoverTree:
    instances = tuple(
        InstanceNode(
            unit=n + 1,
            name=f"vm-{n}",
            compatible="khod,guestmemfd-v1",
            properties={
                "khod,owner": cells.string("uid:0"),
                "khod,required": cells.u32(1),
                "khod,requires": cells.strings(["net", "iommu"]),
                "khod,tokens": cells.u64s([0, 1]),
                "khod,sizes": cells.u64s([1 << 30, 1 << 40]),
                "sample": bytes(range(37)),
                "sealed": cells.flag(),
            },
        )
        for n in range(count)
    )
    base = HandoverTree(
        update_id="0a1b2c3d", boot_id="6f9d", version="0.1.0", map_address=0x1_2345_6000 if count else 0,
        map_pages=174 if count else 0, map_sha256=bytes(range(32)), instances=instances,
    )  # fmt: skip
    return HandoverTree(**{**base.__dict__, **changes})


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=20).filter(
    lambda value: len(value.encode()) <= MAX_STRING
)
property_names = st.from_regex(r"[0-9A-Za-z,._+?#-]{1,40}", fullmatch=True).filter(
    lambda name: name not in ("compatible", "khod,name") and not name.endswith("_with_references")
)
instance_nodes = st.builds(
    InstanceNode,
    unit=st.integers(0, 2**32 - 1),
    name=text,
    compatible=text,
    properties=st.dictionaries(property_names, st.binary(max_size=40), max_size=5),
)


@st.composite
def trees(draw: st.DrawFn) -> HandoverTree:
    instances = tuple(draw(st.lists(instance_nodes, max_size=4, unique_by=lambda node: node.unit)))
    return HandoverTree(
        update_id=draw(text),
        boot_id=draw(text),
        version=draw(text),
        map_address=draw(st.integers(1, 2**40 - 1)) * 4096 if instances else 0,
        map_pages=draw(st.integers(1, 2**40)) if instances else 0,
        map_sha256=draw(st.binary(min_size=32, max_size=32)),
        instances=instances,
    )


# --- the two ways -----------------------------------------------------------------------------------------------------


@quick
@given(trees(), st.binary(max_size=50))
def test_round_trip_whatever_follows(tree: HandoverTree, after: bytes) -> None:
    assert decode(encode(tree) + after) == tree


def test_what_follows_the_blob_is_its_digest() -> None:
    data = encode(sample())
    assert data[-32:] == hashlib.sha256(data[:-32]).digest()


def test_an_empty_tree() -> None:
    tree = sample(0)
    assert decode(encode(tree)) == tree


# --- readers that are not ours ----------------------------------------------------------------------------------------


def dtc(data: bytes, *args: str) -> bytes:
    return subprocess.run(["dtc", "-q", *args], input=data, capture_output=True, check=True, timeout=20).stdout


@needs_dtc
def test_dtc_reads_what_we_wrote() -> None:
    blob = encode(sample(1))[:-32]
    source = dtc(blob, "-I", "dtb", "-O", "dts").decode()
    for line in (
        f'compatible = "{COMPATIBLE}";',
        "phys-addr-size = <0x40>;",
        "preserved-folio-map = <0x01 0x23456000>;",
        "preserved-folio-map-pages = <0x00 0xae>;",
        "instance@1 {",
        'khod,requires = "net\\0iommu";',
        "khod,sizes = <0x00 0x40000000 0x100 0x00>;",
        "sealed;",
    ):
        assert line in source


@needs_dtc
def test_we_read_what_dtc_compiled() -> None:
    source = """/dts-v1/;
    / {
        compatible = "linux-kho,v1"; phys-addr-size = <64>; void-p-size = <64>;
        preserved-folio-map = <0x1 0x2000>; preserved-folio-map-pages = <0 3>;
        preserved-folio-map-sha256 = [00 01 02 03 04 05 06 07 08 09 0a 0b 0c 0d 0e 0f
                                      10 11 12 13 14 15 16 17 18 19 1a 1b 1c 1d 1e 1f];
        khod,version = "9"; khod,update-id = "u"; khod,boot-id = "b";
        instance@1f { compatible = "c"; khod,name = "n"; list = "a", "", "b"; big = <0x1 0x0 0x0 0x5>; raw = [de ad be]; };
    };"""
    tree = decode(sealed(dtc(source.encode(), "-I", "dts", "-O", "dtb")))
    assert (tree.map_address, tree.map_pages, tree.map_sha256) == (0x1_0000_2000, 3, bytes(range(32)))
    (node,) = tree.instances
    assert (node.unit, node.name, node.compatible) == (0x1F, "n", "c")
    assert cells.as_strings(node, "list") == ("a", "", "b")
    assert cells.as_u64s(node, "big") == (1 << 32, 5)
    assert cells.as_bytes(node, "raw") == b"\xde\xad\xbe"


@needs_dtc
@settings(max_examples=10, deadline=None)
@given(trees())
@example(sample())
def test_our_source_compiles_to_the_same_tree(tree: HandoverTree) -> None:
    assert decode(sealed(dtc(to_source(tree).encode(), "-f", "-I", "dts", "-O", "dtb"))) == tree


@quick
@given(trees())
def test_the_package_reads_the_same_bytes(tree: HandoverTree) -> None:
    blob = encode(tree)[:-32]
    theirs, ours = fdt.parse_dtb(blob).root, fdt_door.unflatten(blob)
    for their, our in [(theirs, ours), *zip(theirs.nodes, ours.children, strict=True)]:
        assert [prop.name for prop in their.props] == list(our.properties)
        for prop, value in zip(their.props, our.properties.values(), strict=True):
            blob_of_it = prop.to_dtb("", 0, 17)[0]
            assert blob_of_it[12 : 12 + int.from_bytes(blob_of_it[4:8], "big")] == value


# --- typed values -----------------------------------------------------------------------------------------------------


def node_with(value: bytes) -> InstanceNode:
    return InstanceNode(unit=7, name="n", compatible="c", properties={"p": value})


@quick
@given(st.lists(st.integers(0, 2**32 - 1)), st.lists(st.integers(0, 2**64 - 1)), st.lists(text | st.just("")))
def test_lists_come_back(words: list[int], longs: list[int], strings: list[str]) -> None:
    assert cells.as_u32s(node_with(cells.u32s(words)), "p") == tuple(words)
    assert cells.as_u64s(node_with(cells.u64s(longs)), "p") == tuple(longs)
    assert cells.as_strings(node_with(cells.strings(strings)), "p") == tuple(strings)


def test_single_values_come_back() -> None:
    assert cells.as_u32(node_with(cells.u32(0xDEADBEEF)), "p") == 0xDEADBEEF
    assert cells.as_u64(node_with(cells.u64(1 << 63)), "p") == 1 << 63
    assert cells.as_string(node_with(cells.string("é")), "p") == "é"
    assert cells.as_flag(node_with(cells.flag()), "p")
    assert not cells.as_flag(node_with(b""), "q")


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (cells.as_u32, b""),
        (cells.as_u32, bytes(8)),
        (cells.as_u64, bytes(4)),
        (cells.as_u64, bytes(16)),
        (cells.as_u64s, bytes(12)),
        (cells.as_u32s, bytes(3)),
        (cells.as_string, b""),
        (cells.as_string, b"a"),
        (cells.as_string, b"a\0b\0"),
        (cells.as_strings, b"a\0b"),
        (cells.as_strings, b"\xff\0"),
        (cells.as_flag, b"x"),
    ],
)
def test_a_value_of_another_type_names_node_and_property(read: Callable[[InstanceNode, str], object], value: bytes) -> None:
    with pytest.raises(TreeError, match=r"/instance@7 \(n\): property 'p'"):
        read(node_with(value), "p")


def test_a_missing_property_is_named() -> None:
    with pytest.raises(TreeError, match=r"/instance@7 \(n\): no property 'q'"):
        cells.as_u64(node_with(b""), "q")


@pytest.mark.parametrize(
    "make", [lambda: cells.u32(1 << 32), lambda: cells.u64(-1), lambda: cells.string("a\0b"), lambda: cells.string("\ud800")]
)
def test_values_that_fit_no_cell(make: Callable[[], bytes]) -> None:
    with pytest.raises(TreeError):
        make()


# --- refusals ---------------------------------------------------------------------------------------------------------


def patched(**root: bytes) -> bytes:
    """The sample with properties of its root replaced, digest and all."""
    from khod.abi.tree import raw_tree

    raw = raw_tree(sample(1))
    names = {name.replace("_", "-"): value for name, value in root.items()}
    return sealed(fdt_door.flatten(RawNode("", {**raw.properties, **names}, raw.children)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (patched(compatible=cells.string("linux-kho,v2")), "'compatible': 'linux-kho,v2' is not known, 'linux-kho,v1' is"),
        (patched(compatible=cells.strings([COMPATIBLE, COMPATIBLE])), "/: property 'compatible': 2 strings"),
        (patched(phys_addr_size=cells.u32(32)), "/: property 'phys-addr-size': 32 bits"),
        (patched(void_p_size=cells.u64(64)), "/: property 'void-p-size': 8 bytes"),
        (patched(preserved_folio_map=cells.u64(0x1001)), "/: property 'preserved-folio-map': 0x1001 is no page"),
        (patched(preserved_folio_map=cells.u64(1 << 52)), "/: property 'preserved-folio-map'"),
        (patched(preserved_folio_map=cells.u64(0)), "/: property 'preserved-folio-map': 0x0 with 174 pages"),
        (patched(preserved_folio_map_pages=cells.u64(1 << 41)), "/: property 'preserved-folio-map-pages'"),
        (patched(preserved_folio_map_sha256=bytes(31)), "/: property 'preserved-folio-map-sha256': 31 bytes"),
        (patched(surprise=b""), "/: property 'surprise' is not known"),
    ],
)
def test_root_values_are_checked(data: bytes, message: str) -> None:
    with pytest.raises(TreeError) as caught:
        decode(data)
    assert message in str(caught.value)


def with_children(*children: RawNode) -> bytes:
    from khod.abi.tree import raw_tree

    return sealed(fdt_door.flatten(RawNode("", raw_tree(sample(1)).properties, children)))


OWN = {"compatible": cells.string("c"), "khod,name": cells.string("n")}


@pytest.mark.parametrize(
    ("child", "message"),
    [
        (RawNode("other", OWN), "/other: not the name of an instance"),
        (RawNode("instance@01", OWN), "/instance@01: not the name of an instance"),
        (RawNode("instance@A", OWN), "/instance@A: not the name of an instance"),
        (RawNode("instance@123456789", OWN), "/instance@123456789: not the name"),
        (RawNode("instance@1", {"compatible": OWN["compatible"]}), "/instance@1: no property 'khod,name'"),
        (RawNode("instance@1", {"khod,name": OWN["khod,name"]}), "/instance@1: no property 'compatible'"),
        (RawNode("instance@1", {**OWN, "compatible": b"\0"}), "/instance@1 (n): property 'compatible'"),
        (RawNode("instance@1", OWN, (RawNode("in"),)), "/instance@1: node 'in' inside an instance"),
    ],
)
def test_instances_are_checked(child: RawNode, message: str) -> None:
    with pytest.raises(TreeError) as caught:
        decode(with_children(child))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "tree",
    [
        sample(1, map_address=0),
        sample(1, map_address=0, map_pages=0),
        sample(0, map_address=4096, map_pages=1),
        sample(1, instances=(InstanceNode(unit=1, name="a", compatible="c"), InstanceNode(unit=1, name="b", compatible="c"))),
        sample(1, instances=(InstanceNode(unit=1 << 32, name="a", compatible="c"),)),
        sample(1, instances=(InstanceNode(unit=1, name="", compatible="c"),)),
        sample(1, instances=(InstanceNode(unit=1, name="a" * 128, compatible="c"),)),
        sample(1, instances=(InstanceNode(unit=1, name="a", compatible="c", properties={"compatible": b""}),)),
        sample(1, instances=(InstanceNode(unit=1, name="a", compatible="c", properties={"": b""}),)),
        sample(1, instances=(InstanceNode(unit=1, name="a", compatible="c", properties={"é": b""}),)),
        sample(1, instances=(InstanceNode(unit=1, name="a", compatible="c", properties={"x_with_references": b""}),)),
        sample(1, instances=(InstanceNode(unit=1, name="a", compatible="c", properties={"x": bytes(1 << 20)}),)),
        sample(1, update_id="\ud800"),
        sample(4096),
    ],
)
def test_encode_refuses_what_decode_would(tree: HandoverTree) -> None:
    with pytest.raises(TreeError):
        encode(tree)


def test_a_tree_cut_short() -> None:
    data = encode(sample(1))
    for length in range(len(data)):
        with pytest.raises(TreeError):
            decode(data[:length])


# --- damage -----------------------------------------------------------------------------------------------------------

WHOLE = encode(sample(2))


@quick
@given(st.integers(0, len(WHOLE) - 1), st.integers(1, 255))
def test_any_changed_byte_is_found(at: int, flip: int) -> None:
    data = bytearray(WHOLE)
    data[at] ^= flip
    with pytest.raises(TreeError):
        decode(bytes(data))


edits = st.lists(
    st.tuples(
        st.integers(0, len(WHOLE) - 33), st.binary(min_size=1, max_size=8) | st.integers(0, 0x20).map(struct.Struct(">I").pack)
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=400, deadline=None)
@given(edits)
def test_damage_under_a_digest_that_is_right_raises_our_error_alone(changes: list[tuple[int, bytes]]) -> None:
    blob = bytearray(WHOLE[:-32])
    for at, value in changes:
        blob[at : at + len(value)] = value
    try:
        tree = decode(sealed(bytes(blob)))
    except TreeError:
        return
    assert decode(encode(tree)) == tree  # what is let through is a tree


def structure(*words: int | bytes, strings: bytes = b"a\0b\0") -> bytes:
    """A blob of this structure block."""
    block = b"".join(word if isinstance(word, bytes) else struct.pack(">I", word) for word in words)
    at = 40 + 16
    total = at + len(block) + len(strings)
    header = struct.pack(">10I", 0xD00DFEED, total, at, at + len(block), 40, 17, 16, 0, len(strings), len(block))
    return header + bytes(16) + block + strings


BEGIN, END_NODE, PROP, NOP, END = 1, 2, 3, 4, 9
ROOT = struct.pack(">II", BEGIN, 0)
CHILD = struct.pack(">I4s", BEGIN, b"x\0")


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (structure(ROOT), "no end"),
        (structure(ROOT, END), "ends inside a node"),
        (structure(END), "ends inside a node"),
        (structure(END_NODE, END), "never began"),
        (structure(PROP, 0, 0, END), "outside of any node"),
        (structure(ROOT, NOP, END_NODE, END), "unknown tag 0x4"),
        (structure(ROOT, END_NODE, ROOT, END_NODE, END), "follows the root"),
        (structure(ROOT, END_NODE, END, 0), "4 bytes follow the end"),
        (structure(BEGIN, b"x\0\0\0", END_NODE, END), "the root node has a name"),
        (structure(ROOT, CHILD, END_NODE, CHILD, END_NODE, END_NODE, END), "/: two nodes named 'x'"),
        (structure(ROOT, CHILD, END_NODE, PROP, 0, 0, END_NODE, END), "/: property 'a' follows a node"),
        (structure(ROOT, PROP, 0, 0, PROP, 0, 0, END_NODE, END), "/: property 'a' is there twice"),
        (structure(ROOT, CHILD, PROP, 0, 4, END_NODE, END_NODE, END), "/x: no name of a property at 4"),
        (structure(ROOT, PROP, 0, 1, END_NODE, END), "/: no name of a property at 1"),
        (structure(ROOT, PROP, 0xFFFFFFFF, 0, END_NODE, END), "reach over the structure block"),
        (structure(ROOT, PROP, 1, 0, b"xyzz", END_NODE, END), "padding"),
        (structure(ROOT, BEGIN, b"a b\0", END_NODE, END_NODE, END), "no name of a node"),
        (structure(ROOT, CHILD * 4, END), "/x/x/x: deeper than 4"),
        (structure(ROOT, BEGIN, b"x" * 64 + bytes(4), END_NODE, END_NODE, END), "no name of a node"),
    ],
)
def test_structures_that_are_none(blob: bytes, message: str) -> None:
    with pytest.raises(TreeError) as caught:
        fdt_door.unflatten(blob)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        (0, 0), (1, 39), (1, (1 << 20) + 1), (1, 0xFFFFFFFF), (2, 0), (2, 57), (2, 0xFFFFFFFC), (3, 0xFFFFFFFF), (4, 0),
        (4, 44), (4, 0xFFFFFFF8), (5, 16), (5, 18), (6, 17), (8, 0xFFFFFFFF), (9, 0xFFFFFFFC), (9, 6),
    ],
)  # fmt: skip
def test_headers_that_are_none(word: int, value: int) -> None:
    blob = bytearray(structure(ROOT, END_NODE, END))
    assert fdt_door.unflatten(bytes(blob)) == RawNode("")
    struct.pack_into(">I", blob, 4 * word, value)
    with pytest.raises(TreeError, match="header"):
        fdt_door.unflatten(bytes(blob))


def test_reservations_are_refused() -> None:
    blob = bytearray(structure(ROOT, END_NODE, END))
    blob[40 + 15] = 1
    with pytest.raises(TreeError, match="reserves memory"):
        fdt_door.unflatten(bytes(blob))


# --- cost -------------------------------------------------------------------------------------------------------------


def numbered(count: int) -> bytes:
    return b"".join(struct.pack(">I8sI", BEGIN, b"%06x\0" % n, END_NODE) for n in range(count))


def test_the_limits_are_kept() -> None:
    assert len(fdt_door.unflatten(structure(ROOT, numbered(4095), END_NODE, END)).children) == 4095
    with pytest.raises(TreeError, match="more than 4096 nodes"):
        fdt_door.unflatten(structure(ROOT, numbered(4096), END_NODE, END))


def test_no_node_has_too_many_properties() -> None:
    strings = b"".join(b"p%03d\0" % n for n in range(257))

    def node(count: int) -> bytes:
        return structure(ROOT, *[word for n in range(count) for word in (PROP, 0, 5 * n)], END_NODE, END, strings=strings)

    assert len(fdt_door.unflatten(node(256)).properties) == 256
    with pytest.raises(TreeError, match="more than 256 properties"):
        fdt_door.unflatten(node(257))


@pytest.mark.parametrize(
    "blob",
    [
        structure(ROOT, numbered(60_000), END_NODE, END),
        structure(ROOT, *[PROP, 0, 0] * 80_000, END_NODE, END),
        structure(ROOT, numbered(4094), CHILD, PROP, 0xE0000, 0, bytes(0xE0000), END_NODE, END_NODE, END),
        structure(*[CHILD] * 130_000),
    ],
    ids=["nodes", "properties", "both limits", "depth"],
)
def test_the_worst_that_fits_is_read_in_no_time(blob: bytes) -> None:
    assert len(blob) <= fdt_door.MAX_BLOB
    before = time.process_time()
    with contextlib.suppress(TreeError):
        fdt_door.unflatten(blob)
    assert time.process_time() - before < 0.5


def test_one_long_name_is_not_read_again_and_again() -> None:
    blob = bytearray(structure(ROOT, *[word for n in range(255) for word in (PROP, 0, n)], END_NODE, END)[:-4])
    blob += b"a" * (fdt_door.MAX_BLOB - len(blob))
    struct.pack_into(">I", blob, 4, len(blob))
    struct.pack_into(">I", blob, 32, len(blob) - struct.unpack_from(">I", blob, 12)[0])
    before = time.process_time()
    with pytest.raises(TreeError, match="no name of a property"):
        fdt_door.unflatten(bytes(blob))
    assert time.process_time() - before < 0.1


def test_reading_does_not_import_the_package() -> None:
    code = f"""
import sys
from khod.abi.tree import decode
decode(bytes.fromhex({WHOLE.hex()!r}))
assert not {{"fdt", "numpy", "msgspec", "yaml"}} & set(sys.modules), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)
