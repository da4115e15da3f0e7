# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.core.preflight: each check is made to speak by a situation that differs in one thing from one in which all is well."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from khod.abi import formats, kernel_image
from khod.abi.fleet import Fleet
from khod.core.driver import Continuity
from khod.core.need import Need
from khod.core.ports import Image, KernelFacts, MemoryFigures
from khod.core.preflight import table, verdict
from khod.core.preflight.situation import Instance, Situation, Target
from khod.core.preflight.verdict import Check, Verdict
from khod.errors import DeviceMissing, InvalidRequest, Refused
from khod.folio.units import Range
from tests import images

MIB = 1 << 20
GIB = 1 << 30
CMDLINE = "root=/dev/vda console=ttyS0 kho=on liveupdate=on"
CONFIG = {"CONFIG_KEXEC_FILE": "y", "CONFIG_KEXEC_HANDOVER": "y", "CONFIG_LIVEUPDATE": "y", "CONFIG_LIVEUPDATE_MEMFD": "y"}
PARTS = {"holes": 0, "swapped": 0, "outside-cma": 0, "pages": 8, "folios": 16, "states": 0}
KERNEL = kernel_image.read(images.bzimage(images.vmlinux(config="\n".join(f"{k}={v}" for k, v in CONFIG.items()))))
Change = Callable[[Situation], Situation]


def well() -> Situation:
    """A host on which nothing stands in the way."""
    facts = KernelFacts(
        machine="x86-64", cmdline=CMDLINE, config=CONFIG, lockdown="none", load_disabled=False, loads_left=None, debugfs=True,
        lacking=(), headroom=None, cgroup="", scratch=(Range(32 * MIB, 48 * MIB), Range(64 * MIB, 128 * MIB)),
        formats=KERNEL.formats, formats_source="debugfs",
    )  # fmt: skip
    assert KERNEL.header is not None
    image = Image("/boot/vmlinuz", "/boot/initrd", CMDLINE, -1, -1, "", 0)
    target = Target(
        image=image, header=KERNEL.header, kernel=KERNEL, problem="", config=CONFIG, config_source="the image", signed=None,
        initrd_size=8 * MIB, initrd_head=b"070701",
    )  # fmt: skip
    return Situation(
        release="7.3.4", facts=facts, device=None, figures=MemoryFigures(2 * GIB, GIB, 0, 0, 0), need=Need(PARTS, GIB),
        size=512 * MIB, files=4, doubt="", loaded=False, instances=(Instance(label="vm-1", objections=()),), stops={},
        fleet=None, fleet_problem="", target=target,
    )  # fmt: skip


def facts(**changes: Any) -> Change:
    return lambda seen: replace(seen, facts=replace(seen.facts, **changes))


def seen(**changes: Any) -> Change:
    return lambda there: replace(there, **changes)


def target(**changes: Any) -> Change:
    def change(there: Situation) -> Situation:
        assert there.target is not None
        return replace(there, target=replace(there.target, **changes))

    return change


def cmdline(text: str) -> Change:
    return target(image=Image("/boot/vmlinuz", "/boot/initrd", text, -1, -1, "", 0))


def kernel(**changes: Any) -> Change:
    return target(kernel=replace(KERNEL, **changes))


def both(*changes: Change) -> Change:
    def change(there: Situation) -> Situation:
        for one in changes:
            there = one(there)
        return there

    return change


def judged(*changes: Change) -> dict[str, Check]:
    return {check.name: check for check in table.judge(both(*changes)(well()))}


def test_nothing_stands_in_the_way() -> None:
    assert {c.verdict for c in judged().values()} == {Verdict.OK}
    assert table.view(well(), table.judge(well())).verdict == "ok"


