# SPDX-License-Identifier: LGPL-2.1-or-later
"""The error family: one exit code and one name on the wire each, and nothing lost on the way."""

from __future__ import annotations

import errno
import json

import pytest

from kvmneg import client, errors
from kvmneg.features.difference import Blocker

# kvmneg(1), "EXIT STATUS": 0 yes, 1 no, 2 usage, 3 no usable KVM, 4 daemon not reachable, 5 bad input file,
# 6 not permitted, 7 store or KVM fault, 70 internal error.
EXIT = {
    "KvmnegError": 70, "UsageError": 2, "LimitExceeded": 2, "Blocked": 1, "Breached": 1, "Incompatible": 1,
    "StaleOffer": 1, "NoSuchContract": 1, "GenerationMismatch": 1, "NotPinned": 1, "NoKvm": 3, "Unreachable": 4,
    "BadInput": 5, "NotPermitted": 6, "KvmFault": 7, "StoreError": 7,
}  # fmt: skip
BLOCKER = Blocker("avx2", "cpuid:0x7.0.ebx", 5, "x86-64-v3", "host node7", "kvm", "KVM does not offer it")


def test_each_error_has_its_exit_code_and_its_own_name() -> None:
    found = {error.__name__: error.exit_code for error in errors.family()}
    assert {name: found.get(name) for name in EXIT} == EXIT
    assert len({error.varlink for error in errors.family()}) == len(errors.family())
    assert all(error.varlink.startswith("org.kvmneg.") for error in errors.family())
    assert all(error.__doc__ for error in errors.family())


def examples() -> list[errors.KvmnegError]:
    return [
        errors.UsageError("no feature is called 'avx3'", hint="did you mean avx2?", feature="avx3"),
        errors.LimitExceeded("REQUEST_FEATURES", 1024),
        errors.Blocked("1 feature is missing", [BLOCKER]),
        errors.Breached("below the fence", [BLOCKER, BLOCKER._replace(bit=None)], hint="lower it"),
        errors.Incompatible("no baseline", []),
        errors.StaleOffer("moved on", generation=7),
        errors.BadInput("not JSON", file="a.json", line=3),
        errors.KvmFault("KVM_GET_MSRS", errno.EFAULT, "CPU 3"),
        errors.NotPermitted("root only"),
    ]


@pytest.mark.parametrize("error", examples(), ids=lambda error: type(error).__name__)
def test_the_client_gets_what_the_daemon_raised(error: errors.KvmnegError) -> None:
    sent = json.loads(json.dumps(error.parameters()))
    received = client._of_family(error.varlink, sent)
    assert type(received) is type(error)
    assert (received.message, received.hint, received.fields) == (error.message, error.hint, error.fields)
    assert received.exit_code == error.exit_code
    if isinstance(error, errors.Blocked):
        assert isinstance(received, errors.Blocked)
        assert received.blockers == error.blockers


def test_an_error_of_a_newer_daemon_is_internal_and_keeps_its_name() -> None:
    received = client._of_family("org.kvmneg.Unheard", {})
    assert type(received) is errors.KvmnegError
    assert received.message == "org.kvmneg.Unheard"


def test_messages() -> None:
    assert str(errors.UsageError("wrong", hint="do this")) == "wrong\n  do this"
    assert str(errors.BadInput("wrong", file="a", line=2)) == "a:2: wrong"
    assert str(errors.BadInput("wrong", file="a")) == "a: wrong"
    assert str(errors.BadInput("wrong")) == "wrong"
    fault = errors.KvmFault("KVM_CREATE_VM", errno.EBUSY)
    assert "KVM_CREATE_VM failed" in fault.message and f"errno {errno.EBUSY}" in fault.message
    assert fault.parameters()["errno"] == errno.EBUSY


def test_a_blocker_reads_back_from_both_forms() -> None:
    assert Blocker.from_json(BLOCKER.to_json()) == BLOCKER
    assert Blocker.from_json(BLOCKER.to_varlink()) == BLOCKER
    assert set(BLOCKER.to_varlink()) == {
        "feature",
        "word",
        "bit",
        "wantedBy",
        "missingOn",
        "cause",
        "because",
    }
    assert set(BLOCKER.to_json()) == set(Blocker._fields)
    number = BLOCKER._replace(bit=None)
    assert Blocker.from_json(number.to_json()) == number
    assert Blocker.from_json(BLOCKER._replace(bit=0).to_json()).bit == 0
    assert Blocker.from_json({}) == Blocker("", "", None, "", "", "", "")


def test_a_blocker_in_one_line() -> None:
    line = BLOCKER.describe()
    assert "avx2 (cpuid:0x7.0.ebx bit 5)" in line and "x86-64-v3" in line and line.endswith("[kvm]")
    assert (
        "cpuid:0x0.0.ebx"
        in BLOCKER._replace(feature="cpuid:0x0.0.ebx", word="cpuid:0x0.0.ebx", bit=None).describe()
    )
