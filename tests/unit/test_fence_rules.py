# SPDX-License-Identifier: LGPL-2.1-or-later
"""The rules of the fence one by one, over pools of two: what is refused, and whom a refusal names."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from kvmneg import limits
from kvmneg.errors import (
    Blocked,
    Breached,
    GuestsAbove,
    HostsMissing,
    Incompatible,
    NotPinned,
    ReadOnly,
    UsageError,
    WrongState,
)
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.words import ARM64, X86_64
from kvmneg.policy import fence, leases, plans, pooling
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.leases import Holding
from kvmneg.policy.level import Level
from kvmneg.policy.members import Measured

if TYPE_CHECKING:
    from kvmneg.policy.leases import Above

WORD = "cpuid:0x7.0.ebx"
BMI1, SMEP, BMI2, RDSEED = 1 << 3, 1 << 7, 1 << 8, 1 << 18
ALL = BMI1 | SMEP | BMI2 | RDSEED


def offers(bits: int) -> FeatureSet:
    return FeatureSet.of(X86_64, {WORD: bits})


def combo(bits: int, name: str = "6.12") -> Measured:
    return Measured(f"sha256:{name}", name, offers(bits))


def pool(**hosts: int) -> Level:
    """Members by name, with what each offers."""
    level = Level()
    for name, bits in hosts.items():
        level = pooling.candidate(level, name).level
        level = pooling.measured(level, name, combo(bits), 1).level
        level = pooling.join(level, name).level
    return level


def pinned(bits: int, **hosts: int) -> Level:
    return fence.pin(pool(**hosts), Fence(offers(bits))).level


def holding(vm: str, bits: int, state: str = leases.RUNNING) -> Holding:
    return Holding(vm, f"sha256:{vm}", offers(bits), state, 7)


def named(error: Blocked) -> set[tuple[str, str]]:
    return {(one.feature, one.missing_on) for one in error.blockers}


# -- hosts


def test_a_weaker_host_joins_a_pool_that_floats_and_lowers_it() -> None:
    level = pool(a=ALL)
    level = pooling.candidate(level, "b").level
    level = pooling.measured(level, "b", combo(ALL & ~SMEP), 1).level
    step = pooling.join(level, "b")
    assert (step.action, step.detail["before"]) == ("host-join", offers(ALL).digest())
    assert step.level.effective is not None
    assert step.level.effective.granted == offers(ALL & ~SMEP)


def test_a_weaker_host_is_told_what_a_fence_wants() -> None:
    level = pinned(BMI1 | SMEP, a=ALL)
    level = pooling.candidate(level, "b").level
    with pytest.raises(HostsMissing, match="never measured"):
        pooling.join(level, "b")
    level = pooling.measured(level, "b", combo(BMI1), 2).level
    with pytest.raises(Blocked) as caught:
        pooling.join(level, "b")
    assert named(caught.value) == {("smep", "host b")}
    assert "lower" in caught.value.hint
    level = pooling.join(level, "b", partial=True).level
    assert [one.state for one in level.members] == ["member", "deficient"]
    assert level.state == "pinned"  # it does not bound the others
    assert pooling.grants(level, "b") == offers(BMI1)
    assert pooling.grants(level, "a") == offers(BMI1 | SMEP)


@pytest.mark.parametrize(
    "other",
    [
        FeatureSet.of(X86_64, {"cpuid:0x0.0.ebx": 0x68747541}),
        FeatureSet.empty(ARM64),
    ],
    ids=["vendor", "architecture"],
)
def test_a_host_of_another_kind_does_not_join(other: FeatureSet) -> None:
    level = pooling.candidate(Level(), "a").level
    ours = FeatureSet.of(X86_64, {"cpuid:0x0.0.ebx": 0x756E6547})
    level = pooling.measured(level, "a", Measured("c", "c", ours), 1).level
    level = pooling.join(level, "a").level
    level = pooling.candidate(level, "b").level
    level = pooling.measured(level, "b", Measured("c", "c", other), 1).level
    with pytest.raises(Incompatible, match="another kind"):
        pooling.join(level, "b")


def test_a_host_that_is_lost_still_counts_until_it_is_removed() -> None:
    level = pool(a=ALL, b=ALL & ~SMEP)
    level = pooling.lost(level, "b").level
    with pytest.raises(Blocked) as caught:
        fence.pin(_measured_again(level, "a"), Fence(offers(SMEP)))
    assert "b" in {one.missing_on.removeprefix("host ") for one in caught.value.blockers}
    level = pooling.remove(level, "b").level
    assert level.effective is not None
    assert level.effective.granted == offers(ALL & ~SMEP)  # nothing rises for it
    assert fence.pin(level, Fence(offers(SMEP))).level.state == "pinned"


def _measured_again(level: Level, host: str) -> Level:
    """A level in which the lost host's word is not what is asked for: only F ≤ C is."""
    members = tuple(one._replace(state="member", fresh=True) for one in level.members)
    return pooling.measured(level._replace(members=members), host, combo(ALL), 2).level


