# SPDX-License-Identifier: LGPL-2.1-or-later
"""libkvmneg-client with a real kvmnegd: the same answers, bytes and refusals as the Python client's."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.errors import Blocked, KvmnegError
from kvmneg.features.difference import Blocker
from kvmneg.features.featureset import FeatureSet
from kvmneg.policy.contract import Contract

if TYPE_CHECKING:
    from collections.abc import Callable

    from .conftest import Daemon

VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
OTHER_VM = "7c9a2d10-0f4e-4d8b-9a6e-2b1f3c4d5e6f"
NONE = "sha256:" + "0" * 64
REQUESTS = (
    {"level": "x86-64-v2"},
    {"max": True, "optional": None},
    {"level": "x86-64-v1", "optional": ["avx512f", "aes", "amx-tile"]},
)


def parameters(request: dict[str, Any]) -> str:
    return json.dumps({"request": request})


@pytest.mark.parametrize("request_", REQUESTS)
def test_both_clients_get_the_same(
    daemon: Daemon, c_client: Callable[..., dict[str, str]], request_: dict[str, Any]
) -> None:
    """The reply as a whole, the fields that C has taken out of it, and the contract's file."""
    with daemon.client() as client:
        offer = client.negotiate(request_)
        given = c_client(daemon.socket, "negotiate", parameters(request_))
        assert given["r"] == "0"
        assert json.loads(given["reply"]) == {"parameters": offer}
        assert (given["digest"], given["generation"]) == (offer["digest"], str(offer["generation"]))
        assert given["scope"].splitlines() == offer["scope"]
        assert int(given["not_granted_count"]) == len(offer["notGranted"])
        told = [Blocker.from_json(row).describe() for row in offer["notGranted"]]
        assert given["not_granted"].splitlines() == told
        grant = c_client(daemon.socket, "begin", given["digest"], VM)
        assert client.begin(offer["digest"], VM)["path"] == grant["path"]
    file = Path(grant["path"]).read_bytes()
    assert file == Contract.from_json(offer["contract"]).binary() == bytes.fromhex(grant["contract"])


@pytest.mark.parametrize("request_", REQUESTS)
def test_an_offer_of_its_digest_alone(
    daemon: Daemon, c_client: Callable[..., dict[str, str]], request_: dict[str, Any]
) -> None:
    """The same answer without the contract; what Begin grants by it is the contract all the same."""
    with daemon.client() as client:
        offer = client.negotiate(request_)
        binary = Contract.from_json(offer.pop("contract")).binary()
        assert client.negotiate(request_, digest_only=True) == offer
        given = c_client(daemon.socket, "negotiate", json.dumps({"request": request_, "digestOnly": True}))
        assert (given["r"], json.loads(given["reply"])) == ("0", {"parameters": offer})
        grant = c_client(daemon.socket, "begin", given["digest"], VM)
    assert bytes.fromhex(grant["contract"]) == binary


def test_the_life_of_a_contract(daemon: Daemon, c_client: Callable[..., dict[str, str]]) -> None:
    given = c_client(daemon.socket, "negotiate", parameters({"level": "x86-64-v2"}))
    assert c_client(daemon.socket, "begin", given["digest"], VM)["r"] == "0"
    assert c_client(daemon.socket, "started", VM)["r"] == "0"
    with daemon.client() as client:
        assert client.get_contract(given["digest"])["state"] == "granted"
        assert c_client(daemon.socket, "end", VM)["r"] == "0"
        assert client.get_contract(given["digest"])["path"] is None  # nobody holds it any more


def test_a_process_keeps_it(daemon: Daemon, c_client: Callable[..., dict[str, str]]) -> None:
    given = c_client(daemon.socket, "negotiate", parameters({"level": "x86-64-v2"}))
    begun = c_client(daemon.socket, "begin", given["digest"], VM, str(os.getpid()))
    assert begun["r"] == "0", begun
    with daemon.client() as client:
        (guest,) = client.guests_list()["guests"]
    assert guest["holders"] == [{"pid": os.getpid(), "by": "process"}]


def test_another_process_takes_it_over(daemon: Daemon, c_client: Callable[..., dict[str, str]]) -> None:
    """By a method that the library has no function of its own for."""
    given = c_client(daemon.socket, "negotiate", parameters({"level": "x86-64-v2"}))
    assert c_client(daemon.socket, "begin", given["digest"], VM, str(os.getpid()))["r"] == "0"
    assert c_client(daemon.socket, "started", VM)["r"] == "0"
    with subprocess.Popen(["sleep", "60"]) as heir:
        try:
            asked = json.dumps({"vm": VM, "pid": heir.pid})
            taken = c_client(daemon.socket, "call", "org.kvmneg.Guests.Handover", asked)
            assert (taken["r"], json.loads(taken["reply"])["parameters"]) == ("0", {"incarnation": 1})
            listed = c_client(daemon.socket, "call", "org.kvmneg.Guests.List", "-")
            (guest,) = json.loads(listed["reply"])["parameters"]["guests"]
            assert {holder["pid"] for holder in guest["holders"]} == {os.getpid(), heir.pid}
        finally:
            heir.terminate()


