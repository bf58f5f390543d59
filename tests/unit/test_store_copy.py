# SPDX-License-Identifier: LGPL-2.1-or-later
"""The copy of the fence beside the database, and the store that is made from it when the database is lost."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import stat
from pathlib import Path

import pytest

from kvmneg import limits
from kvmneg.errors import KvmnegError, StoreError
from kvmneg.store import copies, statedir
from kvmneg.store.interface import Audit, Lease
from kvmneg.store.opening import open_store
from kvmneg.store.recovered import RecoveredStore
from kvmneg.store.sqlite import SqliteStore

AUDIT = Audit(1000, 42, "2026-11-21T06:00:00Z", "before the 6.12 roll-out", "kvmneg")
NOW = "2026-11-21T07:00:00Z"


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def pin(store: SqliteStore, text: str) -> None:
    store.pin(text, sha256(text), expected_generation=None, audit=AUDIT)


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state directory with two pins, the copy made after the second, and a grant."""
    with SqliteStore(str(tmp_path / "state"), verify=sha256) as store:
        pin(store, "one")
        pin(store, "two")
        store.leases.begin(Lease("vm", "a" * 64, 2, 0, 1, NOW, 600.0, "begun"), b"contract")
        store.copy_out(NOW)
    return tmp_path / "state"


def damage(state: Path) -> None:
    (state / "kvmneg.sqlite").write_bytes(b"no database at all" * 1000)


def recovered(state: Path) -> RecoveredStore:
    store = open_store(str(state), sha256)
    assert isinstance(store, RecoveredStore)
    return store


def test_the_copy_says_what_the_store_says(state: Path) -> None:
    copy = copies.read(str(state))
    assert copy == copies.Copy(NOW, 2, sha256("two"), "two", AUDIT.at, 1000, 42, AUDIT.reason)
    assert stat.S_IMODE((state / "fence.copy").stat().st_mode) == 0o600
    with SqliteStore(str(state)) as store:
        assert store.copy_out("later")  # once after each start: it may have been removed or edited
        assert not store.copy_out("later still")
        store.unpin(expected_generation=None, audit=AUDIT)
        assert store.copy_out("at last")
        copy = copies.read(str(state))
        assert (copy.made_at, copy.generation, copy.digest, copy.text) == ("at last", 3, sha256("two"), None)


def test_a_store_without_a_fence_has_a_copy_too(tmp_path: Path) -> None:
    with SqliteStore(str(tmp_path / "state")) as store:
        assert store.copy_out(NOW)
    damage(tmp_path / "state")
    with recovered(tmp_path / "state") as store:
        assert (store.generation(), store.fence()) == (0, None)
        assert store.restored(0, AUDIT).generation() == 1


