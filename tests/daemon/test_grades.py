# SPDX-License-Identifier: LGPL-2.1-or-later
"""Grades on the wire: of a check, of a contract that must be enforced, and of an offer that a host no longer keeps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvmneg.errors import Blocked, StaleOffer
from kvmneg.service.interfaces.kvmneg import Interfaces

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmneg.service.node import Node
    from kvmneg.service.varlink.connection import Connection

    from .conftest import Host

CONNECTION = cast("Connection", SimpleNamespace(peer=SimpleNamespace(uid=1000, pid=7)))
VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
V2 = {"level": "x86-64-v2"}
TRIED = {"kvm:max-vcpus": "untested"}
REPLACED = {**TRIED, "cpuid:0x7.0.ebx": "replaced"}


@pytest.fixture
def call(node: Node) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """call(method, parameters) → what a client is answered by a node that looks at its host each time."""
    handlers = Interfaces(node).handlers()

    def make(method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        node.refresh(fresh=True)
        return handlers[f"org.kvmneg.{method}"](CONNECTION, parameters)

    return make


@pytest.mark.parametrize(
    ("enforcement", "wanted"), [({}, "unverified"), (TRIED, "enforced"), (REPLACED, "partial")]
)
def test_contract_and_check_carry_the_grade(
    call: Callable[..., Any], host: Host, enforcement: dict[str, str], wanted: str
) -> None:
    host.put("enforcement", enforcement)
    answer = call("Negotiate", {"request": V2})
    assert answer["contract"]["grade"] == wanted
    assert call("Check", {"request": V2})["grade"] == wanted
    assert call("Check", {"digest": answer["digest"]})["grade"] == wanted
    assert call("GetHost", {})["host"].get("enforcement", {}) == enforcement


def test_it_must_be_enforced(call: Callable[..., Any], host: Host) -> None:
    wanted = {**V2, "requireEnforced": True}
    host.put("enforcement", TRIED)
    assert call("Negotiate", {"request": wanted})["contract"]["grade"] == "enforced"
    host.put("enforcement", REPLACED)
    with pytest.raises(Blocked) as caught:
        call("Negotiate", {"request": wanted})
    assert [blocker.word for blocker in caught.value.blockers] == ["cpuid:0x7.0.ebx"]
    answer = call("Check", {"request": wanted})
    assert (answer["fits"], answer["grade"]) == (False, None)
    assert [(row["word"], row["cause"]) for row in answer["blockers"]] == [("cpuid:0x7.0.ebx", "kvm")]


def test_an_offer_that_promised_more_than_the_host_keeps_now_is_stale(
    call: Callable[..., Any], host: Host
) -> None:
    host.put("enforcement", TRIED)
    digest = call("Negotiate", {"request": V2})["digest"]
    host.put("enforcement", REPLACED)
    with pytest.raises(StaleOffer):
        call("Begin", {"digest": digest, "vm": VM})
    modest = call("Negotiate", {"request": V2})["digest"]
    host.put("enforcement", TRIED)  # a host that keeps more than was promised is no reason to refuse
    assert call("Begin", {"digest": modest, "vm": VM})["digest"] == modest
