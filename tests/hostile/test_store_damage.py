# SPDX-License-Identifier: LGPL-2.1-or-later
"""The embedded store's database damaged or edited by hand: kept, told, never taken for empty."""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg.errors import BadInput, StoreError
from kvmneg.store.sqlite import SqliteStore

from .conftest import content, pin, sha256, text_of

if TYPE_CHECKING:
    from collections.abc import Callable


def crashed(state: Path) -> None:
    """The state directory as a power cut leaves it: a database, and its log with the newest fences."""
    live = state.with_name("live")
    with SqliteStore(str(live)) as store:
        for generation in range(1, 4):
            pin(store, text_of(generation))
    with SqliteStore(str(live)) as store:
        pin(store, text_of(4))
        shutil.copytree(live, state)
    assert (state / "kvmneg.sqlite-wal").stat().st_size > 0


def no_header(file: Path) -> None:
    file.write_bytes(b"not SQLite at all" + file.read_bytes()[17:])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def scribbled(file: Path) -> None:
    pages = bytearray(file.read_bytes())
    for start in range(4096, len(pages), 4096):
        pages[start : start + 64] = random.Random(start).randbytes(64)
    file.write_bytes(pages)


# A lost header is not among the crashed ones: the log has that page again, see below.
DAMAGES = [(no_header, False), (empty, False), (empty, True), (half, False), (half, True)]
DAMAGES += [(scribbled, False), (scribbled, True)]


@pytest.mark.parametrize(("damage", "with_log"), DAMAGES)
def test_damage_is_set_aside_and_never_forgotten(
    state: Path, tmp_path: Path, damage: Callable[[Path], None], with_log: bool
) -> None:
    crashed(state)
    if not with_log:
        SqliteStore(str(state)).close()
        assert list(content(state)) == ["kvmneg.sqlite"]
    damage(state / "kvmneg.sqlite")
    before = content(state)
    with pytest.raises(StoreError, match="set aside as") as caught:
        SqliteStore(str(state))
    aside = caught.value.fields["aside"]
    assert re.fullmatch(r"kvmneg\.sqlite\.corrupt-\d{8}T\d{6}Z", aside)
    assert content(state)[aside] == before["kvmneg.sqlite"]
    assert content(state).get(f"{aside}-wal") == before.get("kvmneg.sqlite-wal")
    assert len(content(state)) == len(before)

    for _restart in range(2):
        with pytest.raises(StoreError, match="would be forgotten") as caught:
            SqliteStore(str(state))
        assert aside in caught.value.hint
    for name in content(state):
        (state / name).rename(tmp_path / name)
    with SqliteStore(str(state)) as store:
        assert store.generation() == 0


def test_what_the_log_can_repair_is_whole_or_set_aside(state: Path) -> None:
    crashed(state)
    no_header(state / "kvmneg.sqlite")
    try:
        with SqliteStore(str(state), verify=sha256) as store:
            fence = store.fence()
    except StoreError as error:
        assert "set aside as" in error.message
    else:
        assert fence is not None
        assert (fence.generation, fence.text) == (4, text_of(4))


def test_two_damages_in_one_second_are_both_kept(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.gmtime()
    monkeypatch.setattr(time, "gmtime", lambda: now)
    state.mkdir(mode=0o700)
    for text in ("first ", "second"):
        (state / "kvmneg.sqlite").write_bytes(text.encode() * 1000)
        with pytest.raises(StoreError, match="set aside as"):
            SqliteStore(str(state))
    assert sorted(content(state).values()) == [b"first " * 1000, b"second" * 1000]


def test_a_database_that_vanished_from_beside_its_log_is_missed(state: Path) -> None:
    crashed(state)
    (state / "kvmneg.sqlite").unlink()
    with pytest.raises(StoreError, match="would be forgotten"):
        SqliteStore(str(state))
    assert list(content(state)) == ["kvmneg.sqlite-wal"]


def edit(state: Path, assignment: str) -> None:
    with closing(sqlite3.connect(state / "kvmneg.sqlite", isolation_level=None)) as by_hand:
        by_hand.execute("DROP TRIGGER fence_history_update")
        by_hand.execute(f"UPDATE fence_history SET {assignment} WHERE generation = 2")


def parse(text: str) -> str:
    if text.startswith("#"):
        raise BadInput("no fence")
    return sha256(text)


@pytest.mark.parametrize("assignment", ["text = 'wider'", "digest = 'x'", "text = '# nothing'"])
def test_a_fence_edited_by_hand_is_refused(state: Path, assignment: str) -> None:
    with SqliteStore(str(state)) as store:
        pin(store, "one")
        pin(store, "two")
    edit(state, assignment)
    with SqliteStore(str(state), verify=parse) as store:
        for read in (store.fence, lambda: store.past_fence(2)):
            with pytest.raises(StoreError, match="generation 2") as caught:
                read()
            assert caught.value.fields["generation"] == 2
        past = store.past_fence(1)
        assert past is not None
        assert past.text == "one"
        assert pin(store, "two") == 3  # and this is the way out
        fence = store.fence()
    assert fence is not None
    assert fence.text == "two"