FIRING: list[tuple[str, Verdict, str, Change]] = [
    ("device", Verdict.BLOCKER, "open", seen(device=DeviceMissing("open /dev/liveupdate", hint="add kho=on"))),
    ("config", Verdict.BLOCKER, "without CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE", facts(config={"CONFIG_KEXEC_FILE": "y"})),
    ("config", Verdict.UNKNOWN, "nobody kept", facts(config=None)),
    ("options", Verdict.BLOCKER, "without kho=on and liveupdate=on", facts(cmdline="root=/dev/vda console=ttyS0")),
    ("options", Verdict.BLOCKER, "without liveupdate=on", facts(cmdline="kho=on liveupdate=off")),
    ("permission", Verdict.BLOCKER, "khod lacks CAP_SYS_BOOT", facts(lacking=("CAP_SYS_BOOT",))),
    ("lockdown", Verdict.BLOCKER, "kexec_load_disabled", facts(load_disabled=True)),
    ("lockdown", Verdict.BLOCKER, "used up", facts(loads_left=0)),
    ("lockdown", Verdict.WARNING, "kcore", facts(lockdown="confidentiality")),
    ("debugfs", Verdict.WARNING, "not there", facts(debugfs=False)),
    ("cgroup", Verdict.BLOCKER, "/khod/memory.max, which has room for 4096",
     both(facts(headroom=4096, cgroup="/khod/memory.max"), seen(need=Need(PARTS | {"holes": 8192}, GIB)))),
    ("loaded", Verdict.BLOCKER, "did not load", seen(loaded=True)),
    ("memory", Verdict.BLOCKER, "not enough memory", seen(need=Need(PARTS, 8))),
    ("next-boot", Verdict.BLOCKER, "512", seen(doubt="memory.max", size=512)),
    ("scratch", Verdict.BLOCKER, "the initrd of 104857600 bytes fits into none", target(initrd_size=100 * MIB)),
    ("scratch", Verdict.BLOCKER, "and the initrd", facts(scratch=(Range(32 * MIB, 33 * MIB),))),
    ("scratch", Verdict.UNKNOWN, "cannot be told", facts(scratch=())),
    ("hugetlb", Verdict.WARNING, "8589934592", cmdline(f"{CMDLINE} hugepagesz=1G hugepages=8")),
    ("hugetlb", Verdict.BLOCKER, "8388608 bytes are to be made anew in huge pages",
     both(seen(huge=8 << 20), cmdline(f"{CMDLINE} hugepages=3"))),
    ("standstill", Verdict.WARNING, "still, for which 12 s are allowed beside the 10 s",
     seen(handled=GIB, allowance=12.2)),
    ("continuity:vm-1", Verdict.BLOCKER, "vm-1 will be rebuilt, and `require` is preserved",
     seen(require=Continuity.PRESERVED, instances=(Instance(label="vm-1", objections=(), continuity=Continuity.REBUILT),))),
    ("continuity:vm-1", Verdict.WARNING, "vm-1 will at least be reset, and `require` is rebuilt",
     seen(require=Continuity.REBUILT,
          instances=(Instance(label="vm-1", objections=(), continuity=Continuity.RESET, unsettled=True),))),
    ("instance:vm-1", Verdict.BLOCKER, "hugetlb", seen(instances=(Instance(label="vm-1", objections=("vm-1: hugetlb",)),))),
    ("client:vm-1", Verdict.BLOCKER, "subscribed", seen(instances=(Instance(label="vm-1", objections=(), deserted=True),))),
    ("client:vm-1", Verdict.WARNING, "left behind",
     seen(instances=(Instance(label="vm-1", objections=(), deserted=True, required=False),))),
    ("early:vm-1", Verdict.WARNING, "will not be: it is not registered", seen(late={"vm-1": "it is not registered"})),
    ("stops:vm-1.service", Verdict.WARNING, "virsh destroy", seen(stops={"vm-1.service": "virsh destroy vm-1"})),
    ("opaque:vm-1", Verdict.WARNING, "unknown", seen(instances=(Instance(label="vm-1", objections=(), opaque=True),))),
    ("image", Verdict.BLOCKER, "no kernel", seen(target=None)),
    ("image", Verdict.BLOCKER, "cut off", target(kernel=None, problem="it was cut off")),
    ("architecture", Verdict.BLOCKER, "arm64", kernel(machine="arm64")),
    ("signature", Verdict.BLOCKER, "CONFIG_KEXEC_SIG_FORCE",
     facts(config=CONFIG | {"CONFIG_KEXEC_SIG": "y", "CONFIG_KEXEC_SIG_FORCE": "y"})),
    ("signature", Verdict.BLOCKER, "lockdown at integrity",
     facts(lockdown="integrity", config=CONFIG | {"CONFIG_KEXEC_SIG": "y"})),
    ("signature", Verdict.UNKNOWN, "by whom", both(facts(lockdown="integrity", config=None), target(signed=True))),
    ("signature", Verdict.UNKNOWN, "not known", facts(config=None)),
    ("target-config", Verdict.BLOCKER, "without CONFIG_KEXEC_HANDOVER, CONFIG_LIVEUPDATE: everything is lost",
     target(config={"CONFIG_KEXEC_FILE": "y"})),
    ("target-config", Verdict.BLOCKER, "without CONFIG_LIVEUPDATE_MEMFD: the memory stays",
     kernel(formats=tuple(f for f in KERNEL.formats if f.name != "memfd"))),
    ("target-config", Verdict.UNKNOWN, "no configuration", target(config=None)),
    ("target-options", Verdict.BLOCKER, "lacks kho=on and liveupdate=on", cmdline("root=/dev/vda console=ttyS0")),
    ("cmdline", Verdict.BLOCKER, "2017 bytes, and kexec_file_load takes 2016", cmdline(CMDLINE.ljust(2017, "x"))),
    ("console", Verdict.WARNING, "lacks console=ttyS0", cmdline("root=/dev/vda kho=on liveupdate=on console=tty0")),
    ("root", Verdict.WARNING, "lacks root=/dev/vda", cmdline("console=ttyS0 kho=on liveupdate=on")),
    ("root", Verdict.WARNING, "root is /dev/vdb, the running kernel's /dev/vda", cmdline(CMDLINE.replace("vda", "vdb"))),
    ("initrd", Verdict.WARNING, "no initramfs", target(initrd_head=b"MZ\0\0")),
    ("format:kho", Verdict.BLOCKER, "everything is lost", kernel(formats=(formats.parse("kho-v9"),))),
    ("format:luo", Verdict.BLOCKER, "panics", kernel(formats=(formats.parse("kho-v4"), formats.parse("luo-v9")))),
    ("format:luo-session", Verdict.BLOCKER, "luo-session-v2 is written, luo-session-v1 is read: the target panics",
     both(facts(formats=(formats.parse("luo-session-v2"),)), kernel(formats=(formats.parse("luo-session-v1"),)))),
    ("format:memfd", Verdict.BLOCKER, "dead for that whole boot", kernel(formats=(formats.parse("memfd-v9"),))),
    ("format:memblock", Verdict.WARNING, "what reserve_mem= holds is lost",
     both(facts(cmdline=f"{CMDLINE} reserve_mem=1M:4K:log"), kernel(formats=(formats.parse("kho-v4"),)))),
    ("fleet", Verdict.BLOCKER, "luo-v9 is written, luo-v5 is read", seen(fleet=Fleet("front", (formats.parse("luo-v9"),)))),
    ("fleet", Verdict.BLOCKER, "makes no sense", seen(fleet_problem="fleet.yaml: makes no sense")),
    ("format:memfd", Verdict.UNKNOWN, "the running kernel knows is not known", facts(formats=())),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected", "words", "change"), FIRING, ids=[f"{f[0]}-{f[1]}-{n}" for n, f in enumerate(FIRING)]
)
def test_a_check_speaks(name: str, expected: Verdict, words: str, change: Change) -> None:
    check = judged(change)[name]
    assert check.verdict is expected, check
    assert words in check.evidence
    assert check.remedy or expected is Verdict.UNKNOWN


