# SPDX-License-Identifier: LGPL-2.1-or-later
"""After a boot, a module's reload, a resume or any changed input nothing is granted that was not measured again.

The inputs lie in a tree of their own, the offer is a recorded host's of which features go. And what a daemon tells.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.errors import Breached, NoKvm
from kvmneg.features.report import Report
from kvmneg.host import volatile
from kvmneg.host.software import Roots
from kvmneg.host.volatile import Volatile
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request
from kvmneg.service import announcing, daemon
from kvmneg.service.leases.contracts import ContractFiles
from kvmneg.service.node import Node
from kvmneg.service.watching import changes
from kvmneg.store.interface import Audit
from kvmneg.store.sqlite import SqliteStore

from .conftest import RECORDED, Host

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

AUDIT = Audit(0, 1, "2026-11-21T06:00:00Z", "first light", "kvmneg")
VM = "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11"
PEER: Any = SimpleNamespace(uid=54321, pid=7, groups=frozenset(), permitted=())
CALLER: Any = SimpleNamespace(peer=PEER, held=False)
HOSTS = Path(__file__).parents[1] / "data/hosts"


def put(tree: Path, path: str, text: str) -> None:
    file = tree / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, "utf-8")


class Watched(Host):
    """A host whose inputs are watched in a tree; what it offers is another thing, which nobody sees by itself."""

    def __init__(self, tree: Path) -> None:
        super().__init__()
        self.inputs = Volatile(
            f"{tree}/dev/kvm", Roots(f"{tree}/sys", f"{tree}/proc", f"{tree}/dev"), lambda _: None
        )

    def measure(self) -> Report:
        self.inputs.mark()
        return super().measure()

    def changed(self, *, fresh: bool = False) -> bool:
        return self.inputs.changed(fresh=fresh)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    found = tmp_path / "tree"
    put(found, "dev/kvm", "")
    put(found, "proc/sys/kernel/random/boot_id", "0b9f3c1e\n")
    put(found, "sys/module/kvm/parameters/ignore_msrs", "N\n")
    put(found, "sys/module/kvm/initstate", "live\n")
    put(found, "sys/devices/system/cpu/smt/control", "on\n")
    return found


@pytest.fixture
def host(tree: Path) -> Watched:
    return Watched(tree)


@pytest.fixture
def node(host: Watched, tmp_path: Path) -> Iterator[Node]:
    with SqliteStore(str(tmp_path / "state"), verify=lambda text: Fence.parse(text).digest) as store:
        yield Node(store, host, ContractFiles(str(tmp_path / "contracts")), daemon._print_trouble)


def reload_module(tree: Path) -> None:
    (tree / "sys/module/kvm").rename(tree / "gone")
    put(tree, "sys/module/kvm/parameters/ignore_msrs", "N\n")
    put(tree, "sys/module/kvm/initstate", "live\n")


INPUTS: dict[str, Callable[[Path], None]] = {
    "boot": lambda tree: put(tree, "proc/sys/kernel/random/boot_id", "5f0b4a49\n"),
    "reload": reload_module,
    "unload": lambda tree: put(tree, "sys/module/kvm/initstate", "going\n"),
    "vendor module": lambda tree: put(tree, "sys/module/kvm_amd/initstate", "live\n"),
    "parameter": lambda tree: put(tree, "sys/module/kvm/parameters/ignore_msrs", "Y\n"),
    "SMT": lambda tree: put(tree, "sys/devices/system/cpu/smt/control", "off\n"),
    "microcode": lambda tree: put(tree, "sys/devices/system/cpu/cpu0/microcode/version", "0x2\n"),
    "live patch": lambda tree: put(tree, "sys/kernel/livepatch/klp/enabled", "1\n"),
}


def resume(monkeypatch: pytest.MonkeyPatch) -> None:
    slept = volatile._slept()
    monkeypatch.setattr(volatile, "_slept", lambda: slept + 3_000_000_000)


@pytest.mark.parametrize("kind", [*INPUTS, "resume"])
def test_nothing_is_granted_until_it_was_measured_again(
    kind: str, node: Node, host: Watched, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    node.pin("host", None, None, AUDIT)
    offer = node.negotiate(Request(maximum=True), PEER).contract
    assert node.state == "pinned"
    measured = host.measured
    host.lose("cpuid:0x7.0.ebx", 1 << 5)  # unseen: no event tells of it
    if kind == "resume":
        resume(monkeypatch)
    else:
        INPUTS[kind](tree)
    with pytest.raises(Breached) as no:
        node.begin(offer.digest, VM, CALLER)
    assert "avx2" in {blocker.feature for blocker in no.value.blockers}
    assert host.measured == measured + 1
    assert node.state == "breached" and node.fence is not None and node.fence.granted.field("avx2")
    assert node.store.leases.outstanding() == []


@pytest.mark.parametrize("kind", INPUTS)
def test_a_host_that_cannot_be_measured_again_grants_nothing(
    kind: str, node: Node, host: Watched, tree: Path
) -> None:
    offer = node.negotiate(Request(maximum=True), PEER).contract
    host.error = NoKvm("kvm_amd is not loaded")
    INPUTS[kind](tree)
    with pytest.raises(NoKvm):
        node.begin(offer.digest, VM, CALLER)
    assert node.state == "unmeasured" and node.store.leases.outstanding() == []


def test_where_nothing_happened_nothing_is_measured(node: Node, host: Watched) -> None:
    offer = node.negotiate(Request(maximum=True), PEER).contract
    measured = host.measured
    node.begin(offer.digest, VM, CALLER)
    assert host.measured == measured


def test_the_combo_before_is_kept(node: Node, host: Watched, tree: Path) -> None:
    first = node.combo_digest
    host.change("combo", "microcode", "0x2")
    INPUTS["microcode"](tree)
    node.refresh(fresh=True)
    assert node.news
    assert [row.digest for row in node.store.rolls.combos(9)] == [node.combo_digest, first]


# -- what is told ---------------------------------------------------------------------------------------


def reports() -> tuple[Report, Report]:
    old, new = (
        Report.loads((HOSTS / f"{name}.json").read_bytes()) for name in ("amd-6.1.max", "amd-6.12.max")
    )
    return old, new


def test_a_change_is_told_by_its_inputs_and_features() -> None:
    old, new = reports()
    inputs, less, besides, other = changes.told(new, old)
    assert "another boot" in inputs and f"kernel {new.combo['kernel']} -> {old.combo['kernel']}" in inputs
    assert less.startswith("it offers no more: ") and "flushbyasid" in less
    assert (
        besides.startswith("it offers besides: ") and "state-k7-perfctr0" in besides
    )  # 6.1 lists those MSRs
    assert other.startswith("it offers otherwise: ") and "cap-vm-types" in other
    assert changes.told(old, old) == []


def test_a_host_that_went_and_came_back() -> None:
    (old, _), fault = reports(), NoKvm("gone")
    assert changes.told(old, None, fault) == [
        "this host cannot be measured any more: gone; nothing is granted"
    ]
    assert changes.told(None, None, fault) == []
    assert changes.told(None, old) == ["this host is measured again"]


def test_long_lists_are_counted() -> None:
    old, _ = reports()
    combo = {**old.combo, "modules": {f"kvm.p{n}": "1" for n in range(40)}}
    after = Report("x86_64", measured={}, combo=combo, identity={}, offer=old.offer_words)
    (line,) = changes.told(old, after)
    assert " more" in line and len(line) < 1000


def lines(daemon: Any, wanted: str) -> str:
    for _ in range(300):
        found: str = daemon.errors.read_text()
        if wanted in found:
            return found
        time.sleep(0.02)
    raise TimeoutError(f"{wanted!r} is not in {found!r}")


def test_a_daemon_tells_what_changed_over_a_boot(make_daemon: Callable[..., Any], tmp_path: Path) -> None:
    """The old kernel offers less than the fence that was pinned on the new one: told, and breached."""
    document = json.loads(RECORDED.read_bytes())
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(document), "utf-8")
    document["combo"] |= {"kernel": "6.1.0-50-amd64", "boot": "another"}
    document["offer"]["cpuid:0x7.0.ebx"] = f"{int(document['offer']['cpuid:0x7.0.ebx'], 16) & ~0x20:#010x}"
    after.write_text(json.dumps(document), "utf-8")
    served = make_daemon("--report", str(before)).start()
    with served.client() as client:
        client.fence_pin(source="host", reason="r")
    served.end()
    assert served.errors.read_text() == f"kvmnegd: uid {os.geteuid()} pinned a fence, generation 1: r\n"
    served = make_daemon("--report", str(after)).start()
    with served.client() as client:
        assert client.get_host()["state"] == "breached"
        watch = client.call_more("org.kvmneg.Watch")
        assert next(watch)["state"] == "breached"
        watch.close()
        with pytest.raises(Breached):
            client.negotiate({"max": True})
    told = lines(served, "it offers no more")
    assert "another boot" in told and "6.1.0-50-amd64" in told and "avx2" in told


def test_a_daemon_that_starts_again_has_no_news(node: Node, host: Watched, tmp_path: Path) -> None:
    first = node.report
    assert node.news and changes.before_start(node, first) is None  # measured for the first time
    node.measure()
    host.lose("cpuid:0x7.0.ebx", 1 << 5)
    node.measure()
    before = changes.before_start(node, node.report)
    assert before is not None and before.digest() == first.digest()
    assert any("avx2" in line for line in changes.told(before, node.report))
    again = Node(node.store, host, ContractFiles(str(tmp_path / "contracts")))
    assert not again.news


def test_a_running_daemon_tells_each_change(
    node: Node, host: Watched, tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    server: Any = SimpleNamespace(after=lambda *_: None)
    announcing.follow(server, node)
    node.pin("host", None, None, AUDIT)
    assert "pinned a fence, generation 1" in capsys.readouterr().err
    host.lose("cpuid:0x7.0.ebx", 1 << 5)
    host.change("combo", "microcode", "0x2")
    INPUTS["microcode"](tree)
    node.refresh(fresh=True)
    told = capsys.readouterr().err
    assert "microcode" in told and "avx2" in told and "offers less than fence generation 1" in told
    host.error = NoKvm("kvm_amd is not loaded")
    INPUTS["unload"](tree)
    node.refresh(fresh=True)
    told = capsys.readouterr().err
    assert "kvm_amd is not loaded; nothing is granted" in told
    host.error = None
    host.change("offer", "cpuid:0x7.0.ebx", Host().document["offer"]["cpuid:0x7.0.ebx"])
    INPUTS["reload"](tree)
    node.refresh(fresh=True)
    assert "offers again what fence generation 1 promises" in capsys.readouterr().err
