# SPDX-License-Identifier: LGPL-2.1-or-later
"""10,000 leases held: what each call of the store costs, in steps of SQLite's machine rather than in time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmneg import limits
from kvmneg.store.interface import Lease
from kvmneg.store.sqlite import SqliteStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

FEW, MANY = 100, 10_000
UIDS = 5
NOW = 5000.0


def vm(number: int) -> str:
    return f"00000000-0000-4000-8000-{number:012x}"


def digest(number: int) -> str:
    return f"{number:064x}"


def grant(number: int) -> Lease:
    return Lease(vm(number), digest(1), 0, 1, 1, "t", NOW + 600, "begun")


@pytest.fixture
def make_store(tmp_path: Path) -> Iterator[Callable[[int], SqliteStore]]:
    """make_store(number) → a store with that many leases, half of them started."""
    opened = []

    def make(number: int) -> SqliteStore:
        store = SqliteStore(str(tmp_path / str(number)))
        opened.append(store)
        with store._database.changing("fill the store") as connection:
            connection.executemany(
                "INSERT INTO contracts VALUES (?, ?)", [(digest(one), b"contract") for one in range(50)]
            )
            connection.executemany(
                "INSERT INTO grants (vm, digest, generation, uid, pid, begun_at, deadline, state, boot)"
                " VALUES (?, ?, 0, ?, 1, 't', ?, ?, '')",
                [
                    (
                        vm(one),
                        digest(one % 50),
                        one % UIDS,
                        NOW + one * 500 / number,
                        ("begun", "started")[one % 2],
                    )
                    for one in range(number)
                ],
            )
        return store

    yield make
    for store in opened:
        store.close()


def steps(store: SqliteStore, call: Callable[[], object]) -> int:
    """How many instructions SQLite runs for a call."""
    count = 0

    def tick() -> None:
        nonlocal count
        count += 1

    store._database.connection.set_progress_handler(tick, 1)
    call()
    store._database.connection.set_progress_handler(None, 1)
    return count


def costs(store: SqliteStore, number: int) -> dict[str, int]:
    new = number + 1
    calls: dict[str, Callable[[], object]] = {
        "begin": lambda: store.leases.begin(grant(new), b"contract"),
        "begin again": lambda: store.leases.begin(grant(new), b"contract"),
        "started": lambda: store.leases.started(store.leases.of(vm(new))[0], ""),
        "of": lambda: store.leases.of(vm(new)),
        "holds": lambda: store.leases.holds(digest(1)),
        "contract": lambda: store.leases.contract(digest(1)),
        "end": lambda: store.leases.end(*store.leases.of(vm(new))),
        "expire nothing": lambda: store.leases.expire(NOW - 1),
        "expire one": lambda: store.leases.expire(NOW),
        "pin": lambda: pin(store),
    }
    return {name: steps(store, call) for name, call in calls.items()}


def pin(store: SqliteStore) -> None:
    from kvmneg.store.interface import Audit

    store.pin("text", "digest", expected_generation=None, audit=Audit(0, 1, "t", "why", "who"))


def test_no_call_costs_more_with_many_leases(make_store: Callable[[int], SqliteStore]) -> None:
    few, many = costs(make_store(FEW), FEW), costs(make_store(MANY), MANY)
    counting = many.pop("begin") - few.pop("begin")
    assert {name: cost for name, cost in many.items() if cost > 2 * few[name]} == {}
    # Begin counts those of all users and of its own, each from an index alone: two or three steps for each counted
    assert counting < 4 * (MANY + MANY // UIDS)


def test_the_limit_holds_at_the_last_of_many(
    make_store: Callable[[int], SqliteStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvmneg.errors import LimitExceeded

    store = make_store(MANY)
    monkeypatch.setattr(limits, "LEASES", MANY + 1)
    store.leases.begin(grant(MANY), b"contract")
    monkeypatch.setattr(limits, "LEASES_RESERVED", 1)
    persons = grant(MANY + 1)._replace(uid=limits.SYSTEM_UIDS)
    with pytest.raises(LimitExceeded):
        store.leases.begin(persons, b"contract")
    store.leases.begin(grant(MANY + 1), b"contract")  # of a user of the system
    with pytest.raises(LimitExceeded):
        store.leases.begin(grant(MANY + 2), b"contract")
    assert len(store.leases.outstanding()) == MANY + 2
    assert len(store.leases.contracts_outstanding()) == 50


def test_a_clock_set_back_with_many_leases_is_one_statement(make_store: Callable[[int], SqliteStore]) -> None:
    """Each deadline that lies too far off is brought back, by one search of one index, and only once."""
    store = make_store(MANY)
    back = NOW - 3600
    statements: list[str] = []
    store._database.connection.set_trace_callback(statements.append)
    assert store.leases.expire(back) == []
    store._database.connection.set_trace_callback(None)
    assert sum(one.startswith("UPDATE") for one in statements) == 1
    assert {one.deadline for one in store.leases.outstanding() if one.state == "begun"} == {
        back + limits.LEASE_UNSTARTED_SECONDS
    }
    assert steps(store, lambda: store.leases.expire(back)) < 100
    assert len(store.leases.expire(back + limits.LEASE_UNSTARTED_SECONDS)) == MANY // 2
