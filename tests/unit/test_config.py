# SPDX-License-Identifier: LGPL-2.1-or-later
from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from khod import config
from khod.core.callers import Right
from khod.errors import InvalidRequest

DOCS = Path(__file__).parents[2] / "docs"


def parse(text: str) -> config.Config:
    return config.parse(text, "khod.yaml")


def test_a_file_sets_what_it_names_and_nothing_else() -> None:
    read = parse("reserve: 3G\nmachine: simulated:/tmp/m\ndeadlines:\n  sync: 5\nverification: {full: true, pages: 7}\n")
    default = config.Config()
    assert read == dataclasses.replace(
        default,
        reserve=3 << 30,
        machine="simulated:/tmp/m",
        deadlines=dataclasses.replace(default.deadlines, sync=5.0),
        verification=dataclasses.replace(default.verification, full=True, pages=7),
    )
    assert isinstance(read.deadlines.sync, float)


def test_the_example_in_the_documentation_is_valid() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", config.reference(), re.S)
    assert parse(example).reserve == 2 << 30


def test_every_default_is_accepted_from_a_file() -> None:
    for row in config.settings():
        value = list(row.default) if row.default == () else row.default
        value = value if isinstance(value, bool | int | float | list) else str(value)
        assert row.kind.parse(value) == row.default, row.key


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}"])
def test_an_empty_file_is_the_defaults(text: str) -> None:
    assert parse(text) == config.Config()


def test_the_configuration_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.Config().socket = Path("/")  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "key", "nearest"),
    [
        ("sockt: /x", "sockt", "socket"),
        ("log-level: info", "log-level", "log_level"),
        ("deadlines: {freeze: 3}", "deadlines.freeze", "deadlines.freezing"),
        ("freezing: 3", "freezing", "deadlines.freezing"),
        ("verification: {ful: true}", "verification.ful", "verification.full"),
    ],
)
def test_an_unknown_key_is_named_with_its_nearest(text: str, key: str, nearest: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(text)
    assert caught.value.message == f"khod.yaml: there is no setting {key}"
    assert caught.value.hint == f"did you mean {nearest}?"


def test_a_key_near_nothing_lists_what_there_is() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse("zzzzzzzzzz: 1")
    assert "socket, state_directory" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("socket: run/x", "socket"),
        ("socket: 5", "socket"),
        ("machine: qemu", "machine"),
        ("machine: 'simulated:'", "machine"),
        ("device_timeout: 0", "device_timeout"),
        ("device_timeout: -1", "device_timeout"),
        ("device_timeout: .nan", "device_timeout"),
        ("device_timeout: .inf", "device_timeout"),
        ("device_timeout: soon", "device_timeout"),
        ("reserve: 5X", "reserve"),
        ("reserve: -5", "reserve"),
        ("reserve: 1.5", "reserve"),
        ("reserve: true", "reserve"),
        ("max_order: 52", "max_order"),
        ("max_order: '9'", "max_order"),
        ("log_level: loud", "log_level"),
        ("deadlines: {sync: null}", "deadlines.sync"),
        ("deadlines: 5", "deadlines"),
        ("verification: {full: 1}", "verification.full"),
        ("limits: {message: 1K}", "limits.message"),
        ("limits: {connections: 0}", "limits.connections"),
        ("quotas: {instances: -1}", "quotas.instances"),
    ],
)
def test_a_value_that_will_not_do_names_file_and_key(text: str, key: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(text)
    assert caught.value.message.startswith(f"khod.yaml: {key}")


def test_a_policy() -> None:
    read = parse('policy:\n- {unit: "vmm@*.service", may: [instances]}\n- {any: true, may: [operate, observe]}\n')
    assert read.policy == (
        config.Rule("unit", "vmm@*.service", ("instances",)),
        config.Rule("any", "", ("observe", "operate")),
    )


@pytest.mark.parametrize(
    ("rule", "complaint"),
    [
        ("7", "rule 2 is no mapping"),
        ("{user: a}", "rule 2: may must be a list"),
        ("{user: a, may: []}", "rule 2: may must be a list"),
        ("{user: a, may: observe}", "rule 2: may must be a list"),
        ("{user: a, may: [fly]}", "there is no right 'fly': observe, instances"),
        ("{user: a, may: [[observe]]}", "there is no right"),
        ("{may: [observe]}", "exactly one of user, group, unit, any"),
        ("{user: a, group: b, may: [observe]}", "exactly one of user, group, unit, any"),
        ("{usr: a, may: [observe]}", "rule 2: there is no 'usr' in a rule"),
        ("{any: false, may: [observe]}", "any can only be true"),
        ("{user: 1000, may: [observe]}", "rule 2: 1000 is no name of a user"),
        ("{unit: vmm, may: [observe]}", "can match no unit"),
        ("{unit: a/b.service, may: [observe]}", "no name of a unit"),
    ],
)
def test_a_rule_that_will_not_do_is_named(rule: str, complaint: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(f"policy:\n- {{any: true, may: [observe]}}\n- {rule}\n")
    assert caught.value.message.startswith("khod.yaml: policy: ")
    assert complaint in caught.value.message
    with pytest.raises(InvalidRequest, match="policy: 5 will not do"):
        parse("policy: 5")


def test_the_rights_are_those_of_the_core() -> None:
    assert [*config.RIGHTS] == [*Right]


@pytest.mark.parametrize("text", ["a: [", "- 1", "!!python/object:os.system {}", "max_order: 1\nmax_order: 2", "\0"])
def test_files_that_are_no_configuration(text: str) -> None:
    with pytest.raises(InvalidRequest, match=r"khod\.yaml"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "value"), [(0, 0), ("17", 17), ("4K", 4096), ("2M", 2 << 20), ("3G", 3 << 30), ("1T", 1 << 40)]
)
def test_sizes(text: int | str, value: int) -> None:
    assert config.size(text) == value


def test_a_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidRequest, match="no such file"):
        config.load(tmp_path / "none.yaml")
    monkeypatch.setattr(config, "DEFAULT_PATH", tmp_path / "none.yaml")
    assert config.load() == config.Config()
    (tmp_path / "none.yaml").write_text("max_order: 3\n")
    assert config.load().max_order == 3


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "khod.yaml").write_bytes(b"\xff")
    with pytest.raises(InvalidRequest, match=r"khod\.yaml: cannot be read"):
        config.load(tmp_path / "khod.yaml")
    with pytest.raises(InvalidRequest, match="cannot be read"):
        config.load(tmp_path)


def test_defaults_import_neither_yaml_nor_msgspec() -> None:
    code = "import sys, khod.config; khod.config.load(); assert not {'yaml', 'msgspec'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=20)


def test_every_setting_is_documented() -> None:
    page = DOCS / "configuration.md"
    if os.environ.get("KHOD_WRITE_DOCS"):
        page.write_text(config.reference())
    assert page.read_text() == config.reference(), "KHOD_WRITE_DOCS=1 pytest tests/unit/test_config.py writes it anew"
