# SPDX-License-Identifier: LGPL-2.1-or-later
"""Memory, and time to copy it: for preserving (decision 8), for the image in scratch, and in the next kernel (decision 19)."""

from __future__ import annotations

from collections.abc import Iterator

from khod.abi.placement import place, segments
from khod.core.preflight.situation import Situation
from khod.core.preflight.verdict import Check, blocker, ok, unknown, warning


def checks(seen: Situation) -> Iterator[Check]:
    """All of them."""
    yield _memory(seen)
    yield _next_boot(seen)
    yield _scratch(seen)
    yield _hugetlb(seen)
    yield _standstill(seen)


def _memory(seen: Situation) -> Check:
    if not seen.need.enough:
        return blocker("memory", seen.need.sentence(), "free memory, lower `reserve`, or register less")
    holes = seen.need.parts["holes"]
    filled = f"; {holes} bytes of holes will be filled, and stay filled after an abort" if holes else ""
    return ok("memory", f"preserving needs {seen.need.total} bytes of {seen.need.have}{filled}")


def _next_boot(seen: Situation) -> Check:
    what = f"{seen.size} bytes in {seen.files} files"
    if seen.doubt:
        evidence = f"with today's limits it is not proven that the next kernel's khod can retrieve {what}: {seen.doubt}"
        return blocker("next-boot", evidence, "set them right before the jump: a retrieve that fails frees the memory for good")
    return ok("next-boot", f"with today's limits the next kernel's khod can retrieve {what}")


def _scratch(seen: Situation) -> Check:
    target, areas = seen.target, seen.facts.scratch
    remedy = "boot with a larger kho_scratch=LOW,GLOBAL,PERNODE, or use a smaller initrd"
    if not areas:
        return unknown("scratch", "where the scratch areas are cannot be told", "mount debugfs")
    sizes = ", ".join(str(area.end - area.start) for area in areas)
    if target is None:
        return ok("scratch", f"there are scratch areas of {sizes} bytes")
    cmdline = len(target.image.cmdline.encode("utf-8", "surrogateescape"))
    placed = place(areas, segments(target.header, len(areas), cmdline, target.initrd_size))
    homeless = [f"{p.segment.name} of {p.segment.size} bytes" for p in placed if p.at is None]
    if homeless:
        evidence = f"{' and '.join(homeless)} {'fits' if len(homeless) == 1 else 'fit'} into none of the areas of {sizes} bytes"
        return blocker("scratch", evidence, remedy)
    where = ", ".join(f"{p.segment.name} at {p.at.start:#x}" for p in placed[3:] if p.at)
    return ok("scratch", f"the image fits into the scratch areas of {sizes} bytes: {where}")


def _standstill(seen: Situation) -> Check:
    """What is not preserved as it is costs its guests time."""
    if not seen.handled:
        return ok("standstill", "nothing is copied or hashed whole while everything stands still")
    evidence = (
        f"{seen.handled} bytes are copied or hashed while everything stands still, for which"
        f" {seen.allowance:.0f} s are allowed beside the {seen.freezing:g} s of `deadlines.freezing`"
    )
    if seen.allowance <= seen.freezing:
        return ok("standstill", evidence)
    return warning("standstill", evidence, "use memfds, without hash=yes; raise `deadlines.carry_rate` if this host is faster")


def _hugetlb(seen: Situation) -> Check:
    """Pools that the target's command line asks for are made of what preserved memory and scratch leave, and what is carried of
    memory in huge pages is made anew in them."""
    if seen.target is None:
        return unknown("hugetlb", "no kernel is named yet")
    wanted = seen.target.options.huge_pages()
    if seen.huge > wanted:
        evidence = f"{seen.huge} bytes are to be made anew in huge pages, and the target's command line asks for {wanted}"
        remedy = "raise hugepages= there; overridden, what makes no pool before khod starts leaves that memory damaged"
        return blocker("hugetlb", evidence, remedy)
    if not wanted:
        return ok("hugetlb", "the target's command line asks for no huge pages")
    scratch = sum(area.end - area.start for area in seen.facts.scratch)
    left = seen.figures.total - seen.size - scratch
    if wanted > left:
        evidence = f"the target's command line asks for huge pages of {wanted} bytes, and {max(left, 0)} are left to it"
        return warning("hugetlb", evidence, "lower hugepages= there: the pools would come out short")
    return ok("hugetlb", f"the target's command line asks for huge pages of {wanted} bytes of {left}")
