# SPDX-License-Identifier: LGPL-2.1-or-later
"""The hooks of a khod plugin. docs/plugins.md is the tutorial; this page is the contract.

A plugin is a module or object that implements these with ``@khod.plugin.hookimpl`` and is named in the entry-point group
``khod``. It speaks for the instances whose ``driver`` is its name. An implementation takes any subset of a hook's
arguments, by name, and may be ``async``; one that blocks in plain code is run in a thread, and waited for beyond its deadline.
khod calls one plugin for one instance at a time, and plugins of independent instances at once. What a hook raises fails that
instance alone (and the update, if the instance is required); what it raises outside `khod.errors` is a bug of the plugin and
is reported so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pluggy

from khod.core.driver import Declaration, Instance, Probe, Request
from khod.core.ports import Machine

hookspec = pluggy.HookspecMarker("khod")


@hookspec
def khod_compatible() -> str | Sequence[str]:  # type: ignore[empty-body]
    """The compatible strings whose nodes this plugin reads, the one it writes first: ``vendor,thing-vN``. Required.

    Called once, at start. Raise the number when the layout changes, and go on listing the version before.
    """


@hookspec
def khod_probe(machine: Machine) -> Probe:  # type: ignore[empty-body]
    """Whether the plugin can preserve anything on this machine. Touches nothing. Not implemented: it can."""


@hookspec
def khod_declare(machine: Machine, request: Request) -> Declaration:  # type: ignore[empty-body]
    """Accept a registration: say what is preserved, how large its states can become, what it needs. Required.

    When: at registration, and again after a restore. May block for a second. Touches nothing in the kernel; descriptors
    are borrowed. Raise `khod.errors.Refused` (or InvalidRequest) with the reason and a hint to turn it down.
    """


@hookspec
def khod_check(instance: Instance) -> Sequence[str]:  # type: ignore[empty-body]
    """Reasons why an update would fail with this instance, in sentences; () or None when there are none.

    When: before every update and for every plan. Touches nothing.
    """


@hookspec
def khod_settle(instance: Instance, declared: Declaration) -> Declaration | None:
    """Which way an instance goes, native or carried, where that cannot be told before (`Declaration.unsettled`): what is
    declared for this update alone, no more states and no less continuity than `declared`. None: `declared` as it stands.

    When: as the first thing of an update, the workload running and nothing preserved; what it requires is settled. May try to
    preserve (`khod.plugin.probing`), and leaves nothing preserved. Raising fails the instance: so does a device that is busy.
    """


@hookspec
def khod_prepare(instance: Instance) -> Mapping[str, bytes] | None:
    """Get ready while the workload runs, before the descriptors are preserved; instances it requires are prepared.

    Returns what thaw has to know: a khod that is started after this one was killed gives it back in `Instance.keepsake`. What
    freeze will change and thaw must set back belongs there, for the memory of this process may be gone by then.
    """


@hookspec
def khod_freeze(instance: Instance) -> Mapping[str, bytes] | None:
    """Stop, and write every state. Instances that require this one are frozen already.

    Preserve nothing and grow nothing here (decision 9). Returns properties whose values changed, none longer than declared.
    Blocks the workload: every millisecond counts.
    """


@hookspec
def khod_thaw(instance: Instance) -> None:
    """Undo prepare and freeze after a failure or an abort. Called whichever of them ran, and when one failed half-way; also by
    a khod whose predecessor was killed meanwhile, for an instance that may not even have been prepared.

    What it raises is reported and stops nobody else's thaw.
    """


@hookspec
def khod_describe(instance: Instance) -> Mapping[str, str]:  # type: ignore[empty-body]
    """A few words for people about this instance, as label and text. Not implemented: none."""


@hookspec
def khod_restore(instance: Instance) -> Mapping[str, int] | None:
    """Make it whole in the new kernel: all descriptors are retrieved, its sample of frames and bytes is verified.

    Instances that it requires are restored already. Called once for each jump, and not again when khod is restarted; but
    again when it failed in the initrd, or its process was killed there, and all that it had open is closed. Returns the
    descriptors that are made anew, by the names in `Declaration.made`; they are khod's from then on. Raising marks it
    damaged: it is kept, and not handed out.
    """


@hookspec
def khod_finish(instance: Instance) -> None:
    """The update is over and the kernel's session finished."""
