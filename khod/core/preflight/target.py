# SPDX-License-Identifier: LGPL-2.1-or-later
"""The kernel to jump to: its file, what it is built with and told, and the formats that it understands."""

from __future__ import annotations

from collections.abc import Iterator

from khod.abi.formats import KHO, LUO, MEMFD, Comparison, Match, Outcome, compare, compare_all
from khod.core.preflight.running import OPTIONS
from khod.core.preflight.situation import Situation, Target
from khod.core.preflight.verdict import Check, blocker, ok, unknown, warning

_LOST = "the memory stays reserved and out of reach there until a cold boot"
_INITRDS = (
    b"070701",
    b"070702",
    b"\x1f\x8b",
    b"BZh",
    b"\xfd7zXZ",
    b"\x5d\0\0",
    b"\x89LZO",
    b"\x02\x21\x4c\x18",
    b"\x28\xb5\x2f\xfd",
)
"""How an initramfs begins: as a cpio archive, or compressed (init/initramfs.c)."""


def checks(seen: Situation) -> Iterator[Check]:
    """All of them; those of a kernel that is not named, or cannot be read, only as far as they go."""
    target = seen.target
    if target is None:
        yield blocker("image", "no kernel to jump to is named", "`khoctl load KERNEL` names one", final=True)
        return
    yield _image(target)
    yield _architecture(seen, target)
    yield _signature(seen, target)
    yield _config(target)
    yield _options(target)
    yield _length(target)
    yield _console(seen, target)
    yield _root(seen, target)
    yield _initrd(target)
    yield from _formats(seen, target)
    yield _fleet(seen, target)


def _image(target: Target) -> Check:
    what = f"{target.image.kernel}: Linux {target.header.version or 'of no version'}"
    if target.kernel is None:
        evidence = f"{target.image.kernel}: {target.problem}"
        return blocker("image", evidence, "get the file again; overridden, its formats stay unknown")
    return ok("image", f"{what}, {target.kernel.compression}")


def _architecture(seen: Situation, target: Target) -> Check:
    if target.kernel is None:
        return unknown("architecture", "the image cannot be read")
    if target.kernel.machine != seen.facts.machine:
        evidence = f"the image is for {target.kernel.machine}, this machine is {seen.facts.machine}"
        return blocker("architecture", evidence, "name a kernel for this machine", final=True)
    return ok("architecture", f"the image is for {target.kernel.machine}")


def _signature(seen: Situation, target: Target) -> Check:
    """kernel/kexec_file.c, kimage_validate_signature(): an image whose signature does not hold is refused where signatures are
    forced, or under lockdown; elsewhere the kernel only says so."""
    config = seen.facts.config
    locked = seen.facts.lockdown in ("integrity", "confidentiality")
    if config is None and not locked:
        return unknown(
            "signature", "whether the running kernel demands signed images is not known: nobody kept its configuration"
        )
    checked = config is None or config.get("CONFIG_KEXEC_SIG") == "y"
    forced = bool(config and config.get("CONFIG_KEXEC_SIG_FORCE") == "y")
    if not checked or not (forced or locked):
        return ok("signature", "the running kernel loads images without a signature")
    why = "CONFIG_KEXEC_SIG_FORCE" if forced else f"lockdown at {seen.facts.lockdown}"
    if not target.signed:
        return blocker(
            "signature", f"{why} demands a signed image, and this one has no signature", "sign it, or have it signed"
        )
    return unknown("signature", f"{why} demands a signed image: this one is signed, by whom shows when it is loaded")


def _config(target: Target) -> Check:
    config = target.config
    if target.kernel is None or config is None:
        evidence = "the image carries no configuration, and none lies beside it"
        return unknown("target-config", evidence, "build it with CONFIG_IKCONFIG=y, or put config-RELEASE into its directory")
    missing = [option for option in OPTIONS if config.get(option) != "y"]
    # Before 7.2 memfds came with CONFIG_LIVEUPDATE; kernels that have the option write it down either way.
    names_memfd = any(f.name == MEMFD for f in target.kernel.formats)
    if not names_memfd and "CONFIG_LIVEUPDATE" not in missing:
        missing.append("CONFIG_LIVEUPDATE_MEMFD")
    if missing:
        what = "everything is lost" if "CONFIG_KEXEC_HANDOVER" in missing else _LOST
        evidence = f"it is built without {', '.join(missing)}: {what}"
        return blocker("target-config", evidence, "name a kernel that has them")
    return ok("target-config", f"it is built with {', '.join(OPTIONS)}: {target.config_source} says so")