def test_a_guest_that_comes_from_elsewhere(
    daemon: Daemon, c_client: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    """It keeps its own contract, also one that is never offered here to a new guest; what cannot be is named."""
    path = tmp_path / "contract"
    with daemon.client() as client:
        offer = client.negotiate({"max": True})
        contract = Contract.from_json(offer["contract"])
        path.write_bytes(contract.binary())
        given = c_client(daemon.socket, "receive", str(path), VM, "-", str(os.getpid()))
        assert (given["r"], given["digest"]) == ("0", contract.digest)
        assert bytes.fromhex(given["contract"]) == contract.binary()
        assert client.guests_receive(contract.binary(), VM)["path"] == given["path"]
        (guest,) = client.guests_list()["guests"]
        assert (guest["digest"], guest["state"]) == (contract.digest, "begun")
        assert guest["holders"] == [{"pid": os.getpid(), "by": "process"}]
        assert c_client(daemon.socket, "started", VM)["r"] == "0"
        more = {**contract.granted.words, "cpuid:0x7.0.ecx": 1 << 28}  # movdir64b
        elsewhere = Contract(FeatureSet.of(contract.architecture, more))
        with pytest.raises(Blocked) as blocked:
            client.guests_receive(elsewhere.binary(), OTHER_VM)
    path.write_bytes(elsewhere.binary())
    given = c_client(daemon.socket, "receive", str(path), OTHER_VM)
    assert (given["r"], given["name"]) == (str(-errno.EREMOTEIO), Blocked.varlink)
    assert given["blockers"].splitlines() == [blocker.describe() for blocker in blocked.value.blockers]
    assert "movdir64b" in given["blockers"]


def test_blockers(daemon: Daemon, c_client: Callable[..., dict[str, str]]) -> None:
    request = {"level": "x86-64-v2", "require": ["erms", "movdir64b", "sgx"]}
    with daemon.client() as client, pytest.raises(Blocked) as blocked:
        client.negotiate(request)
    given = c_client(daemon.socket, "negotiate", parameters(request))
    assert (given["r"], given["name"]) == (str(-errno.EREMOTEIO), Blocked.varlink)
    assert (given["message"], given["hint"]) == (blocked.value.message, blocked.value.hint)
    assert given["blockers"].splitlines() == [blocker.describe() for blocker in blocked.value.blockers]
    assert int(given["blocker_count"]) == len(blocked.value.blockers) > 0


@pytest.mark.parametrize(
    ("arguments", "python"),
    [
        (("negotiate", "{}"), ("Negotiate", {})),
        (("negotiate", '{"request":{"level":"none"}}'), ("Negotiate", {"request": {"level": "none"}})),
        (("negotiate", '{"request":{},"more":1}'), ("Negotiate", {"request": {}, "more": 1})),
        (("begin", NONE, VM), ("Begin", {"digest": NONE, "vm": VM})),
        (("begin", "x", "y"), ("Begin", {"digest": "x", "vm": "y"})),
        (("started", VM), ("Started", {"vm": VM})),
        (("end", VM), ("End", {"vm": VM})),
    ],
)
def test_refusals(
    daemon: Daemon,
    c_client: Callable[..., dict[str, str]],
    arguments: tuple[str, ...],
    python: tuple[str, dict[str, Any]],
) -> None:
    """The same error, by its name on the wire, that Python raises as a class."""
    method, asked = python
    with daemon.client() as client, pytest.raises(KvmnegError) as error:
        client.call(f"org.kvmneg.{method}", asked)
    given = c_client(daemon.socket, *arguments)
    assert given["r"] == str(-errno.EREMOTEIO)
    # of an error that is any varlink service's, Python keeps the name in a field
    assert given["name"] == error.value.fields.get("varlink", error.value.varlink)
    if not given["name"].startswith("org.varlink.service."):
        assert (given["message"], given["hint"]) == (error.value.message, error.value.hint)


def test_what_json_has_not_is_no_call(daemon: Daemon, c_client: Callable[..., dict[str, str]]) -> None:
    """json-c takes NaN; the daemon takes no such call, and closes."""
    given = c_client(daemon.socket, "negotiate", '{"request":{"level":NaN}}')
    assert given["r"] == str(-errno.ECONNRESET)