def test_one_host_below_the_fence_stops_new_contracts_everywhere() -> None:
    level = pinned(SMEP, a=ALL, b=ALL)
    step = pooling.measured(level, "b", combo(BMI1), 2)
    assert (step.action, step.level.state) == ("breached", "breached")
    assert [one.state for one in step.level.members] == ["member", "deficient"]
    with pytest.raises(Breached) as caught:
        pooling.grants(step.level, "a")
    assert named(caught.value) == {("smep", "host b")}
    assert step.level.effective is not None
    assert step.level.effective.granted == offers(SMEP)
    healed = pooling.measured(step.level, "b", combo(ALL), 3)
    assert (healed.action, healed.level.state) == ("healed", "pinned")
    assert pooling.remove(step.level, "b").level.state == "pinned"
    lowered = fence.propose_lower(step.level, Fence(offers(0)), 3).level
    assert lowered.state == "lowering"


def test_what_is_told_of_a_host_that_is_none() -> None:
    with pytest.raises(UsageError, match="no host of this pool"):
        pooling.lost(pool(a=ALL), "x")
    with pytest.raises(UsageError, match="a member already"):
        pooling.candidate(pool(a=ALL), "a")
    with pytest.raises(UsageError, match="is member, not unreachable"):
        pooling.fence_off(pool(a=ALL), "a")


# -- raising and lowering


def test_a_raise_waits_for_every_host() -> None:
    level = fence.propose_raise(pinned(BMI1, a=ALL, b=BMI1), Fence(offers(BMI1 | SMEP)), 1).level
    assert level.effective is not None
    assert level.effective.granted == offers(BMI1)
    level = pooling.measured(level, "a", combo(ALL), 2).level
    with pytest.raises(HostsMissing) as absent:
        fence.commit(level)
    assert [(row["host"], row["because"]) for row in absent.value.fields["hosts"]] == [
        ("b", "it was not measured since the proposal")
    ]
    level = pooling.measured(level, "b", combo(BMI1), 2).level
    with pytest.raises(Blocked) as caught:
        fence.commit(level)
    assert named(caught.value) == {("smep", "host b")}
    level = pooling.measured(level, "b", combo(BMI1 | SMEP), 3).level
    assert pooling.lost(level, "a").level.state == "raising"
    with pytest.raises(HostsMissing, match="a: it cannot be reached"):
        fence.commit(pooling.lost(level, "a").level)
    done = fence.commit(level)
    assert (done.level.state, done.level.generation, done.action) == ("pinned", 2, "raise-commit")


def test_a_combo_to_return_to_is_left_behind_only_by_name() -> None:
    level = pooling.roll_add(pinned(BMI1, a=ALL), "a", combo(BMI1, "6.1")).level
    level = fence.propose_raise(level, Fence(offers(ALL)), 1).level
    level = pooling.measured(level, "a", combo(ALL), 2).level
    with pytest.raises(Blocked, match="could not return") as caught:
        fence.commit(level, consent=("sha256:6.6",))
    assert {one.missing_on for one in caught.value.blockers} == {"host a under 6.1"}
    done = fence.commit(level, consent=("sha256:6.1",))
    assert done.detail["left"] == ["sha256:6.1"]
    assert done.level.members[0].roll == ()
    with pytest.raises(Blocked, match="lower") as caught:  # the fence is passed
        pooling.roll_add(done.level, "a", combo(BMI1, "6.1"))
    assert "lower the fence" in str(caught.value)