def test_a_command_line_that_just_fits() -> None:
    assert judged(cmdline(CMDLINE.ljust(2016, "x")))["cmdline"].verdict is Verdict.OK


def test_kho_may_be_on_by_default() -> None:
    on = {"CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT": "y"}
    found = judged(
        facts(config=CONFIG | on, cmdline="root=/dev/vda liveupdate=on"),
        target(config=CONFIG | on),
        lambda there: cmdline("root=/dev/vda liveupdate=on")(there) if there.target is None else there,
    )
    assert found["options"].verdict is Verdict.OK
    assert (
        judged(target(config=CONFIG | on), lambda s: _told(s, "root=/dev/vda liveupdate=on"))["target-options"].verdict == "ok"
    )


def _told(there: Situation, text: str) -> Situation:
    assert there.target is not None
    return replace(there, target=replace(there.target, image=replace(there.target.image, cmdline=text)))


def test_every_blocker_says_whether_it_can_be_passed_over() -> None:
    """And none can be that stands for a panic, for damage, or for a jump that the kernel itself refuses."""
    final = {name for name, expected, _, change in FIRING if expected is Verdict.BLOCKER and judged(change)[name].final}
    assert final == {
        "device", "config", "options", "permission", "lockdown", "image", "architecture", "cmdline",
        "format:luo", "format:luo-session",
    }  # fmt: skip
    damaged = judged(seen(instances=(Instance(label="vm-1", objections=("vm-1 is damaged: x",), sound=False),)))
    assert damaged["instance:vm-1"].final
    assert not judged(target(kernel=None, problem="x"))["image"].final


CHECKS = [verdict.ok("a", ""), verdict.blocker("b", "b!", "do"), verdict.blocker("c", "c!", "do", final=True)]


def test_overrides_are_taken_one_by_one() -> None:
    assert [c.name for c in verdict.standing(CHECKS, [])] == ["b", "c"]
    assert [c.name for c in verdict.standing(CHECKS, ["b", "a"])] == ["c"]
    assert [c.name for c in verdict.used(CHECKS, ["b", "a"])] == ["b"]
    with pytest.raises(Refused, match="c cannot be overridden: c!"):
        verdict.standing(CHECKS, ["b", "c"])
    with pytest.raises(InvalidRequest, match="no check is called \\*, z"):
        verdict.standing(CHECKS, ["*", "z"])


def test_the_view_is_as_bad_as_what_is_left() -> None:
    bad = both(seen(loaded=True), facts(debugfs=False))(well())
    assert table.view(bad, table.judge(bad)).verdict == "blocker"
    passed = table.view(bad, table.judge(bad), ["loaded"])
    assert passed.verdict == "warning"
    assert [c.name for c in passed.checks if c.overridden] == ["loaded"]
    assert [c.name for c in passed.checks if c.overridable] == ["loaded"]


def test_every_check_is_documented() -> None:
    page = (Path(__file__).parents[3] / "docs/preflight.md").read_text()
    section = page.partition("## The checks")[2].partition("### ")[0]
    documented = set(re.findall(r"^\| `([a-z-]+)(?::[A-Z]+)?` \|", section, re.M))
    assert documented == {name.partition(":")[0] for name, *_ in FIRING} | {"instances"}
    for name, _, _, change in FIRING:
        check = judged(change)[name]
        row = next(line for line in section.splitlines() if line.startswith(f"| `{name.partition(':')[0]}"))
        if check.final and name != "image" and not name.startswith("format:luo"):
            assert "| never |" in row, row
