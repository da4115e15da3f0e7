# SPDX-License-Identifier: LGPL-2.1-or-later
"""The running kernel: whether it hands over at all, and lets khod have it do so."""

from __future__ import annotations

from collections.abc import Iterator

from khod.core.preflight.situation import Situation
from khod.core.preflight.verdict import Check, blocker, ok, unknown, warning

OPTIONS = ("CONFIG_KEXEC_FILE", "CONFIG_KEXEC_HANDOVER", "CONFIG_LIVEUPDATE")
"""What a kernel is built with that can be jumped from and to. Memory needs CONFIG_LIVEUPDATE_MEMFD as well, from 7.2 on."""


def checks(seen: Situation) -> Iterator[Check]:
    """All of them."""
    yield _device(seen)
    yield _config(seen)
    yield _options(seen)
    yield _permission(seen)
    yield _lockdown(seen)
    yield _debugfs(seen)
    yield _cgroup(seen)
    yield _loaded(seen)


def _device(seen: Situation) -> Check:
    if seen.device is None:
        return ok("device", "/dev/liveupdate can be opened")
    return blocker("device", seen.device.message, seen.device.hint or "without the device nothing is preserved", final=True)


def _config(seen: Situation) -> Check:
    config = seen.facts.config
    if config is None:
        return unknown("config", f"nobody kept the configuration of {seen.release}", "see whether the check `device` is ok")
    missing = [option for option in OPTIONS if config.get(option) != "y"]
    if missing:
        evidence = f"{seen.release} is built without {', '.join(missing)}"
        return blocker("config", evidence, "boot a kernel that has them", final=True)
    return ok("config", f"{seen.release} is built with {', '.join(OPTIONS)}")


def _options(seen: Situation) -> Check:
    config = seen.facts.config or {}
    default = config.get("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT") == "y"
    missing = [] if seen.options.flag("kho", default=default) else ["kho=on"]
    if not seen.options.flag("liveupdate", default=False):
        missing.append("liveupdate=on")
    if not missing:
        return ok("options", "the running kernel was started with KHO and live update on")
    evidence = f"the running kernel was started without {' and '.join(missing)}"
    return blocker("options", evidence, f"add {' '.join(missing)} to the kernel's command line and boot again", final=True)


def _permission(seen: Situation) -> Check:
    if seen.facts.lacking:
        evidence = f"khod lacks {', '.join(seen.facts.lacking)}"
        return blocker("permission", evidence, "run it as root, or give the unit these capabilities", final=True)
    return ok("permission", "khod has the capabilities that it needs")


def _lockdown(seen: Situation) -> Check:
    """kernel/kexec.c, kexec_load_permitted(); security/lockdown."""
    facts = seen.facts
    if facts.load_disabled:
        remedy = "it stays so until the next boot: leave kernel.kexec_load_disabled alone there"
        return blocker("lockdown", "the sysctl kernel.kexec_load_disabled is set: no image can be loaded", remedy, final=True)
    if facts.loads_left == 0:
        remedy = "it stays so until the next boot: leave kernel.kexec_load_limit_reboot at -1 there"
        return blocker("lockdown", "the sysctl kernel.kexec_load_limit_reboot is used up", remedy, final=True)
    if facts.lockdown == "confidentiality":
        evidence = "lockdown is at confidentiality: /proc/kcore cannot be read, nor frames verified"
        return warning("lockdown", evidence, "boot with lockdown=integrity")
    if not facts.lockdown:
        return ok("lockdown", "the kernel has no lockdown, and images may be loaded")
    return ok("lockdown", f"lockdown is at {facts.lockdown}, and images may be loaded")


def _debugfs(seen: Situation) -> Check:
    if seen.facts.debugfs:
        return ok("debugfs", "/sys/kernel/debug/kho can be read")
    evidence = "/sys/kernel/debug/kho is not there: where scratch is comes from what the last kernel said, if from anywhere"
    return warning("debugfs", evidence, "mount debugfs; CONFIG_KEXEC_HANDOVER_DEBUGFS=y")


def _cgroup(seen: Situation) -> Check:
    """Holes are filled, and states written, by khod's own processes: their control group pays for them."""
    headroom, charged = seen.facts.headroom, seen.need.parts["holes"] + seen.need.parts["states"]
    if headroom is None:
        return ok("cgroup", "no control group limits khod's memory")
    if charged > headroom:
        evidence = f"preserving charges {charged} bytes to {seen.facts.cgroup}, which has room for {headroom}"
        return blocker("cgroup", evidence, "raise MemoryMax= and MemoryHigh= of khod's unit, or take them away")
    return ok("cgroup", f"{seen.facts.cgroup} has room for {headroom} bytes, of which preserving charges {charged}")


def _loaded(seen: Situation) -> Check:
    if seen.loaded:
        evidence = "a kernel image that khod did not load is in place: loaded the old way it carries nothing across"
        return blocker("loaded", evidence, "`kexec --unload` drops it; overridden, khod's own takes its place")
    return ok("loaded", "no other kernel image is in place")
