# SPDX-License-Identifier: LGPL-2.1-or-later
"""A node whose database is lost: what bounds new guests is what bounded them, pinned, lowered or floating."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from kvmneg.errors import NotPinned, ReadOnly, StoreError
from kvmneg.policy.fence_text import Fence
from kvmneg.service.leases.contracts import ContractFiles
from kvmneg.service.level import levels, moves, restoring
from kvmneg.service.level.moves import Asked
from kvmneg.service.level.rolls import Rolls
from kvmneg.service.node import Node
from kvmneg.store.opening import open_store

from .test_floating import ASKER, AUDIT, AVX2, MAX, PEER, VM, WORD, gain, gives

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from .conftest import Host

NOW = "2026-11-21T07:00:00Z"


@contextmanager
def lost(node: Node, host: Host, tmp_path: Path) -> Iterator[Node]:
    """The daemon started again after its database was damaged."""
    node.store.copy_out(NOW)
    node.store.close()
    (tmp_path / "state/kvmneg.sqlite").write_bytes(b"no database at all" * 1000)
    with open_store(str(tmp_path / "state"), lambda text: Fence.parse(text).digest) as store:
        assert store.recovered
        yield Node(store, host, ContractFiles(str(tmp_path / "contracts")))


def test_a_level_that_floats_does_not_rise_by_it(node: Node, host: Host, tmp_path: Path) -> None:
    host.lose(WORD, AVX2)
    node.refresh()
    gain(host)
    node.refresh()
    assert not gives(node)
    with lost(node, host, tmp_path) as again:
        assert again.state == "readonly"
        assert not gives(again)
        restoring.restore(again, None, AUDIT)
        assert (again.state, gives(again)) == ("floating", False)
        assert moves.unpin(again, None, AUDIT) == 2
        assert gives(again)


@pytest.mark.parametrize("rolled", [False, True], ids=["a report alone says what it is", "a combo bounds it"])
def test_a_host_that_offers_more_since(node: Node, host: Host, tmp_path: Path, rolled: bool) -> None:
    host.lose(WORD, AVX2)
    node.measure()
    if rolled:
        Rolls(node).add("running", AUDIT)
    moves.pin(node, "host", None, None, AUDIT)
    moves.unpin(node, None, AUDIT)
    assert (node.state, gives(node)) == ("floating", False)
    gain(host)
    host.change("combo", "kernel", "7.3.0")
    with lost(node, host, tmp_path) as again:
        assert not gives(again)
        restoring.restore(again, None, AUDIT)
        assert not gives(again)
        assert len(again.store.rolls.members()) == rolled
        if rolled:  # nobody could return to that combo with guests that have more
            with pytest.raises(NotPinned):
                moves.unpin(again, None, AUDIT)
        else:
            moves.unpin(again, None, AUDIT)
            assert gives(again)


def test_a_lowering_bounds_on_and_can_be_finished(node: Node, host: Host, tmp_path: Path) -> None:
    moves.pin(node, "host", None, None, AUDIT)
    top = node.negotiate(MAX, PEER).contract.granted
    moves.lower(node, Asked(without=("avx2",)), None, AUDIT)
    low = node.negotiate(MAX, PEER).contract.granted
    assert low != top and not gives(node)
    with lost(node, host, tmp_path) as again:
        assert (again.state, again.proposal, again.generation) == ("readonly", "lower", 2)
        offer = again.negotiate(MAX, PEER).contract
        assert offer.granted == low
        with pytest.raises(StoreError, match="read-only until an admin acts"):
            again.begin(offer.digest, VM, ASKER)
        assert levels.level(again).state == "readonly"
        for refused in (
            lambda: moves.commit(again, None, AUDIT),
            lambda: moves.progress(again),
            lambda: moves.plan(again, Asked("host")),
            lambda: Rolls(again).standings(),
            lambda: Rolls(again).history(9),
            lambda: Rolls(again).add("running", AUDIT),
        ):
            with pytest.raises((StoreError, ReadOnly), match="read-only until an admin acts"):
                refused()
        assert restoring.restore(again, None, AUDIT)["generation"] == 4
        assert (again.state, again.negotiate(MAX, PEER).contract.granted) == ("lowering", low)
        assert moves.progress(again)["count"] == 0
        moves.commit(again, None, AUDIT)
        assert (again.state, again.negotiate(MAX, PEER).contract.granted) == ("pinned", low)


def test_a_lowering_can_be_aborted_after_it(node: Node, host: Host, tmp_path: Path) -> None:
    moves.pin(node, "host", None, None, AUDIT)
    digest = node.fence_digest
    moves.lower(node, Asked(without=("avx2",)), None, AUDIT)
    with lost(node, host, tmp_path) as again:
        restoring.restore(again, 10, AUDIT)
        assert moves.abort(again, None, AUDIT)["digest"] == digest
        assert (again.state, again.generation, gives(again)) == ("pinned", 13, True)


def test_a_raise_is_neither_in_force_nor_forgotten(
    node: Node, host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moves.pin(node, "level:x86-64-v2", None, None, AUDIT)
    moves.raise_(node, Asked("host"), None, AUDIT)
    with lost(node, host, tmp_path) as again:
        assert not gives(again)
        found = again.store.levels.proposal()
        assert found is not None and found.deadline is not None
        monkeypatch.setattr(again, "wall", lambda late=found.deadline + 1: late)
        again.keep_up()  # no change can be made, and none is tried
        assert again.proposal == "raise"
        restoring.restore(again, None, AUDIT)
        assert again.state == "raising"
        again.keep_up()
        assert again.state == "pinned"


def test_the_level_that_finds_room_again_changes_it(node: Node) -> None:
    """The guards ask the disk first: else they would refuse the change that finds it writable."""
    moves.pin(node, "host", None, None, AUDIT)
    database = node.store.levels._database
    database._note(StoreError("cannot pin the fence: disk full", cause="SQLITE_FULL"))
    assert node.state == "readonly"
    moves.lower(node, Asked(without=("avx2",)), None, AUDIT)
    assert node.state == "lowering"
