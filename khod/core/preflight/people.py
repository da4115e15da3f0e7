# SPDX-License-Identifier: LGPL-2.1-or-later
"""Instances and those who answer for them."""

from __future__ import annotations

from collections.abc import Iterator

from khod.core.driver import Continuity
from khod.core.preflight.situation import Instance, Situation
from khod.core.preflight.verdict import Check, blocker, ok, warning


def checks(seen: Situation) -> Iterator[Check]:
    """A row for all that have nothing against an update, and one for each that has."""
    objecting = [i for i in seen.instances if i.objections]
    for instance in objecting:
        # Decision 7: what is not whole would be lost by the jump without a word.
        evidence = "; ".join(instance.objections)
        name = instance.label
        remedy = f"mend it, or `khoctl unregister {name}`"
        if not instance.sound:
            remedy = f"`khoctl claim {name}` hands it out (--unverified what is damaged), `khoctl discard {name}` lets go of it"
        yield blocker(f"instance:{instance.label}", evidence, remedy, final=not instance.sound)
    for instance in seen.instances:
        if instance.opaque:
            evidence = f"{instance.label}: contents unknown, and its holder can delay the jump"
            yield warning(f"opaque:{instance.label}", evidence, "have its owner register what is in it")
        if instance.deserted:
            yield _deserted(instance)
        if not instance.continuity.meets(seen.require):
            yield _continuity(instance, seen.require)
    for unit, command in seen.stops.items():
        # Decision 17: it would be stopped while what it holds travels.
        evidence = f"{unit} runs {command!r} when systemd stops the host for a jump, and an instance is its"
        yield warning(f"stops:{unit}", evidence, "have it leave the guest alone, or jump directly, which stops no unit")
    for label, why in seen.late.items():
        evidence = f"{label} is to be started in the initrd, and will not be: {why}"
        yield warning(f"early:{label}", evidence, "khod restores it when it starts, as all others; see docs/initrd.md")
    well = len(seen.instances) - len(objecting)
    yield ok("instances", f"{well} of {len(seen.instances)} instances have nothing against it")


def _continuity(instance: Instance, require: Continuity) -> Check:
    name = f"continuity:{instance.label}"
    if not instance.unsettled:
        evidence = f"{instance.label} will be {instance.continuity}, and `require` is {require}"
        return blocker(name, evidence, "register it otherwise, or lower `require`")
    evidence = f"{instance.label} will at least be {instance.continuity}, and `require` is {require}"
    return warning(
        name, evidence, "what this kernel preserves of it is tried first; an update that cannot give it is refused then"
    )


def _deserted(instance: Instance) -> Check:
    evidence = f"{instance.label}: its client has to answer, and no living one is subscribed"
    if instance.required:
        return blocker(f"client:{instance.label}", evidence, "start the client, or unregister the instance")
    return warning(f"client:{instance.label}", f"{evidence}: it will be left behind", "start the client")
