# SPDX-License-Identifier: LGPL-2.1-or-later
"""The configuration: a YAML file on the way in, frozen and typed values on the way out.

Each field of the dataclasses below is the whole of one setting: its name in the file, its default, what values it takes
(`Kind`) and its help. File, defaults and ``docs/configuration.md`` are made of these rows and of nothing else.

PyYAML and msgspec are imported when there is a file to read: the restore path of a host without one pays for neither.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple, TypeVar, cast, get_type_hints

from khod.errors import InvalidRequest
from khod.folio.units import DEFAULT_MAX_ORDER, MAX_ORDER

DEFAULT_PATH: Final = Path("/etc/khod/khod.yaml")
_SOCKET: Final = Path("/run/khod/khod.sock")
_LUO_AGENT: Final = Path("/run/luod/liveupdate.sock")
_FLEET: Final = Path("/etc/khod/fleet.yaml")
_STATE: Final = Path("/var/lib/khod")
JUMPS: Final = ("direct", "systemd")
INITRDS: Final = ("none", "build", "host")
CONTINUITIES: Final = ("preserved", "rebuilt", "reset")
LOG_LEVELS: Final = ("debug", "info", "warning", "error")
RIGHTS: Final = ("observe", "instances", "opaque", "operate", "administer")
"""What a rule can grant; `khod.core.callers.Right` says what each is."""
WHO: Final = ("user", "group", "unit", "any")
_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,15})([KMGT]?)")

T = TypeVar("T")


class Kind(NamedTuple):
    """What values a setting takes."""

    expects: str
    """For people: completes "expected …"."""
    parse: Callable[[Any], Any]
    """From what YAML made of the value. Raises ValueError (msgspec's ValidationError is one) or TypeError."""


def _checked(annotation: Callable[[], Any], finish: Callable[[Any], Any] = lambda value: value) -> Callable[[Any], Any]:
    """A parser by msgspec's types; `annotation` is called when there is something to parse, and may import it."""

    def parse(value: Any) -> Any:
        import msgspec

        return finish(msgspec.convert(value, annotation(), strict=True))

    return parse


def _within(base: type, *, le: float, gt: float | None = None, ge: float | None = None) -> Callable[[], Any]:
    def annotation() -> Any:
        import msgspec

        return Annotated[base, msgspec.Meta(gt=gt, le=le) if ge is None else msgspec.Meta(ge=ge, le=le)]

    return annotation


def _absolute(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError("the path is relative")
    return Path(text)


def _machine(text: str) -> str:
    name, colon, directory = text.partition(":")
    if text != "kernel" and not (name == "simulated" and colon and directory.startswith("/")):
        raise ValueError("there is no such machine")
    return text


def _jump(text: str) -> str:
    if text not in JUMPS:
        raise ValueError("there is no such jump")
    return text


def _continuity(text: str) -> str:
    if text not in CONTINUITIES:
        raise ValueError("there is no such continuity")
    return text


def _level(text: str) -> str:
    if text not in LOG_LEVELS:
        raise ValueError("there is no such level")
    return text


def _finite(value: float) -> float:
    if value != value or value == float("inf"):
        raise ValueError("not a number of seconds")
    return value


def size(value: int | str) -> int:
    """Bytes from a number, or from digits and one of K, M, G, T (powers of 1024). Raises ValueError."""
    match = _SIZE.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a size")
    return int(match[1]) * _UNITS[match[2]]


def _message(value: int | str) -> int:
    if not 4 << 10 <= size(value) <= 16 << 20:
        raise ValueError("too small, or too large, for a message")
    return size(value)


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule of the policy: who, and what they may."""

    kind: str
    """One of `WHO`."""
    name: str
    """Of the user or the group; a glob over the unit's name; '' for 'any'."""
    may: tuple[str, ...]
    """Of `RIGHTS`."""


def _rules(value: Any) -> tuple[Rule, ...]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return tuple(_rule(number, given) for number, given in enumerate(value, 1))


def _rule(number: int, given: Any) -> Rule:
    if not isinstance(given, dict):
        raise ValueError(f"rule {number} is no mapping")
    if unknown := [key for key in given if key not in (*WHO, "may")]:
        raise ValueError(f"rule {number}: there is no {unknown[0]!r} in a rule: {', '.join(WHO)} and may")
    named = [key for key in WHO if key in given]
    if len(named) != 1:
        raise ValueError(f"rule {number} must have exactly one of {', '.join(WHO)}")
    kind, name, may = named[0], given[named[0]], given.get("may")
    if kind == "any":
        if name is not True:
            raise ValueError(f"rule {number}: any can only be true")
        name = ""
    elif not isinstance(name, str) or not name or not name.isprintable() or "/" in name:
        raise ValueError(f"rule {number}: {name!r} is no name of a {kind}")
    elif kind == "unit" and not name.endswith((".service", ".scope")):
        raise ValueError(f"rule {number}: {name!r} can match no unit: it must end in .service or .scope")
    if not isinstance(may, list) or not may:
        raise ValueError(f"rule {number}: may must be a list of rights")
    if wrong := [right for right in may if right not in RIGHTS]:
        raise ValueError(f"rule {number}: there is no right {wrong[0]!r}: {', '.join(RIGHTS)}")
    return Rule(kind, name, tuple(right for right in RIGHTS if right in may))


@dataclass(frozen=True, slots=True)
class EarlyStart:
    """A VMM that the initrd starts (docs/initrd.md)."""

    instance: str
    owner: str
    command: tuple[str, ...]
    files: tuple[str, ...]
    also: tuple[str, ...]
    """Other instances of the same owner's that it is given."""

    @property
    def instances(self) -> tuple[str, ...]:
        """All of them."""
        return (self.instance, *self.also)


def _starts(value: Any) -> tuple[EarlyStart, ...]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    return tuple(_start(number, given) for number, given in enumerate(value, 1))


def _start(number: int, given: Any) -> EarlyStart:
    known = ("instance", "owner", "command", "files", "also")
    if not isinstance(given, dict):
        raise ValueError(f"start {number} is no mapping")
    if unknown := [key for key in given if key not in known]:
        raise ValueError(f"start {number}: there is no {unknown[0]!r} in it: {', '.join(known)}")
    instance, owner = given.get("instance"), given.get("owner", "user:root")
    if not isinstance(instance, str) or not isinstance(owner, str) or not instance:
        raise ValueError(f"start {number}: instance must be a name, and owner user:NAME or unit:NAME")
    if not owner.startswith(("user:", "unit:")):
        raise ValueError(f"start {number}: {owner!r} is no owner: user:NAME or unit:NAME")
    command, files, also = (_words(given.get(key, [])) for key in ("command", "files", "also"))
    if not command or not command[0].startswith("/"):
        raise ValueError(f"start {number}: command must be a list, and begin with the absolute path of a program")
    if relative := [path for path in files if not path.startswith("/")]:
        raise ValueError(f"start {number}: {relative[0]!r} is relative")
    if len({instance, *also}) != 1 + len(also):
        raise ValueError(f"start {number}: an instance is named twice")
    return EarlyStart(instance, owner, command, files, also)


def _words(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise ValueError("not a list")
    if wrong := [word for word in value if not isinstance(word, str) or not word or "\n" in word or "\t" in word]:
        raise ValueError(f"{wrong[0]!r} is no word without tabs and ends of lines")
    return tuple(value)


def _initrd(text: str) -> str:
    if text not in INITRDS:
        raise ValueError("there is no such way")
    return text


PATH = Kind("an absolute path", _checked(lambda: str, _absolute))
MACHINE = Kind("`kernel`, or `simulated:` and an absolute directory", _checked(lambda: str, _machine))
SECONDS = Kind("seconds, more than 0, at most 86400", _checked(_within(float, gt=0, le=86400), _finite))
SIZE = Kind("bytes, as a number or with K, M, G or T", _checked(lambda: int | str, size))
ORDER = Kind(f"a number from 0 to {MAX_ORDER}", _checked(_within(int, ge=0, le=MAX_ORDER)))
MESSAGE = Kind("bytes, as a number or with K or M, from 4K to 16M", _checked(lambda: int | str, _message))
CONNECTIONS = Kind("a number from 1 to 100000", _checked(_within(int, ge=1, le=100_000)))
COUNT = Kind("a number from 0 to 1000000", _checked(_within(int, ge=0, le=1_000_000)))
MILLISECONDS = Kind("milliseconds, from 0 to 60000", _checked(_within(int, ge=0, le=60_000)))
RULES = Kind("a list of rules, see below", _rules)
STARTS = Kind("a list, see docs/initrd.md", _starts)
NAMES = Kind("a list of names", _words)
INITRD = Kind("`none`, `build` or `host`", _checked(lambda: str, _initrd))
FLAG = Kind("`true` or `false`", _checked(lambda: bool))
JUMP = Kind("`direct` or `systemd`", _checked(lambda: str, _jump))
CONTINUITY = Kind("one of " + ", ".join(f"`{word}`" for word in CONTINUITIES), _checked(lambda: str, _continuity))
LEVEL = Kind("one of " + ", ".join(f"`{level}`" for level in LOG_LEVELS), _checked(lambda: str, _level))


def _setting(default: T, kind: Kind, help: str) -> T:
    return field(default=default, metadata={"kind": kind, "help": help})


@dataclass(frozen=True, kw_only=True)
class Deadlines:
    """How long one instance, client or system call may take in each phase; past it the update is undone."""

    preparing: float = _setting(120.0, SECONDS, "For one instance to be preserved, one client to answer; the workload runs.")
    freezing: float = _setting(10.0, SECONDS, "For one instance or client to stand still; the workload waits for the slowest.")
    sync: float = _setting(60.0, SECONDS, "For the file systems to be written out.")
    restoring: float = _setting(120.0, SECONDS, "In the new kernel: for one instance to be retrieved and checked.")
    carry_rate: int = _setting(
        128 << 20,
        SIZE,
        "What is copied or hashed goes at this many bytes a second or more: freezing and restoring may last longer.",
    )


@dataclass(frozen=True, kw_only=True)
class Verification:
    """Which bytes are compared across the jump. Frames and orders always are."""

    pages: int = _setting(16, COUNT, "Pages sampled of each instance, chosen by the update's id.")
    budget_ms: int = _setting(50, MILLISECONDS, "Time for the samples of all instances together, while frozen.")
    full: bool = _setting(False, FLAG, "Compare every byte of every instance instead: costs time while frozen.")


@dataclass(frozen=True, kw_only=True)
class Quotas:
    """What one owner may have registered at a time. Who may administer has no quota."""

    instances: int = _setting(4000, COUNT, "Instances that one owner may have registered; 0 for no limit.")
    descriptors: int = _setting(65536, COUNT, "Descriptors of all instances of one owner; 0 for no limit.")
    bytes: int = _setting(0, SIZE, "Memory behind all instances of one owner; 0 for no limit.")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a peer on khod's socket may cost. Root and khod's own user are exempt from the counts of connections."""

    message: int = _setting(256 << 10, MESSAGE, "The longest message that is read, its NUL included.")
    connections: int = _setting(4096, CONNECTIONS, "Connections that may be open at a time.")
    connections_per_user: int = _setting(1024, CONNECTIONS, "Those of one user.")
    idle: float = _setting(
        300.0, SECONDS, "When a connection is closed on which nothing is asked, followed, or kept registered."
    )
    slow: float = _setting(30.0, SECONDS, "How long a peer may take to read an answer, or to end a message that it began.")


@dataclass(frozen=True, kw_only=True)
class LuoAgent:
    """The listener for clients of luo-agent's protocol (docs/integrating.md)."""

    enabled: bool = _setting(False, FLAG, "Serve clients of luo-agent's protocol: what they have is of the opaque grade.")
    socket: Path = _setting(_LUO_AGENT, PATH, "Where they are served.")  # noqa: RUF009


@dataclass(frozen=True, kw_only=True)
class Initrd:
    """The restore before the root file system is there (docs/initrd.md)."""

    use: str = _setting(
        "none",
        INITRD,
        "Restore in the initrd: `build` one in front of the host's own whenever a kernel is loaded; or the `host`'s has it.",
    )
    modules: tuple[str, ...] = _setting((), NAMES, "Kernel modules that must be there before /dev/liveupdate is opened.")
    start: tuple[EarlyStart, ...] = _setting((), STARTS, "Instances to start in it at once, each by a command of its own.")

    @property
    def started(self) -> tuple[tuple[str, tuple[str, ...]], ...]:
        """Owner and names of the instances of each VMM that is started in it: none where it is not used."""
        return () if self.use == "none" else tuple((start.owner, start.instances) for start in self.start)


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that can be configured."""

    # RUF009 takes the call for one that makes a default to be shared; it makes the row.
    socket: Path = _setting(_SOCKET, PATH, "Where khod listens.")  # noqa: RUF009
    state_directory: Path = _setting(  # noqa: RUF009
        _STATE, PATH, "The journal's directory; it must lie on a disk that outlives the kernel."
    )
    machine: str = _setting("kernel", MACHINE, "What is updated: the running Linux, or a simulated machine in a directory.")
    device_timeout: float = _setting(
        10.0, SECONDS, "How long to try again while somebody else has /dev/liveupdate open (EBUSY)."
    )
    reserve: int = _setting(
        64 << 20, SIZE, "Memory that must stay available after everything an update needs; less, and it is refused."
    )
    jump: str = _setting(
        "direct", JUMP, "How an update jumps that does not say: at once, or by `systemctl kexec`, which stops the host first."
    )
    require: str = _setting(
        "reset",
        CONTINUITY,
        "The least that an update must give each instance, else it is refused: the same object, the same contents, or any.",
    )
    max_order: int = _setting(
        DEFAULT_MAX_ORDER, ORDER, "The largest order of a folio that is tracked, and believed when a map is read."
    )
    fleet: Path = _setting(  # noqa: RUF009
        _FLEET,
        PATH,
        "The formats that a fleet agreed on: an update's target must read them. Without such a file none are demanded.",
    )
    log_level: str = _setting("info", LEVEL, "The least severe messages that are logged.")
    orphans_after: float = _setting(
        3600.0, SECONDS, "When what came through a jump, and nobody has claimed since, is reported as an orphan. It is kept."
    )
    reconnect: float = _setting(
        60.0,
        SECONDS,
        "How long the instances of connections are kept by a khod that was started anew, for their clients to come back.",
    )
    policy: tuple[Rule, ...] = _setting((), RULES, "Who may do what, beside root and khod's own user, who may everything.")
    deadlines: Deadlines = field(default_factory=Deadlines)
    verification: Verification = field(default_factory=Verification)
    quotas: Quotas = field(default_factory=Quotas)
    limits: Limits = field(default_factory=Limits)
    luo_agent: LuoAgent = field(default_factory=LuoAgent)
    initrd: Initrd = field(default_factory=Initrd)


class Setting(NamedTuple):
    """One row of the table."""

    key: str
    kind: Kind
    default: object
    help: str


def settings(section: type = Config, prefix: str = "") -> Iterator[Setting]:
    """Every setting there is, in the order of the file."""
    for row in fields(section):
        if (inner := _section(section, row)) is not None:
            yield from settings(inner, f"{row.name}.")
        else:
            yield Setting(prefix + row.name, row.metadata["kind"], row.default, row.metadata["help"])


def load(path: Path | None = None) -> Config:
    """The configuration in `path`; without one, that at the default path, or the defaults if there is nothing there.

    Raises InvalidRequest naming file and key.
    """
    chosen = DEFAULT_PATH if path is None else path
    try:
        text = chosen.read_text(encoding="utf-8")
    except FileNotFoundError:
        if path is None:
            return Config()
        raise InvalidRequest(f"{path}: there is no such file", hint="leave it out to use the defaults")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"{chosen}: cannot be read: {error}")
    return parse(text, str(chosen))


def parse(text: str, name: str) -> Config:
    """The configuration that `text` spells; `name` stands for it in errors. Raises InvalidRequest."""
    import yaml

    try:
        data = yaml.load(text, Loader=_loader())
    except yaml.YAMLError as error:
        raise InvalidRequest(f"{name}: not YAML: {' '.join(str(error).split())}")
    return cast(Config, _build(Config, {} if data is None else data, name, ""))


def _build(section: type, data: object, name: str, prefix: str) -> object:
    if not isinstance(data, Mapping):
        raise InvalidRequest(f"{name}: {prefix.rstrip('.') or 'the file'} is not a mapping of settings to values")
    rows = {row.name: row for row in fields(section)}
    for key in data:
        if key not in rows:
            raise _unknown(name, prefix, str(key), section)
    return section(**{key: _value(section, rows[key], value, name, prefix) for key, value in data.items()})


def _value(section: type, row: Field[Any], value: object, name: str, prefix: str) -> object:
    if (inner := _section(section, row)) is not None:
        return _build(inner, value, name, f"{prefix}{row.name}.")
    kind: Kind = row.metadata["kind"]
    try:
        return kind.parse(value)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"{name}: {prefix}{row.name}: {value!r} will not do: {error}", hint=f"expected {kind.expects}")


def _unknown(name: str, prefix: str, key: str, section: type) -> InvalidRequest:
    """The error for a key that is none, with the nearest that is: in its section, or anywhere."""
    import difflib  # not on the way to restored

    here = [row.name for row in fields(section)]
    everywhere = [setting.key for setting in settings()]
    near = difflib.get_close_matches(key, here, n=1, cutoff=0.5)
    nearest = f"{prefix}{near[0]}" if near else next(iter(difflib.get_close_matches(key, everywhere, n=1, cutoff=0.4)), "")
    nearest = nearest or next((known for known in everywhere if known.endswith(f".{key}")), "")
    hint = f"did you mean {nearest}?" if nearest else "known are " + ", ".join(here)
    return InvalidRequest(f"{name}: there is no setting {prefix}{key}", hint=hint)


def _section(section: type, row: Field[Any]) -> type | None:
    """The dataclass behind a row that is a section; None for a setting."""
    if row.default is not MISSING:
        return None
    inner: type = get_type_hints(section)[row.name]
    assert is_dataclass(inner)
    return inner


def _loader() -> Any:
    """PyYAML's safe loader, with keys that are there twice refused: the last one would win without a word."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [self.construct_object(key, deep=True) for key, _ in node.value]
            for key in keys:
                if isinstance(key, str) and keys.count(key) > 1:
                    raise yaml.constructor.ConstructorError(None, None, f"{key!r} is there twice", node.start_mark)
            return super().construct_mapping(node, deep)

    return Loader


def reference() -> str:
    """docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        f"khod reads `{DEFAULT_PATH}`, or the file that `khod --config` names. Without a file the defaults hold. The file is",
        "YAML; a key with a dot below is a key in a section: `deadlines.sync` is `sync` under `deadlines:`. An unknown key,",
        "and a value that will not do, are errors: khod does not start with a configuration that it does not understand.",
        "",
        "| setting | takes | default | |",
        "| --- | --- | --- | --- |",
    ]
    lines += [f"| `{row.key}` | {row.kind.expects} | `{_shown(row)}` | {row.help} |" for row in settings()]
    lines += ["", *_POLICY, "", "An example:", "", "```yaml", *_example(), "```", ""]
    return "\n".join(lines)


_POLICY = (
    "A rule of `policy` has exactly one of `user`, `group` (names), `unit` (a glob over the name of a systemd service or",
    "scope) and `any: true`, and under `may` a list of rights: `observe` (look at everything), `instances` (register, answer",
    "for and claim instances of one's own), `opaque` (ask for kernel sessions), `operate` (load kernels, run and finish",
    "updates, register what outlives its process), `administer` (act on everybody's instances, discard). What all rules that",
    "match grant is added up. [security.md](security.md) says what counts as a unit, who owns what, and who can connect:",
    "everybody once there is a rule, where khod makes the socket; whom `khod.socket` lets in, where systemd does.",
)


def _shown(row: Setting) -> str:
    if row.default == ():
        return "[]"
    if isinstance(row.default, bool):
        return str(row.default).lower()
    if row.kind is SIZE and isinstance(row.default, int):
        suffix, unit = max((item for item in _UNITS.items() if row.default % item[1] == 0), key=lambda item: item[1])
        return f"{row.default // unit}{suffix}"
    return f"{row.default:g}" if isinstance(row.default, float) else str(row.default)


def _example() -> list[str]:
    return [
        "reserve: 2G",
        "log_level: debug",
        "deadlines:",
        "  freezing: 10",
        "verification:",
        "  full: true",
        "policy:",
        '  - unit: "vmm@*.service"',
        "    may: [instances]",
        "  - group: adm",
        "    may: [observe]",
        "  - user: deploy",
        "    may: [observe, operate]",
        "quotas:",
        "  bytes: 512G",
    ]