def test_a_fence_is_pinned_under_every_combo_to_return_to() -> None:
    level = pooling.roll_add(pool(a=ALL), "a", combo(BMI1, "6.1")).level
    assert level.effective is not None
    assert level.effective.granted == offers(BMI1)  # C is over them too
    with pytest.raises(Blocked, match="roll-back set") as caught:
        fence.pin(level, Fence(offers(BMI1 | SMEP)))
    assert named(caught.value) == {("smep", "host a under 6.1")}


def test_a_lowering_waits_for_hosts_and_guests() -> None:
    level = fence.propose_lower(pinned(ALL, a=ALL, b=ALL), Fence(offers(BMI1)), 1).level
    assert (level.state, level.generation) == ("lowering", 2)
    assert pooling.grants(level, "a") == offers(BMI1)  # at once
    level = pooling.acknowledge(level, "a", 2).level
    with pytest.raises(HostsMissing, match="b: it has not said that it serves generation 2"):
        fence.commit(level)
    lost = pooling.lost(level, "b").level
    with pytest.raises(HostsMissing, match="may still run guests"):
        fence.commit(lost)
    assert fence.commit(pooling.fence_off(lost, "b").level).level.state == "pinned"
    level = pooling.acknowledge(level, "b", 2).level
    above, below = holding("high", BMI1 | SMEP), holding("low", BMI1)
    unknown = Holding("pid 7", "", None, leases.UNKNOWN, 0)
    with pytest.raises(GuestsAbove, match="high, pid 7") as caught:
        fence.commit(level, [above, below, unknown])
    assert [row["features"] for row in caught.value.fields["guests"]] == [["smep"], []]
    with pytest.raises(GuestsAbove, match="more than that: pid 7"):
        fence.commit(level, [above, below, unknown], override=["high"])
    done = fence.commit(level, [above, below, unknown], override=["high", "pid 7", "else"])
    assert (done.level.generation, done.detail["overridden"]) == (2, ["high", "pid 7"])


@pytest.mark.parametrize(
    ("move", "error", "words"),
    [
        (lambda level: fence.propose_raise(level, Fence(offers(SMEP)), 1), Blocked, "takes away too: bmi1"),
        (lambda level: fence.propose_lower(level, Fence(offers(SMEP)), 1), Blocked, "adds too: smep"),
        (lambda level: fence.propose_lower(level, Fence(offers(BMI1)), 1), UsageError, "in force already"),
        (fence.commit, WrongState, "nothing is proposed"),
        (fence.abort, WrongState, "nothing is proposed"),
    ],
)
def test_moves_that_are_none(move: object, error: type[Exception], words: str) -> None:
    assert callable(move)
    with pytest.raises(error, match=words):
        move(pinned(BMI1, a=ALL))


@pytest.mark.parametrize("move", [fence.propose_raise, fence.propose_lower])
def test_a_pool_that_floats_is_pinned_first(move: object) -> None:
    assert callable(move)
    with pytest.raises(NotPinned, match="there is none to"):
        move(pool(a=ALL), Fence(offers(BMI1)), 1)


def test_nothing_is_changed_while_read_only() -> None:
    level = fence.freeze(pinned(BMI1, a=ALL), "no space on the disk").level
    assert level.state == "readonly"
    assert pooling.grants(level, "a") == offers(BMI1)  # the last committed one is served
    for move in (
        lambda: fence.pin(level, Fence(offers(BMI1))),
        lambda: fence.unpin(level),
        lambda: pooling.candidate(level, "b"),
        lambda: pooling.remove(level, "a"),
    ):
        with pytest.raises(ReadOnly, match="no space on the disk"):
            move()
    assert fence.thaw(level).level.state == "pinned"


# -- plans


