# SPDX-License-Identifier: LGPL-2.1-or-later
"""What of the host goes into the machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from khod.core.views import ImageView
from khod.errors import InvalidRequest
from khod.rehearsal import rehearse
from khod.rehearsal.rehearse import Plan, target_of


def test_words_about_disks_consoles_and_memory_stay_on_the_host() -> None:
    given = 'BOOT_IMAGE=/vmlinuz root=/dev/sda1 ro console=ttyS0 kho=on liveupdate=on kho_scratch=1G,1G,1G dyndbg="file a +p"'
    given += " -- --x kho=off"
    assert rehearse._words(given) == ("kho=on", "liveupdate=on", 'dyndbg="file a +p"')


def test_the_configuration_is_the_hosts_but_for_what_the_machine_has_of_its_own(tmp_path: Path) -> None:
    file = tmp_path / "khod.yaml"
    file.write_text("reserve: 8G\nstate_directory: /srv/khod\nrequire: rebuilt\ndeadlines:\n  freezing: 5\n")
    settings, differs = rehearse._settings(Plan(target=tmp_path, instances=(), config=file))
    assert settings == {"require": "rebuilt", "deadlines": {"freezing": 5}, "reserve": rehearse.RESERVE}
    assert differs == [f"the setting {name} is the machine's own" for name in ("reserve", "state_directory")]
    file.write_text("requires: rebuilt\n")
    with pytest.raises(InvalidRequest, match="did you mean require"):
        rehearse._settings(Plan(target=tmp_path, instances=(), config=file))


def test_the_target_is_the_kernel_that_was_loaded_unless_another_is_named() -> None:
    loaded = ImageView(kernel="/boot/a", initrd="/boot/i", cmdline="kho=on", sha256="", size=1)
    assert target_of(None, None, loaded) == (Path("/boot/a"), "/boot/i", "kho=on")
    assert target_of(None, "quiet", loaded) == (Path("/boot/a"), "/boot/i", "quiet")
    assert target_of(Path("/boot/b"), None, loaded) == (Path("/boot/b"), "", None)
    with pytest.raises(InvalidRequest, match="no kernel to jump to"):
        target_of(None, None, None)


def test_the_machine_imports_what_this_python_does() -> None:
    here = rehearse.importable()
    assert str(Path(__file__).parents[3]) in here
    assert any((Path(entry) / "khod_vfio").is_dir() for entry in here), "the plugins, too"
