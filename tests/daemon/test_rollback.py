# SPDX-License-Identifier: LGPL-2.1-or-later
"""Going back, asked of a real daemon that served one host under two kernels."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import cli, limits
from kvmneg.errors import Blocked, LimitExceeded, UsageError
from kvmneg.features.report import Report
from kvmneg.policy import rollback

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvmneg.client import Client

HOSTS = Path(__file__).parents[1] / "data/hosts"
KINDS = {"amd": ("amd-6.1.max", "amd-6.12.max"), "arm64": ("arm64-6.1.neoverse-n1", "arm64-6.12.neoverse-n1")}


def load(name: str) -> Report:
    return Report.loads((HOSTS / f"{name}.json").read_bytes())


class Host:
    """A daemon that served the old kernel's report, then runs on the new one's."""

    def __init__(self, make_daemon: Callable[..., Any], kind: str) -> None:
        self.names = KINDS[kind]
        self.old, self.new = map(load, self.names)
        self.make = make_daemon
        self.boot(0)
        self.boot(1)

    def boot(self, place: int) -> None:
        """End the daemon that runs, and start one under that kernel."""
        if hasattr(self, "daemon"):
            assert self.daemon.end() == 0
        self.daemon = self.make("--report", str(HOSTS / f"{self.names[place]}.json")).start()

    def client(self) -> Client:
        found: Client = self.daemon.client()
        return found

    def start(self, client: Client, vm: str, **request: Any) -> str:
        """A guest that runs; its contract's digest."""
        digest = str(client.negotiate(request or {"max": True})["digest"])
        client.begin(digest, vm)
        client.started(vm)
        return digest

    def run(self, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
        capsys.readouterr()
        status = cli.main(["--socket", self.daemon.socket, *words])
        told = capsys.readouterr()
        return status, told.out + told.err


@pytest.fixture(params=list(KINDS))
def booted(request: pytest.FixtureRequest, make_daemon: Callable[..., Any]) -> Host:
    return Host(make_daemon, request.param)


@pytest.fixture
def amd(make_daemon: Callable[..., Any]) -> Host:
    return Host(make_daemon, "amd")


def vm() -> str:
    return str(uuid.uuid4())


def test_the_history_has_both(booted: Host) -> None:
    with booted.client() as client:
        new, old = client.rollback_history()["entries"]
        assert [one["combo"] for one in (new, old)] == [booted.new.combo_digest(), booted.old.combo_digest()]
        assert (new["running"], old["running"]) == (True, False)
        assert old["kernel"] == booted.old.combo["kernel"]
        assert client.rollback_history(1)["entries"] == [new]
        for row, measured in ((new, booted.new), (old, booted.old)):
            found = client.rollback_get_report(row["combo"])
            assert Report.from_json(found["report"]).canonical() == measured.canonical()
        assert client.rollback_get_report("running")["combo"] == new["combo"]
        assert client.rollback_get_report(old["combo"][7:15])["combo"] == old["combo"]
        with pytest.raises(LimitExceeded, match="COMBO_ROWS"):
            client.rollback_history(limits.COMBO_ROWS + 1)
        for text in ("ab", "no digest", "0" * 64):
            with pytest.raises(UsageError):
                client.rollback_get_report(text)


def test_before_the_fence_there_is_no_way_back(booted: Host) -> None:
    """A guest that was started on the new kernel holds what the old one does not know; the refusal names it."""
    kernel, one = booted.old.combo["kernel"], vm()
    with booted.client() as client:
        empty = client.rollback_check(kernel=kernel)
        assert empty["allowed"] and empty["combo"] == booted.old.combo_digest()
        client.fence_unpin("let the new kernel's features in")  # it floated where the old kernel was
        empty = client.rollback_check(kernel=kernel)
        assert empty["allowed"]
        assert any("no fence is pinned, and the next may hold more" in line for line in empty["scope"])
        digest = booted.start(client, one)
        answer = client.rollback_check(kernel=kernel)
        assert not answer["allowed"] and answer["measured"] and answer["blockers"] == []
        (held,) = answer["guests"]
        assert (held["digest"], held["count"], held["vms"]) == (digest, 1, [one])
        assert held["blockers"]
        client.end(one)
        assert client.rollback_check(kernel=kernel)["allowed"]


def test_once_the_fence_is_pinned_both_ways_are_open(booted: Host) -> None:
    fence = rollback.judge(booted.new, booted.old).fence
    assert fence is not None
    one, old = vm(), booted.old.combo_digest()
    with booted.client() as client:
        client.fence_pin(text=fence.text(), reason="the way back")
        assert client.rollback_add(old, "until 6.12 has proven itself") == {"combo": old, "changed": True}
        assert client.rollback_add(old, "again")["changed"] is False
        booted.start(client, one)
        answer = client.rollback_check(old)
        assert answer["allowed"] and answer["guests"] == [] and answer["blockers"] == []
        assert "kernel" in {row["dimension"] for row in answer["changes"]}
        assert {line.partition(":")[0] for line in answer["scope"]} >= {"judged", "not judged"}
        (member,) = client.rollback_list()["entries"]
        assert member["allowed"] and member["combo"]["combo"] == old
        assert (member["lacking"], member["guests"]) == (0, 0)
    booted.boot(0)  # and back it goes: the fence holds there, and forward is open too
    with booted.client() as client:
        assert client.get_host()["state"] == "pinned"
        assert client.rollback_check(booted.new.combo_digest())["allowed"]
        assert client.rollback_remove(old, "done")["changed"] is True
        assert client.rollback_remove(old, "done")["changed"] is False
        assert client.rollback_list()["entries"] == []


def test_a_level_that_floats_stays_within_the_roll_back_set(amd: Host) -> None:
    """Without a fence too: what is in the set bounds new guests, so that they can go back."""
    old = amd.old.combo_digest()
    with amd.client() as client:
        client.fence_unpin("let the new kernel's features in")
        assert client.rollback_add(old, "stay able to go back")["changed"]
        amd.start(client, vm())
        answer = client.rollback_check(old)
        assert answer["allowed"], answer
        assert any("it floats within that combo" in line for line in answer["scope"])


def test_a_combo_below_the_fence_is_refused_with_a_plan(booted: Host) -> None:
    old = booted.old.combo_digest()
    with booted.client() as client:
        with pytest.raises(UsageError, match="no fence is pinned"):
            client.rollback_plan(old)
        client.fence_pin(source="host", reason="all of the new kernel")
        assert client.rollback_check(old)["blockers"]
        with pytest.raises(Blocked) as no:
            client.rollback_add(old, "too late")
        assert "fence lower" in no.value.hint
        plan = client.rollback_plan(old)
        assert plan["take"] == list(dict.fromkeys(blocker.feature for blocker in no.value.blockers))
        assert client.rollback_list()["entries"] == []
        if plan["text"] is None:
            assert plan["blockers"]
            return
        client.fence_pin(text=plan["text"], reason="as planned")
        assert client.rollback_plan(old)["take"] == []
        assert client.rollback_add(old, "now it holds")["changed"]


def test_the_plan_of_x86_is_a_fence(amd: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """`add --plan` prints the fence alone on standard output: it can be pinned as it is."""
    old = amd.old.combo_digest()
    assert amd.run(capsys, "fence", "pin", "--from", "host", "--reason", "x")[0] == 0
    status, told = amd.run(capsys, "rollback", "add", old, "--reason", "y")
    assert status == 1 and "flushbyasid" in told
    capsys.readouterr()
    assert cli.main(["--socket", amd.daemon.socket, "rollback", "add", old, "--plan"]) == 0
    printed = capsys.readouterr()
    assert "flushbyasid" in printed.err
    low = tmp_path / "low.fence"
    low.write_text(printed.out, "utf-8")
    assert amd.run(capsys, "fence", "pin", "--from", str(low), "--reason", "z")[0] == 0
    assert amd.run(capsys, "rollback", "add", old, "--reason", "y")[0] == 0


def test_what_was_never_measured_is_refused(booted: Host) -> None:
    with booted.client() as client:
        answer = client.rollback_check(kernel="5.4.0-1")
        assert (answer["allowed"], answer["measured"], answer["combo"]) == (False, False, None)
        assert "CANDIDATE" in answer["how"] and answer["prediction"] is None
        assert "kernel" in {row["dimension"] for row in answer["differs"]}
        told = client.rollback_check(kernel="6.1.0-1", predict=True)
        assert not told["allowed"] and told["prediction"]["label"].startswith("PREDICTION")
        assert told["prediction"]["source"]


def test_an_old_kernel_with_a_new_input_is_not_the_old_combo(booted: Host) -> None:
    kernel = booted.old.combo["kernel"]
    with booted.client() as client:
        answer = client.rollback_check(kernel=kernel, dimensions={"cmdline": "quiet nosmt"})
        assert not answer["allowed"] and answer["nearest"] == booted.old.combo_digest()
        assert [row["dimension"] for row in answer["differs"]] == ["cmdline"]
        answer = client.rollback_check(kernel=kernel, vmm="qemu-7.2")
        assert [row["dimension"] for row in answer["differs"]] == ["vmms.qemu.version"]


def test_questions_that_make_no_sense(amd: Host) -> None:
    old, kernel = amd.old.combo_digest(), amd.old.combo["kernel"]
    with amd.client() as client:
        for asked in ({}, {"vmm": "qemu"}, {"dimensions": {"no such": "x"}}, {"vmm": "qemu-ten"}):
            with pytest.raises(UsageError):
                client.rollback_check(**asked)
        with pytest.raises(UsageError, match="either"):
            client.rollback_check(old, kernel=kernel)
        with pytest.raises(UsageError, match="bhyve"):
            client.rollback_check(old, vmm="bhyve")
        with pytest.raises(UsageError, match="reason"):
            client.rollback_add(old, " ")
        many = {f"modules.kvm.p{n}": "1" for n in range(limits.ROLLBACK_DIMENSIONS + 1)}
        with pytest.raises(LimitExceeded, match="ROLLBACK_DIMENSIONS"):
            client.rollback_check(dimensions=many)


# -- the command line -----------------------------------------------------------------------------------


def test_the_commands(amd: Host, capsys: pytest.CaptureFixture[str]) -> None:
    old, new, kernel = amd.old.combo_digest(), amd.new.combo_digest(), amd.old.combo["kernel"]
    status, told = amd.run(capsys, "history")
    assert status == 0 and "running" in told and old[7:19] in told and kernel in told
    assert len(json.loads(amd.run(capsys, "--json", "history", "--limit", "1")[1])["entries"]) == 1
    status, told = amd.run(capsys, "diff", old[7:19], "running")
    assert status == 1 and "flushbyasid" in told and "modules.kvm_amd.vnmi" in told
    assert amd.run(capsys, "diff", new, "running")[0] == 0
    status, told = amd.run(capsys, "rollback", "check")
    assert status == 2 and "empty" in told
    status, told = amd.run(capsys, "rollback", "check", "--kernel", kernel)
    assert status == 0 and "as recorded" in told and "not judged" in told
    one = vm()
    with amd.client() as client:
        client.fence_unpin("let the new kernel's features in")
        amd.start(client, one)
    status, told = amd.run(capsys, "rollback", "check", "--to", old[:20])
    assert status == 1 and one in told and "flushbyasid" in told
    status, told = amd.run(capsys, "--json", "rollback", "check", "--to", old)
    document = json.loads(told)
    assert status == 1 and document["error"]["name"] == "org.kvmneg.Blocked"
    assert document["guests"][0]["vms"] == [one] and document["allowed"] is False
    status, told = amd.run(capsys, "rollback", "check", "--kernel", "5.10.1", "--predict")
    assert status == 1 and "PREDICTION" in told and "how to measure it" in told
    assert amd.run(capsys, "rollback", "add", old, "--reason", "r")[0] == 0
    status, told = amd.run(capsys, "rollback", "check")
    assert status == 1 and "does not accept 1 guest" in told
    status, told = amd.run(capsys, "rollback", "list")
    assert status == 0 and kernel in told
    assert amd.run(capsys, "rollback", "remove", old)[0] == 2  # a reason is needed
    assert amd.run(capsys, "rollback", "remove", old, "--reason", "r")[0] == 0
    assert "empty" in amd.run(capsys, "rollback", "list")[1]
    for words in (("--from", "x", "--kernel", "y"), ("--from", "x"), ("--fence",), ("--set", "x")):
        assert amd.run(capsys, "rollback", "check", *words)[0] == 2, words


def test_moving_to_another_daemon(amd: Host, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The guest's contract against another host's report, or its daemon with the fence that is pinned there."""
    fence = rollback.judge(amd.new, amd.old).fence
    assert fence is not None
    with amd.client() as client:
        client.fence_unpin("let the new kernel's features in")
        one = vm()
        high = amd.start(client, one)
        client.end(one)
        client.fence_pin(text=fence.text(), reason="r")
        running = vm()
        within = amd.start(client, running)
    old = str(HOSTS / "amd-6.1.max.json")
    status, told = amd.run(capsys, "migrate", "check", high, "--to", old)
    assert status == 1 and "flushbyasid" in told
    for guest in (within, running, running.upper()):
        assert amd.run(capsys, "migrate", "check", guest, "--to", old)[0] == 0
    status, told = amd.run(capsys, "migrate", "check", one, "--to", old)
    assert status == 2 and "holds no contract" in told
    status, told = amd.run(capsys, "migrate", "check", high, "--to", amd.daemon.socket)
    assert status == 0 and "an island" in told and "fence generation 2" in told
    status, told = amd.run(capsys, "--json", "migrate", "check", within, "--to", amd.daemon.socket)
    assert status == 0 and json.loads(told)["island"] is None
    assert amd.run(capsys, "migrate", "check", old, "--to", old)[0] == 5
    assert amd.run(capsys, "migrate", "check", "0" * 64, "--to", old)[0] == 1


def test_an_island_on_a_host_that_floats_low_is_not_ruled_out(
    amd: Host, capsys: pytest.CaptureFixture[str]
) -> None:
    """It offers more than its new guests get, and a fence there is none to hold the guest against."""
    with amd.client() as client:
        assert client.fence_get()["heldBack"]
        guest = vm()
        amd.start(client, guest)
    status, told = amd.run(capsys, "migrate", "check", guest, "--to", amd.daemon.socket)
    assert status == 0
    assert "not judged whether the guest is an island there" in " ".join(told.split())
