# SPDX-License-Identifier: LGPL-2.1-or-later
"""khod.kernel.store: that it appends, cuts, and syncs before it returns."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from khod.errors import MachineError
from khod.kernel.store import FileStore


def test_append_read_cut(tmp_path: Path) -> None:
    store = FileStore(tmp_path / "var/lib/khod")
    assert store.read() == b""
    store.append(b"one")
    store.append(b"two")
    assert FileStore(tmp_path / "var/lib/khod").read() == b"onetwo"
    store.cut(4)
    assert store.read() == b"onet"
    store.cut(100)
    assert store.read() == b"onet"
    store.append(b"!")
    assert store.read() == b"onet!"
    journal = tmp_path / "var/lib/khod/journal"
    assert journal.stat().st_mode & 0o777 == 0o600
    assert journal.parent.stat().st_mode & 0o777 == 0o700


def test_file_and_new_directory_entries_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        synced.append(str(Path(f"/proc/self/fd/{fd}").readlink().relative_to(tmp_path)))

    monkeypatch.setattr(os, "fsync", fsync)
    store = FileStore(tmp_path / "a/b")
    store.append(b"x")
    assert synced == [".", "a", "a/b/journal", "a/b"]
    synced.clear()
    store.append(b"y")
    assert synced == ["a/b/journal"]
    synced.clear()
    store.cut(1)
    assert synced == ["a/b/journal"]


def test_a_store_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MachineError, match="file/journal") as refused:
        FileStore(tmp_path / "file").append(b"x")
    assert refused.value.errno in (errno.ENOTDIR, errno.EEXIST)