def test_a_plan_says_what_changes_and_who_is_in_the_way() -> None:
    level = pooling.roll_add(pinned(BMI1, a=ALL, b=BMI1), "a", combo(BMI1, "6.1")).level
    level = pooling.stale(level, "b").level
    plan = plans.plan(level, Fence(offers(SMEP)), [holding("x", BMI1)])
    assert (plan.kind, plan.gained, plan.lost) == (plans.MIXED, ("smep",), ("bmi1",))
    assert {(one.feature, one.missing_on) for one in plan.blockers} == {("smep", "host b")}
    assert plan.left == (("sha256:6.1", "6.1"),)
    assert plan.missing == (("b", "it was not measured since it last started"),)
    assert [one.holding.vm for one in plan.above] == ["x"]


@pytest.mark.parametrize(("bits", "kind"), [(BMI1, "none"), (0, "lower"), (BMI1 | SMEP, "raise")])
def test_the_kind_of_a_plan(bits: int, kind: str) -> None:
    assert plans.plan(pinned(BMI1, a=ALL), Fence(offers(bits)), []).kind == kind


def _order(found: list[Above]) -> list[str]:
    return [one.holding.vm for one in plans.in_order(found)]


def test_the_order_of_an_emergency() -> None:
    guests = [
        holding("saved", ALL, leases.SAVED),
        holding("asleep", ALL, leases.SUSPENDED),
        Holding("pid 7", "", None, leases.UNKNOWN, 0),
        holding("runs-with-one", BMI1 | SMEP),
        holding("runs-with-three", ALL),
        holding("below", BMI1),
        holding("not-started", BMI1 | SMEP, leases.BEGUN),
    ]
    found = leases.above(guests, offers(BMI1))
    assert _order(found) == ["not-started", "runs-with-three", "runs-with-one", "pid 7", "asleep", "saved"]


def test_guests_are_followed_to_the_end() -> None:
    level = Fence(offers(BMI1))
    listed = [one.to_json() for one in leases.above([holding(vm, ALL) for vm in "abc"], level.granted)]
    now = [holding("a", ALL), holding("b", BMI1), holding("d", SMEP)]
    rows = plans.followed(listed, now, level)
    assert [(one.guest["vm"], one.became) for one in rows] == [
        ("a", ""), ("b", plans.REBOOTED), ("c", plans.GONE), ("d", "")
    ]  # fmt: skip
    assert rows[1].to_json()["became"] == "cold-booted"


def test_guests_and_features_are_named_up_to_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "GUESTS_NAMED", 2)
    monkeypatch.setattr(limits, "FEATURES_NAMED", 2)
    guests = [holding(vm, ALL) for vm in "abc"]
    with pytest.raises(GuestsAbove) as caught:
        leases.require_none_above(guests, offers(0))
    fields = caught.value.fields
    assert ([row["vm"] for row in fields["guests"]], fields["count"]) == (["a", "b"], 3)
    assert (fields["guests"][0]["features"], fields["guests"][0]["count"]) == (["bmi1", "bmi2"], 4)
    told = plans.plan(pinned(ALL, a=ALL), Fence(offers(0)), guests).to_json()
    assert ([row["vm"] for row in told["guests"]], told["guestCount"]) == (["a", "b"], 3)


def test_a_user_is_told_of_their_own_guests() -> None:
    guests = [holding("a", ALL), holding("b", ALL)._replace(uid=8)]
    plan = plans.plan(pinned(ALL, a=ALL), Fence(offers(0)), guests)
    assert [row["vm"] for row in plan.to_json(8)["guests"]] == ["b"]
    assert plan.to_json(8)["guestCount"] == 2


def test_two_users_with_a_vm_of_one_name_are_two_guests() -> None:
    level = Fence(offers(BMI1))
    both = [holding("a", ALL), holding("a", ALL)._replace(uid=8)]
    listed = [one.to_json() for one in leases.above(both, level.granted)]
    rows = plans.followed(listed, both[1:], level)
    assert [(one.guest["uid"], one.became) for one in rows] == [(7, plans.GONE), (8, "")]


def test_two_holders_of_one_guest_are_both_waited_for() -> None:
    """During a hand-over a guest is with two VMMs: it is through when both hold no more than the level."""
    level = Fence(offers(BMI1))
    listed = [one.to_json() for one in leases.above([holding("a", ALL)], level.granted)]
    rows = plans.followed(listed, [holding("a", ALL), holding("a", BMI1)], level)
    assert [one.became for one in rows] == [""]