def _options(target: Target) -> Check:
    default = target.configured("CONFIG_KEXEC_HANDOVER_ENABLE_DEFAULT")
    missing = [] if target.options.flag("kho", default=bool(default)) else ["kho=on"]
    if not target.options.flag("liveupdate", default=False):
        missing.append("liveupdate=on")
    if missing:
        evidence = f"the target's command line lacks {' and '.join(missing)}: {_LOST}"
        return blocker("target-options", evidence, f"`khoctl load --reuse-cmdline --append '{' '.join(missing)}'`")
    return ok("target-options", "the target's command line has KHO and live update on")


def _length(target: Target) -> Check:
    longest = target.header.longest_command_line
    length = len(target.image.cmdline.encode("utf-8", "surrogateescape"))
    if length > longest:
        evidence = f"the target's command line has {length} bytes, and kexec_file_load takes {longest}"
        return blocker("cmdline", evidence, "make it shorter", final=True)
    return ok("cmdline", f"the target's command line has {length} of at most {longest} bytes")


def _console(seen: Situation, target: Target) -> Check:
    gone = [c for c in dict.fromkeys(seen.options.values("console")) if c not in target.options.values("console")]
    if gone:
        evidence = f"the target's command line lacks {' '.join(f'console={c}' for c in gone)}, which the running kernel has"
        return warning("console", evidence, "`khoctl load --reuse-cmdline` keeps the running kernel's")
    return ok("console", "the target has every console that the running kernel has")


def _root(seen: Situation, target: Target) -> Check:
    here, there = seen.options.values("root")[-1:], target.options.values("root")[-1:]
    if here and not there:
        evidence = f"the target's command line lacks root={here[0]}, which the running kernel has"
        return warning("root", evidence, "`khoctl load --reuse-cmdline` keeps the running kernel's")
    if here != there:
        return warning(
            "root", f"the target's root is {there[0]}, the running kernel's {(*here, 'none')[0]}", "see that it is meant"
        )
    return ok("root", "the target has the running kernel's root")


def _initrd(target: Target) -> Check:
    if not target.image.initrd:
        return ok("initrd", "no initrd is named")
    if not target.initrd_head.startswith(_INITRDS):
        evidence = f"{target.image.initrd} begins with {target.initrd_head[:6].hex() or 'nothing'}: that is no initramfs"
        return warning("initrd", evidence, "see whether it is the file that was meant")
    return ok("initrd", f"{target.image.initrd}: {target.initrd_size} bytes")


def _formats(seen: Situation, target: Target) -> Iterator[Check]:
    # Before luo-v2 sessions and what files share had names of their own, and were compared as well.
    names = [KHO, *sorted({f.name for f in seen.facts.formats if f.name.startswith(LUO)} or {LUO}), MEMFD]
    if seen.options.values("reserve_mem"):
        names += ["memblock", "reserve-mem"]
    reads = target.kernel.formats if target.kernel else None
    for name in names:
        written = [f for f in seen.facts.formats if f.name == name]
        compared = [compare(name, f, reads) for f in written] or [compare(name, None, reads)]
        yield _format(seen, next((c for c in compared if c.match is Match.COMPATIBLE), compared[0]))


def _fleet(seen: Situation, target: Target) -> Check:
    if seen.fleet_problem:
        return blocker("fleet", seen.fleet_problem, "mend the profile, or take it away")
    if seen.fleet is None:
        return ok("fleet", "no profile of a fleet is demanded")
    if target.kernel is None:
        return unknown("fleet", "the image cannot be read")
    lacking = [c.reason for c in compare_all(seen.fleet.formats, target.kernel.formats) if c.match is not Match.COMPATIBLE]
    if lacking:
        evidence = f"the fleet {seen.fleet.name} has agreed on other formats: {'; '.join(lacking)}"
        return blocker("fleet", evidence, "name a kernel that reads them: from this one the fleet's others may be out of reach")
    return ok("fleet", f"the target reads what the fleet {seen.fleet.name} has agreed on")


def _format(seen: Situation, compared: Comparison) -> Check:
    name = f"format:{compared.name}"
    match compared.match:
        case Match.COMPATIBLE:
            return ok(name, f"{compared.writes} is written ({seen.facts.formats_source}), and read")
        case Match.UNKNOWN:
            return unknown(name, compared.reason, "let khod read /proc/kcore and debugfs here; get the target's file again")
        case Match.INCOMPATIBLE:
            evidence = f"{compared.reason}: {compared.outcome.sentence}"
            if compared.outcome is Outcome.PARTLY:
                return warning(name, evidence, "name a kernel that reads what this one writes")
            remedy = "name a kernel that reads what this one writes (`khoctl formats` shows which), or reboot cold"
            return blocker(name, evidence, remedy, final=compared.outcome is Outcome.PANIC)
