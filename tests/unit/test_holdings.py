# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which guests stand above a level."""

from __future__ import annotations

import pytest

from kvmneg.errors import GuestsAbove
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.words import X86_64
from kvmneg.policy.leases import Holding, above, require_none_above

_WORD = "cpuid:0x7.0.ebx"
_FSGSBASE, _BMI1, _SMEP = 1 << 0, 1 << 3, 1 << 7


def _set(bits: int, **more: int) -> FeatureSet:
    return FeatureSet.of(X86_64, {_WORD: bits, **more})


def _holding(vm: str, granted: FeatureSet | None) -> Holding:
    return Holding(vm, "sha256:…", granted, "running", 7)


def test_what_a_guest_has_more_is_named() -> None:
    level = _set(_FSGSBASE | _BMI1)
    found = above([_holding("a", _set(_FSGSBASE)), _holding("b", _set(_BMI1 | _SMEP))], level)
    assert [one.to_json() for one in found] == [
        {
            "vm": "b",
            "digest": "sha256:…",
            "state": "running",
            "uid": 7,
            "features": ["smep"],
            "count": 1,
            "known": True,
        }
    ]


def test_a_guest_nobody_knows_is_above_every_level() -> None:
    (found,) = above([_holding("a", None)], _set(0xFFFF_FFFF))
    assert found.to_json()["known"] is False


def test_a_level_without_a_vendor_holds_for_any() -> None:
    vendor = {"cpuid:0x0.0.ebx": 0x756E6547}
    guest = FeatureSet.of(X86_64, {_WORD: _BMI1, **vendor})
    assert above([_holding("a", guest)], _set(_BMI1)) == []
    other = FeatureSet.of(X86_64, {_WORD: _BMI1, "cpuid:0x0.0.ebx": 0x68747541})
    assert [one.holding.vm for one in above([_holding("a", guest)], other)] == ["a"]


def test_a_guest_that_was_not_told_of_a_risk_is_above_a_level_that_tells() -> None:
    told, untold = (FeatureSet.of(X86_64, {_WORD: bits}) for bits in (_BMI1 | 1 << 6, _BMI1))
    assert above([_holding("a", told)], untold) == []  # fdp-excptn-only
    assert [one.holding.vm for one in above([_holding("a", untold)], told)] == ["a"]


def test_a_uuid_of_two_users_names_neither() -> None:
    """Any user may take another's UUID: who is passed over by it is not who was meant."""
    level, high = _set(0), _set(_SMEP)
    both = [_holding("a", high), _holding("a", high)._replace(uid=8), _holding("B", high)]
    assert require_none_above(both[::2], level, ["A", "b"]) == ["B", "a"]
    with pytest.raises(GuestsAbove, match="a/7, a/8"):
        require_none_above(both, level, ["a", "b"])
    assert require_none_above(both, level, ["a/7", "a/8", "b"]) == ["B", "a/7", "a/8"]
