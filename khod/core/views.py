# SPDX-License-Identifier: LGPL-2.1-or-later
"""What khod tells people and programs about itself: plain values, made by the core, carried by the API, rendered by khoctl.

Sizes are bytes, durations seconds, `time` is CLOCK_REALTIME in nanoseconds. '' and () stand for "none".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ImageView:
    """The kernel that an update would jump to."""

    kernel: str
    initrd: str
    cmdline: str
    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class StatusView:
    """khod in one look."""

    state: str
    update: str
    """Id of the update under way or of the last one; ''."""
    held: bool
    """The update waits for `continue` or `abort`."""
    boot_id: str
    release: str
    version: str
    device: str
    """'ok', or why /dev/liveupdate cannot be used."""
    image: ImageView | None
    instances: int
    unclaimed: int
    """Instances that came through a jump and were not claimed yet."""
    pinned: int
    """Bytes that khod's own descriptors keep alive."""
    problems: Sequence[str] = ()
    """What an operator should look at, in sentences."""


@dataclass(frozen=True, kw_only=True)
class InstanceView:
    """One instance: something registered, or something that came through a jump."""

    name: str
    driver: str
    compatible: str
    owner: str
    required: bool
    requires: Sequence[str]
    state: str
    """'registered', 'preserved', 'frozen', 'restored', 'claimed', 'damaged', 'quarantined'."""
    size: int
    fds: Sequence[str]
    """Names of its descriptors, in the order in which `claim` gives them."""
    detail: dict[str, str] = field(default_factory=dict)
    """What its plugin has to say of it to people."""
    problem: str = ""
    grade: str = "registered"
    """'registered': khod knows what is in it; 'opaque': its owner filled a session by itself, contents unknown."""
    lifetime: str = "persistent"
    """'connection', 'process', 'persistent'."""
    keeper: str = ""
    """Who keeps it registered, in words: a process; '' for nobody but an operator."""
    since: int = 0
    """When it came into that state."""
    orphan: bool = False
    """Nobody has claimed it for longer than `orphans_after`."""
    attended: bool = False
    """A client answers for it, or must."""
    strategy: str = "native"
    """'native': the kernel preserves it; 'carried': it is copied, and made anew."""
    continuity: str = "preserved"
    """'preserved', 'rebuilt' or 'reset': what its owner finds after a jump."""


@dataclass(frozen=True, kw_only=True)
class RegisteredView:
    """The answer to a registration."""

    instance: InstanceView
    handle: str
    """Unguessable. Any connection of the same owner may use it to speak for the instance."""


@dataclass(frozen=True, kw_only=True)
class LifecycleView:
    """What a client hears of the update that its instances take part in (decisions 1 and 13)."""

    phase: str
    """'subscribed' at first, with the state khod is in as `reason`; then 'preparing', 'quiesce' and 'commit', which want an
    answer; 'executing', 'restored' and 'aborted', which do not."""
    update: str
    handles: Sequence[str] = ()
    """Of the instances that are meant."""
    deadline: float = 0.0
    """Seconds from now until when an answer is waited for; 0 where none is wanted."""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class StepView:
    """One step of a plan."""

    phase: str
    name: str
    describe: str


@dataclass(frozen=True, kw_only=True)
class MemoryView:
    """Decision 8's sum. The update is refused when `need` is more than `have`."""

    need: int
    have: int
    parts: dict[str, int]
    """What `need` is made of: 'holes', 'swapped', 'outside-cma', 'pages', 'folios', 'states'."""
    holes_filled: int
    """Bytes of holes that preserving fills, and that stay filled after an abort."""


@dataclass(frozen=True, kw_only=True)
class PlanView:
    """What an update would do now."""

    steps: Sequence[StepView]
    memory: MemoryView
    blockers: Sequence[str]
    """Why it would be refused; () when it would start."""
    kills: Sequence[str]
    """Processes that a direct jump ends, as 'name[pid]'."""
    kills_total: int


@dataclass(frozen=True, kw_only=True)
class CheckView:
    """One thing that was looked at before an update."""

    name: str
    verdict: str
    """'ok', 'warning', 'blocker', 'unknown'."""
    evidence: str
    remedy: str
    """'' when there is nothing to be done."""
    overridable: bool
    """Whether an update can be told, by this name, to go on all the same."""
    overridden: bool = False


@dataclass(frozen=True, kw_only=True)
class PreflightView:
    """Whether an update would go through, as far as that can be known."""

    running: str
    """Release of the running kernel."""
    target: str
    """Release of the one to jump to; '' when none is named, or when it does not say."""
    verdict: str
    """The worst of the checks that are not overridden."""
    checks: Sequence[CheckView]


@dataclass(frozen=True, kw_only=True)
class EventView:
    """Something happened during an update."""

    time: int
    update: str
    state: str
    kind: str
    """'state', 'step', 'instance', 'undo', 'held', 'problem', 'done', 'failed'."""
    message: str
    instance: str = ""
    seconds: float = 0.0
    """How long the step took, where it is one that ended."""
    fraction: float = 0.0
    """Of the phase that is under way, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class ClaimView:
    """The answer to a claim (decision 24)."""

    answer: str
    """'fds': here they are; 'cold': no such instance came, start from disk; 'hold': it exists, do not start."""
    reason: str
    names: Sequence[str] = ()
    """Of the descriptors that come with the answer, in order: the instance's own, then one a state of its client."""
    fds: Sequence[int] = ()
    """Machine descriptors, owned by the caller."""
    states: Sequence[str] = ()
    """Which of `names` are states: u64 length, little-endian, then what the client wrote in the old kernel."""
    handle: str = ""
    """For the instance from now on; earlier ones are void."""
    lifetime: str = ""
    """What it hangs on: 'connection', 'process', 'persistent'; '' where nothing is handed out."""
    process: int = 0
    """Of a 'hold': the process that has it already, and may run it; 0 for none that is known."""
    early: bool = False
    """Whether the initrd started that process: no unit has it yet that was to start it."""


@dataclass(frozen=True, kw_only=True)
class SpanView:
    """One row of a ledger: how long a phase, or an instance in it, took."""

    phase: str
    """A state's name; 'between' is from the last word of the old kernel to the first of the new khod; 'blackout' from
    the first instance stopped to restored, of an instance from when its workload stood still until it ran, as its clients
    said."""
    instance: str
    seconds: float
    uncertainty: float
    """Plus or minus, in seconds."""


@dataclass(frozen=True, kw_only=True)
class UpdateView:
    """One update of the past, or the one under way."""

    update: str
    started: int
    outcome: str
    """The state it ended in, or is in."""
    reason: str
    from_release: str
    to_release: str
    spans: Sequence[SpanView]
    instances: Sequence[str]
    left_behind: Sequence[str]
    """Optional instances that did not come along, each with its reason."""
    checked: str
    """Which frames and bytes were verified, in a sentence."""
    problems: Sequence[str] = ()
    overridden: Sequence[str] = ()
    """Blockers that an operator passed over, each with what it had to say."""


@dataclass(frozen=True, kw_only=True)
class OrderView:
    """Totals of one order of the folio map."""

    order: int
    folios: int
    bitmaps: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class InspectionView:
    """The handover tree and the folio map in force."""

    source: str
    """'outgoing', 'incoming', or 'none' when nothing is preserved."""
    tree: str
    """The tree as device-tree source."""
    map_address: int
    map_pages: int
    map_sha256: str
    orders: Sequence[OrderView]
