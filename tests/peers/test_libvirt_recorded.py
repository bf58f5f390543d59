# SPDX-License-Identifier: LGPL-2.1-or-later
"""What libvirt 11.3 made of 31 real hosts, recorded in its own tests, against what this project makes of them.

Three questions on each host: do the names decoded from its raw CPUID equal libvirt's model, expanded, plus its
features; does QEMU's recorded reply mean the same bits to both; and is the baseline of each pair what libvirt's
plain AND of the two sets is? The answers differ in what libvirt_differences.txt lists, one difference a line:

    map NAME                    libvirt's map has a bit under a name that the catalogue does not have there
    host DUMP -NAME             decoded from raw CPUID: "-" only libvirt has it, "+" only kvmneg
    guest DUMP -NAME            the same of the model that libvirt would give a guest
    enabled DUMP +NAME          of QEMU's reply
    unmerged NAME               a feature that libvirt merges and kvmneg does not, by its rule
    pair DUMP DUMP +NAME        of the baseline of two

each followed by who is wrong ("libvirt:", "kvmneg:" or "neither:") and why. A line that does not show is stale
and fails, like a difference that is not listed.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg.errors import Incompatible
from kvmneg.features import catalog as catalogs
from kvmneg.features import rules, words
from kvmneg.features.featureset import FeatureSet, meet_all
from kvmneg.policy import pool
from kvmneg.policy.fence_text import Fence

HERE = Path(__file__).parent

if TYPE_CHECKING:
    from tests.peers import libvirt_data
    from tests.peers.libvirt_data import CpuMap, Dump
else:  # tests are imported without their folders on the path
    if "libvirt_data" not in sys.modules:
        found = importlib.util.spec_from_file_location("libvirt_data", HERE / "libvirt_data.py")
        sys.modules["libvirt_data"] = importlib.util.module_from_spec(found)
        found.loader.exec_module(sys.modules["libvirt_data"])
    libvirt_data = sys.modules["libvirt_data"]
    CpuMap, Dump = libvirt_data.CpuMap, libvirt_data.Dump

LIST = HERE / "libvirt_differences.txt"
VERSION = "11.3"  # of the libvirt whose test data and CPU map these are
FIELDS = {"map": 2, "host": 3, "guest": 3, "enabled": 3, "unmerged": 2, "pair": 4}
WRONG = ("libvirt:", "kvmneg:", "neither:")

Difference = tuple[str, ...]
NAMES = libvirt_data.NAMES


@pytest.fixture(scope="module")
def dumps() -> list[Dump]:
    """The 31 hosts, in the order of their names."""
    folder = os.environ.get("KVMNEG_PEER_DATA", "")
    if not folder:
        pytest.skip("KVMNEG_PEER_DATA is not set")
    return libvirt_data.dumps(Path(folder))


@pytest.fixture(scope="module")
def cpu_map() -> CpuMap:
    """The CPU map of that libvirt, out of its unpacked package."""
    location = HERE.parent / "packages" / "__init__.py"
    spec = importlib.util.spec_from_file_location(
        "side_by_side", location, submodule_search_locations=[str(location.parent)]
    )
    assert spec is not None and spec.loader is not None
    sys.modules["side_by_side"] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    store = importlib.import_module("side_by_side.store")
    errors = importlib.import_module("side_by_side.errors")
    try:
        tree = store.Store().get(store.Wanted("libvirt-common", VERSION, "trixie", alone=True))
    except errors.Unreachable as error:
        pytest.skip(f"the mirror is not reachable: {error}")
    assert tree.version.startswith(VERSION), (
        f"the mirror has libvirt {tree.version}, the data are of {VERSION}"
    )
    return CpuMap(tree.path("usr/share/libvirt/cpu_map"))


@pytest.fixture(scope="module")
def listed() -> set[Difference]:
    """The list, each line well formed and there once."""
    found: set[Difference] = set()
    for number, text in enumerate(LIST.read_text("utf-8").splitlines(), 1):
        if not text.strip() or text.startswith("#"):
            continue
        fields = text.split()
        amount = FIELDS[fields[0]]
        line = tuple(fields[:amount])
        assert len(fields) > amount + 1 and fields[amount] in WRONG, f"{LIST.name}:{number}: who, and why?"
        assert "*" not in text, f"{LIST.name}:{number}: no wildcards"
        assert line not in found, f"{LIST.name}:{number}: listed twice"
        found.add(line)
    return found


def compare(
    kind: str, found: set[Difference], listed: set[Difference], capsys: pytest.CaptureFixture[str]
) -> None:
    """Fail with every difference that is not listed and every line that is stale; print how many there are."""
    known = {line for line in listed if line[0] == kind}
    with capsys.disabled():
        sys.stdout.write(f"\nlibvirt, {kind}: {len(found)} differences, {len(known)} listed\n")
    assert not found - known, "not listed:\n" + "\n".join(" ".join(line) for line in sorted(found - known))
    assert not known - found, "stale:\n" + "\n".join(" ".join(line) for line in sorted(known - found))


def signed(ours: frozenset[str], theirs: frozenset[str]) -> list[str]:
    return sorted([f"+{name}" for name in ours - theirs] + [f"-{name}" for name in theirs - ours])


def test_the_catalogue_has_every_name_of_libvirts_map(
    cpu_map: CpuMap, listed: set[Difference], capsys: pytest.CaptureFixture[str]
) -> None:
    found: set[Difference] = {
        ("map", name)
        for name, places in cpu_map.places.items()
        for word, mask in places.items()
        if {(f.libvirt, f.mask) for f in NAMES.within(word, mask) if f.whole or word not in NAMES.controls}
        != {(name, mask)}
    }
    compare("map", found, listed, capsys)


@pytest.mark.parametrize("kind", ["host", "guest"])
def test_names_decoded_from_raw_cpuid_are_libvirts_model_and_features(
    kind: str,
    dumps: list[Dump],
    cpu_map: CpuMap,
    listed: set[Difference],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert len(dumps) == 31
    found: set[Difference] = set()
    for dump in dumps:
        ours, theirs = cpu_map.names(dump.report.offer_words), cpu_map.effective(dump.xml(kind))
        assert len(theirs) > 25, "a host has more features than that"
        found |= {(kind, dump.name, name) for name in signed(ours, theirs)}
    compare(kind, found, listed, capsys)


def test_qemus_reply_means_the_same_bits(
    dumps: list[Dump], cpu_map: CpuMap, listed: set[Difference], capsys: pytest.CaptureFixture[str]
) -> None:
    found: set[Difference] = set()
    replies, with_vmx = 0, set()
    for dump in dumps:
        reply = dump.reply()
        if reply is not None:
            replies += 1
            if len([name for name in cpu_map.names(reply) if name.startswith("vmx-")]) > 60:
                with_vmx.add(dump.name)
            names = signed(cpu_map.names(reply), cpu_map.names(dump.enabled()))
            found |= {("enabled", dump.name, name) for name in names}
    assert replies == 25
    assert with_vmx == {"Cooperlake", "Core-i7-8550U", "Xeon-Platinum-9242"}, (
        "their VMX controls are compared too"
    )
    compare("enabled", found, listed, capsys)


def test_a_pair_of_two_vendors_has_no_baseline(dumps: list[Dump]) -> None:
    """libvirt refuses these too (virCPUx86Baseline: "CPU vendors do not match")."""
    mixed = [(a, b) for a, b in combinations(dumps, 2) if a.vendor != b.vendor]
    assert len(mixed) == 24 * 6 + 24 + 6
    for a, b in mixed:
        assert meet_all((a.report.offer, b.report.offer)).conflicts, f"{a.name} and {b.name}"


def test_a_study_of_two_vendors_keeps_to_the_xsave_layout(dumps: list[Dump]) -> None:
    """No AMD host of these has AVX-512 or protection keys; AVX lies at 0x240 on all that have it."""
    mixed = [(a.report, b.report) for a, b in combinations(dumps, 2) if a.vendor != b.vendor]
    both_avx = 0
    for a, b in mixed:
        met = pool.study([a, b])
        assert {conflict.word for conflict in met.conflicts} == {
            f"cpuid:0x0.0.{r}" for r in ("ebx", "ecx", "edx")
        }
        assert met.field("avx512f") == met.field("pku") == 0
        wanted = all(one.offer.field("avx") for one in (a, b))
        both_avx += wanted
        assert met.field("avx") == wanted
        with pytest.raises(Incompatible):
            Fence(met)
    assert both_avx > 50


def _merged(name: str, cpu_map: CpuMap) -> bool:
    """Whether the bits of one of libvirt's names merge here; all of a name's places must say the same."""
    kinds: set[bool] = set()
    for word, mask in cpu_map.places[name].items():
        named = {feature.rule for feature in NAMES.within(word, mask)}
        whole = catalogs.load(words.X86_64).leaf_rule(word) or ""
        kinds |= {rule not in rules.UNMERGED for rule in named or {whole}}
    assert len(kinds) == 1, name
    return kinds.pop()


def test_what_is_never_merged_is_listed(
    dumps: list[Dump], cpu_map: CpuMap, listed: set[Difference], capsys: pytest.CaptureFixture[str]
) -> None:
    seen: frozenset[str] = frozenset().union(*(cpu_map.effective(dump.xml("host")) for dump in dumps))
    found: set[Difference] = {("unmerged", name) for name in seen if not _merged(name, cpu_map)}
    compare("unmerged", found, listed, capsys)


def test_baselines_of_pairs_are_libvirts_sets_where_a_plain_and_is_right(
    dumps: list[Dump], cpu_map: CpuMap, listed: set[Difference], capsys: pytest.CaptureFixture[str]
) -> None:
    sets = {dump.name: cpu_map.effective(dump.xml("host")) for dump in dumps}
    unmerged = {line[1] for line in listed if line[0] == "unmerged"}
    found: set[Difference] = set()
    pairs = 0
    for a, b in combinations(dumps, 2):
        if a.vendor != b.vendor:
            continue
        pairs += 1
        met: FeatureSet = meet_all((a.report.offer, b.report.offer))
        assert not met.conflicts
        ours = cpu_map.names(met.words) - unmerged
        theirs = (sets[a.name] & sets[b.name]) - unmerged
        found |= {("pair", a.name, b.name, name) for name in signed(ours, theirs)}
    assert pairs == 24 * 23 // 2 + 6 * 5 // 2
    compare("pair", found, listed, capsys)
