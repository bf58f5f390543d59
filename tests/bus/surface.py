# SPDX-License-Identifier: LGPL-2.1-or-later
"""What org.kvmneg1 is on any bus, as busctl(1) sees it: on a private one here, on a system's in its containers.

Each check takes `run`, which runs busctl with the given words on the bus that is meant; nothing but the standard
library is needed beside it.
"""

from __future__ import annotations

import json
import subprocess
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

if TYPE_CHECKING:
    from collections.abc import Callable

    Run = Callable[..., subprocess.CompletedProcess[str]]

OBJECT = ("org.kvmneg1", "/org/kvmneg1")


def call(run: Run, interface: str, method: str, *words: str) -> list[Any]:
    """What a method returns. Raises AssertionError with what busctl says."""
    done = run("--json=short", "call", *OBJECT, interface, method, *words)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["data"] if done.stdout.strip() else []  # type: ignore[no-any-return]


def refused(run: Run, interface: str, method: str, *words: str) -> str:
    """What a caller is told that is refused."""
    done = run("call", *OBJECT, interface, method, *words)
    assert done.returncode != 0, f"{method} was done: {done.stdout}"
    return done.stderr


def properties(run: Run) -> dict[str, Any]:
    names = ("Generation", "FenceDigest", "State", "Host")
    done = run("--json=short", "get-property", *OBJECT, "org.kvmneg1", *names)
    assert done.returncode == 0, done.stderr
    return dict(zip(names, (json.loads(line)["data"] for line in done.stdout.splitlines()), strict=True))


def shape(xml: str) -> dict[str, dict[str, Any]]:
    """Interface → member → what it takes and gives, of an introspection document; of ours."""
    found: dict[str, dict[str, Any]] = {}
    for interface in ElementTree.fromstring(xml).iter("interface"):
        name = interface.get("name", "")
        if not name.startswith("org.kvmneg1"):
            continue
        members = found.setdefault(name, {})
        for member in interface:
            if member.tag == "annotation":
                continue
            arguments = [
                (one.get("direction", "out"), one.get("name"), one.get("type")) for one in member.iter("arg")
            ]
            notes = {one.get("name"): one.get("value") for one in member.iter("annotation")}
            access = (member.get("type"), member.get("access")) if member.tag == "property" else None
            members[f"{member.tag} {member.get('name')}"] = (arguments, access, notes)
    return found


def check_introspection(run: Run, xml: str) -> None:
    """The service describes itself as its file does."""
    done = run("--xml-interface", "introspect", *OBJECT)
    assert done.returncode == 0, done.stderr
    assert shape(done.stdout) == shape(xml)


def check_reading(run: Run) -> None:
    """What everybody may do."""
    host, generation, state, _ = call(run, "org.kvmneg1", "GetHost")
    report = json.loads(host)
    assert report["format"] == "kvmneg.report/1"
    told = properties(run)
    assert (told["Generation"], told["State"]) == (generation, state)
    request = json.dumps({"level": "x86-64-v1"} if report["architecture"] == "x86_64" else {"max": True})
    contract, digest, _, _, scope = call(run, "org.kvmneg1", "Negotiate", "sa{sv}", request, "0")
    assert json.loads(contract)["format"] == "kvmneg.contract/1" and digest.startswith("sha256:") and scope
    assert call(run, "org.kvmneg1", "GetContract", "s", digest)[2] == "offered"
    assert call(run, "org.kvmneg1.Guests", "List", "a{sv}", "0")[0] == "[]"
    assert json.loads(call(run, "org.kvmneg1.Rollback", "History", "a{sv}", "0")[0])[0]["running"] is True


def check_pinning(run: Run) -> None:
    """What an admin may do: up, and down again. Leaves no fence."""
    before = properties(run)
    generation, digest, text = call(
        run, "org.kvmneg1.Fence", "Pin", "sa{sv}", "a check", "1", "from", "s", "host"
    )
    assert properties(run) == {
        **before, "Generation": generation, "FenceDigest": digest, "State": "pinned",
    }  # fmt: skip
    assert call(run, "org.kvmneg1.Fence", "Get")[:4] == [True, generation, digest, text]
    wrong = ("sa{sv}", "a check", "1", "expectedGeneration", "t", str(generation + 5))
    assert "generation" in refused(run, "org.kvmneg1.Fence", "Unpin", *wrong)
    right = ("sa{sv}", "a check", "1", "expectedGeneration", "t", str(generation))
    assert call(run, "org.kvmneg1.Fence", "Unpin", *right) == [generation + 1]
    assert properties(run) == {**before, "Generation": generation + 1, "FenceDigest": ""}


def check_refusal(run: Run) -> None:
    """What nobody may do whom polkit does not permit it; it says so, and changes nothing."""
    before = properties(run)
    told = refused(run, "org.kvmneg1.Fence", "Pin", "sa{sv}", "not mine", "1", "from", "s", "host")
    assert "may not pin a fence" in told
    assert properties(run) == before


def signals(lines: list[str]) -> list[tuple[str, list[Any]]]:
    """(member, arguments) of our signals among what `busctl monitor --json=short` told."""
    found = []
    for line in lines:
        message = json.loads(line)
        if message.get("type") == "signal" and message.get("path") == OBJECT[1]:
            found.append((message["member"], message["payload"]["data"]))
    return found