def test_a_copy_that_cannot_be_written_leaves_the_old_one(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with SqliteStore(str(state)) as store:
        pin(store, "three")
        for call in ("fsync", "rename"):
            with monkeypatch.context() as disk:
                disk.setattr(os, call, refuse)
                with pytest.raises(StoreError, match="No space") as caught:
                    store.copy_out(NOW)
            assert caught.value.fields["cause"] == "ENOSPC"
            assert copies.read(str(state)).generation == 2
        assert store.copy_out(NOW)
        assert copies.read(str(state)).generation == 3


@pytest.mark.parametrize("lost", ["damaged", "removed", "removed long ago"])
def test_the_copy_is_served_where_the_database_is_lost(state: Path, lost: str) -> None:
    if lost == "damaged":
        damage(state)
    else:
        (state / "kvmneg.sqlite").unlink()
    if lost == "removed long ago":
        recovered(state).close()
    with recovered(state) as store:
        fence = store.fence()
        assert fence == (2, sha256("two"), "two", AUDIT.at, 1000, 42, AUDIT.reason)
        assert store.generation() == 2
        assert store.fault is not None
        assert "generation 2" in store.fault.message
        assert NOW in store.fault.message
        assert "kvmneg fence restore" in store.fault.hint
        with pytest.raises(StoreError, match="in use by"):
            open_store(str(state), sha256)
    assert not (state / "kvmneg.sqlite").exists()


def test_nothing_is_granted_or_changed_from_a_copy(state: Path) -> None:
    damage(state)
    with recovered(state) as store:
        for call in (
            lambda: store.pin("x", sha256("x"), expected_generation=None, audit=AUDIT),
            lambda: store.unpin(expected_generation=None, audit=AUDIT),
            lambda: store.leases.begin(Lease("vm", "a" * 64, 2, 0, 1, NOW, 600.0, "begun"), b"contract"),
            lambda: store.leases.of("vm"),
            lambda: (store.leases.outstanding(),),
            lambda: (store.leases.contracts_outstanding(),),
            lambda: store.history(1),
            lambda: store.audit(1),
            lambda: store.past_fence(1),
        ):
            with pytest.raises(StoreError, match="set aside as"):
                call()
        assert not store.copy_out("now")
    assert copies.read(str(state)).made_at == NOW


def test_a_restored_store_goes_on_above(state: Path) -> None:
    damage(state)
    with recovered(state) as copy:
        aside = next(name for name in os.listdir(state) if statedir.is_aside(name))
        store = copy.restored(7, AUDIT)
        fence = store.fence()
        assert fence is not None
        assert (fence.generation, fence.text) == (8, "two")
        assert "restored from the copy of generation 2" in fence.reason
        assert AUDIT.reason in fence.reason
        assert store.audit(5)[0].action == "restore"
        with pytest.raises(StoreError, match="in use by"):
            open_store(str(state), sha256)
    with SqliteStore(str(state), verify=sha256) as store:
        pin(store, "three")
        assert [row.generation for row in store.history(9)] == [9, 8]
        with pytest.raises(sqlite3.IntegrityError):
            store._database.connection.execute(
                "INSERT INTO fence_history (generation, action, digest, text, at, uid, pid, process, reason)"
                " VALUES (11, 'pin', 'd', 't', 'at', 0, 0, 'p', 'r')"
            )
    assert (state / aside).read_bytes() == b"no database at all" * 1000


def test_a_generation_that_the_damaged_database_still_tells_counts(state: Path) -> None:
    """The copy was made at 2; the fence went on to 4, of which the copy knows nothing."""
    with SqliteStore(str(state)) as store:
        pin(store, "three")
        pin(store, "four")
    by_hand = sqlite3.connect(state / "kvmneg.sqlite")
    page = by_hand.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'grants'").fetchone()[0]
    by_hand.close()
    with (state / "kvmneg.sqlite").open("r+b") as file:
        file.seek((page - 1) * 4096)
        file.write(b"\xff" * 4096)
    with recovered(state) as store:
        assert store.generation() == 2
        assert store.known_generation() == 4
        assert store.restored(0, AUDIT).generation() == 5


@pytest.mark.parametrize("how", ["an old file is put back", "the log is gone"])
def test_a_database_older_than_its_copy_is_lost(state: Path, tmp_path: Path, how: str) -> None:
    """Else generation 3 would be given again, to another fence."""
    shutil.copy(state / "kvmneg.sqlite", tmp_path / "old")
    with SqliteStore(str(state), verify=sha256) as store:
        pin(store, "three")
        store.copy_out(NOW)
        if how == "the log is gone":  # taken while it is in use: at the end it is folded into the database
            shutil.copy(state / "kvmneg.sqlite", tmp_path / "old")
    shutil.copy(tmp_path / "old", state / "kvmneg.sqlite")
    with recovered(state) as store:
        assert store.fault is not None
        assert "of generation 2, older than the copy" in store.fault.message
        fence = store.fence()
        assert fence is not None
        assert (fence.generation, fence.text) == (3, "three")
        assert store.restored(0, AUDIT).generation() == 4


def edited(state: Path, **fields: object) -> None:
    """A copy with other values, under the right digest: somebody's who knows the format."""
    document = json.loads((state / "fence.copy").read_bytes().partition(b"\n")[2])
    body = json.dumps({**document, **fields}).encode()
    (state / "fence.copy").write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)


def test_a_copy_that_is_not_as_it_was_written_is_not_served(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(state)
    whole = (state / "fence.copy").read_bytes()
    for data in (b"", whole[:-1], whole.replace(b'"two"', b'"TWO"'), whole[70:]):
        assert data != whole
        (state / "fence.copy").write_bytes(data)
        with pytest.raises(StoreError, match="damaged too"):
            open_store(str(state), sha256)
    for fields, why in (
        ({"text": "wider"}, "not the one that was pinned"),
        ({"format": "kvmneg.fence-copy/2"}, "another kvmneg"),
        ({"more": 1}, "another kvmneg"),
    ):
        (state / "fence.copy").write_bytes(whole)
        edited(state, **fields)
        with pytest.raises(StoreError, match=why):
            open_store(str(state), sha256)

    def unreadable(text: str) -> str:
        raise KvmnegError("no such word")

    (state / "fence.copy").write_bytes(whole)
    with pytest.raises(StoreError, match="no such word"):
        open_store(str(state), unreadable)
    monkeypatch.setattr(limits, "COPY_BYTES", len(whole) - 1)
    with pytest.raises(StoreError, match="damaged too"):
        open_store(str(state), sha256)
    monkeypatch.setattr(limits, "COPY_BYTES", len(whole))
    recovered(state).close()


def test_without_a_copy_a_lost_database_is_refused_as_ever(state: Path) -> None:
    (state / "fence.copy").unlink()
    damage(state)
    for why in ("set aside as", "would be forgotten"):
        with pytest.raises(StoreError, match=why):
            open_store(str(state), sha256)


def test_a_restored_store_whose_name_is_not_synced_is_not_taken_for_one(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage(state)
    with recovered(state) as store:
        with monkeypatch.context() as disk:
            disk.setattr(statedir, "sync_directory", lambda _: (_ for _ in ()).throw(OSError(28, "No space")))
            with pytest.raises(StoreError, match="No space"):
                store.restored(0, AUDIT)
        assert store.generation() == 2
        with pytest.raises(StoreError, match="there is a database"):
            store.restored(0, AUDIT)  # it has its name: the next start finds it
    with SqliteStore(str(state)) as again:
        assert again.generation() == 3
