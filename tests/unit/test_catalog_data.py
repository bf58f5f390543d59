# SPDX-License-Identifier: LGPL-2.1-or-later
"""The x86 tables themselves: every bit has one name and one rule, and no bit that others know is missing."""

from __future__ import annotations

import json
import re
import tomllib
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
TABLES = sorted((HERE.parents[1] / "kvmneg" / "features" / "catalog" / "x86").glob("*.toml"))
MASKS = HERE.parents[1] / "kvmneg" / "data" / "x86_kvm_masks.json"
FEATURE_KEYS = {
    "bit", "bits", "rule", "requires", "title", "why", "withheld", "value", "qemu", "linux", "libvirt",
    "vendor", "unset", "with", "default1", "msr", "capability", "flag",
}  # fmt: skip
MERGED = {
    "and", "or", "hint", "minimum", "minimum-nonzero", "maximum", "equal", "equal-or-drop", "lowest",
    "version-range", "interval", "vmx-controls",
}  # fmt: skip
UNMERGED = {"derived", "topology", "dynamic", "policy", "reported"}
PLAIN = {"and", "minimum"}  # what needs no reason

# Bits that must not be hidden: a guest without them does not fit a host with them.
OR_FEATURES = {
    "fdp-excptn-only", "zero-fcs-fds", "md-clear", "rtm-always-abort",
    "no-event-core-cycles", "no-event-instructions", "no-event-reference-cycles", "no-event-llc-references",
    "no-event-llc-misses", "no-event-branches", "no-event-branch-misses", "no-event-topdown-slots",
    "no-event-topdown-backend-bound", "no-event-topdown-bad-speculation", "no-event-topdown-frontend-bound",
    "no-event-topdown-retiring", "no-event-lbr-inserts", "pmu-anythread-deprecated",
    "efer-lmsle-mbz", "fs-gs-base-ns", "verw-clear", "no-smm-ctl-msr",
    "rsba", "rrsba", "fb-clear", "rfds-clear", "vmx-32bit-addresses", "vmx-cr0-fixed0", "vmx-cr4-fixed0",
}  # fmt: skip
HINTS = {"erms", "fsrm", "fzrm", "fsrs", "fsrc"}
WITHHELD = {"invtsc", "sme", "sev", "sme-coherent"}

# Fields of several bits that are sets of bits. Any other is a number or a format, which no mask can bound.
BIT_SETS = {
    "pmu-fixed-counter-mask", "lbr-depths", "lbr-event-counters", "sgx-attributes-high", "sgx-xfrm-low",
    "sgx-xfrm-high", "xss-high", "vmx-cr0-fixed0", "vmx-cr4-fixed0", "cap-adjust-clock", "cap-x2apic-api",
    "cap-vm-types", "cap-disable-quirks", "cap-disable-quirks2", "cap-x86-disable-exits",
    "cap-x86-bus-lock-exit", "cap-exit-hypercall", "cap-pmu-capability", "cap-xen-hvm",
}  # fmt: skip

# Features that need each other: all of a group is granted, or none.
VMX_GROUP = {
    "vmx", "vmx-revision", "vmx-pinbased-controls", "vmx-procbased-controls", "vmx-exit-controls",
    "vmx-entry-controls",
}  # fmt: skip
AMX_GROUP = {
    "amx-tile", "amx-max-palette", "amx-palette-sizes", "amx-row-and-names", "amx-max-rows", "amx-tmul",
}  # fmt: skip
INTEL_PT_GROUP = {"intel-pt", "intel-pt-capabilities"}
# Words that are one value together, by the one that is 0 only where all are.
ONE_VALUE = {
    "intel-pt-capabilities": {
        "intel-pt-max-subleaf", "intel-pt-outputs", "intel-pt-ranges-and-mtc", "intel-pt-cycle-and-psb",
    },
    **{
        f"xsave-{name}-size": {f"xsave-{name}-offset", f"xsave-{name}-flags"}
        for name in (
            "avx", "bndregs", "bndcsr", "opmask", "zmm-hi256", "hi16-zmm", "pt", "pkru", "pasid", "cet-u",
            "cet-s", "hdc", "uintr", "lbr", "hwp", "xtilecfg", "xtiledata", "apx", "lwp",
        )
    },
}  # fmt: skip


def _layout(*components: str, where: str) -> frozenset[str]:
    places = ("size", "offset") if where == "xcr0" else ("size",)
    layout = {f"xsave-{name}-{place}" for name in components for place in places}
    return frozenset(layout | {f"{where}-{name}" for name in components})


GROUPS = {
    frozenset({"hle", "rtm"}),
    frozenset({"avx10", "avx10-version"}),
    frozenset(VMX_GROUP),
    frozenset(AMX_GROUP),
    frozenset(INTEL_PT_GROUP),
    _layout("avx", where="xcr0"),
    _layout("bndregs", "bndcsr", where="xcr0"),
    _layout("opmask", "zmm-hi256", "hi16-zmm", where="xcr0"),
    _layout("pkru", where="xcr0"),
    _layout("xtilecfg", "xtiledata", where="xcr0"),
    _layout("apx", where="xcr0"),
    _layout("lwp", where="xcr0"),
    _layout("cet-u", "cet-s", where="xss"),
    *(_layout(name, where="xss") for name in ("pt", "pasid", "hdc", "uintr", "lbr", "hwp")),
}


class Row(NamedTuple):
    name: str
    word: str
    low: int
    high: int
    rule: str
    entry: dict[str, Any]

    @property
    def mask(self) -> int:
        return (1 << self.high + 1) - (1 << self.low)

    def bases(self) -> list[str]:
        return [re.sub(r"^!|>=\d+$", "", text) for text in self.entry.get("requires", ())]


def _width(word: str) -> int:
    return 64 if word.startswith(("msr:", "tap:", "vhost-net:", "tsc:", "state:")) else 32


@cache
def _tables() -> tuple[list[Row], dict[str, dict[str, Any]]]:
    """Every feature, and the whole leaves: `["cpuid:0x4"]` or `["cpuid:0x4.1"]` with a rule and no more."""
    rows, leaves = [], {}
    for path in TABLES:
        for word, body in tomllib.loads(path.read_text("utf-8")).items():
            entries = {name: entry for name, entry in body.items() if isinstance(entry, dict)}
            if not entries:
                leaves[word] = body
            for name, entry in entries.items():
                if name == "controls":
                    continue
                high, _, low = str(entry.get("bits", entry.get("bit"))).partition(":")
                rule = entry.get("rule", body.get("rule"))
                rows.append(Row(name, word, int(low or high), int(high), rule, entry))
    return rows, leaves


@cache
def _controls() -> list[Row]:
    """The single controls of VMX control words: their bit is that of the half that says what may be 1."""
    rows = []
    for path in TABLES:
        for word, body in tomllib.loads(path.read_text("utf-8")).items():
            for name, entry in body.get("controls", {}).items():
                bit = 32 + entry["bit"]
                rows.append(Row(name, word, bit, bit, "vmx-controls", entry))
    return rows


def _known_bits() -> dict[str, int]:
    known: dict[str, int] = {}
    for row in _tables()[0]:
        known[row.word] = known.get(row.word, 0) | row.mask
    return known


def _unclassified(word: str, mask: int) -> int:
    """The bits of `mask` that no table classifies."""
    known, leaves = _known_bits(), _tables()[1]
    left = mask & ~known.get(word, 0)
    if not left or word.startswith("msr:"):
        return left
    leaf, subleaf, _register = word.split(".")
    return 0 if leaf in leaves or f"{leaf}.{subleaf}" in leaves else left


def test_there_are_tables() -> None:
    rows, leaves = _tables()
    assert len(TABLES) >= 12
    assert len(rows) > 800
    assert len(leaves) > 30


def test_a_name_means_one_feature() -> None:
    names = Counter(row.name for row in (*_tables()[0], *_controls()))
    assert [name for name, count in names.items() if count > 1] == []


def test_names_are_written_alike() -> None:
    assert [row.name for row in _tables()[0] if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", row.name)] == []


def _flaws(row: Row) -> list[str]:
    checks = {
        "an unknown key": set(row.entry) <= FEATURE_KEYS,
        "no known rule": row.rule in MERGED | UNMERGED,
        "bits outside its word": 0 <= row.low <= row.high < _width(row.word),
        "no title": bool(row.entry.get("title", "").strip()),
        "no reason": row.rule in PLAIN or bool(row.entry.get("why", "").strip()),
        "a value without the rule policy, or the rule without a value": ("value" in row.entry)
        == (row.rule == "policy"),
    }
    return [f"{row.word} {row.name}: {flaw}" for flaw, fine in checks.items() if not fine]


def test_entries_are_complete() -> None:
    assert [flaw for row in _tables()[0] for flaw in _flaws(row)] == []
    for row in _controls():
        assert set(row.entry) <= FEATURE_KEYS - {"bits", "rule", "value", "default1", "why", "withheld"}, (
            row.name
        )
        assert row.entry["title"].strip() and 32 <= row.low < 64, row.name


def test_whole_leaves_are_what_no_pool_merges() -> None:
    for leaf, body in _tables()[1].items():
        assert re.fullmatch(r"(cpuid|hyperv):0x[0-9a-f]+(\.\d+)?", leaf), leaf
        assert body["rule"] in UNMERGED, leaf
        assert body["why"].strip(), leaf


def test_a_bit_belongs_to_one_feature() -> None:
    taken: dict[tuple[str, int], str] = {}
    for row in _tables()[0]:
        for bit in range(row.low, row.high + 1):
            assert taken.setdefault((row.word, bit), row.name) == row.name


def test_what_a_feature_requires_exists() -> None:
    rows = {row.name: row for row in (*_tables()[0], *_controls())}
    for row in rows.values():
        for text, base in zip(row.entry.get("requires", ()), row.bases(), strict=True):
            assert base in rows, f"{row.name} requires {text}"
            assert text.startswith("!") == (rows[base].rule == "or"), f"{row.name} requires {text}"
            assert rows[base].rule in MERGED, f"{row.name} requires {text}, which is not merged"
            least = int(text.partition(">=")[2] or 1)
            assert least < 1 << rows[base].high - rows[base].low + 1, f"{row.name} can never be granted"


def _reach(bases: dict[str, list[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for base in bases[waiting.pop()]:
            if base not in seen:
                seen.add(base)
                waiting.append(base)
    return seen


def test_only_declared_groups_need_each_other() -> None:
    bases = {row.name: row.bases() for row in _tables()[0]}
    whole = {row.word: row.name for row in _tables()[0] if row.rule == "vmx-controls"}
    bases |= {row.name: [whole[row.word], *row.bases()] for row in _controls()}
    above = {name: _reach(bases, name) for name in bases}
    cycles = {
        frozenset(other for other in above[name] if name in above[other])
        for name in bases
        if name in above[name]
    }
    assert cycles == GROUPS


def test_words_that_are_one_value_are_the_ones_of_the_manuals() -> None:
    found: dict[str, set[str]] = {}
    for row in _tables()[0]:
        if "with" in row.entry:
            found.setdefault(row.entry["with"], set()).add(row.name)
    assert found == ONE_VALUE


def test_reversed_bits_are_the_ones_of_the_manuals() -> None:
    assert {row.name for row in _tables()[0] if row.rule == "or"} == OR_FEATURES


def test_only_speed_is_a_hint() -> None:
    hints = {row.name for row in _tables()[0] if row.rule == "hint"}
    assert {name for name in hints if not name.startswith("state-")} == HINTS


def test_state_that_no_feature_announces_is_required_only_where_every_kvm_has_it() -> None:
    """Linux 5.10's and 6.1's KVM list these for any guest on any CPU (arch/x86/kvm/x86.c)."""
    everywhere = {0x174, 0x175, 0x176, *range(0xC0000081, 0xC0000085), 0xC0000102, 0x10, 0x277, 0x1A0}
    state = [row for row in _tables()[0] if "msr" in row.entry]
    alone = [row for row in state if row.rule == "and" and not row.entry.get("requires")]
    assert {row.entry["msr"] for row in alone} == everywhere
    assert {row.name for row in state if row.rule == "hint" and row.entry.get("requires")} == set()


def test_a_class_of_state_has_one_bit_and_names_its_constant() -> None:
    state = [row for row in _tables()[0] if row.word.startswith("state:") and row.rule in ("and", "hint")]
    assert len(state) > 150
    assert [row.name for row in state if row.low != row.high or not row.entry.get("vendor")] == []
    msrs = [row for row in state if row.word.startswith("state:msrs")]
    assert [row.name for row in state if (row in msrs) != ("msr" in row.entry)] == []
    assert [row.name for row in state if (row in msrs) == ("capability" in row.entry)] == []
    known = {row.word for row in _tables()[0]}
    assert [row.name for row in state if f"kvm:{row.entry.get('capability', 'mce')}" not in known] == []
    indices = Counter(row.entry["msr"] for row in state if "msr" in row.entry)
    assert [hex(index) for index, times in indices.items() if times > 1] == []


def test_a_mask_bounds_only_sets_of_bits() -> None:
    bitwise = {row.name for row in _tables()[0] if row.high > row.low and row.rule in ("and", "or", "hint")}
    assert bitwise == BIT_SETS


def test_what_is_granted_by_name_only() -> None:
    assert {row.name for row in _tables()[0] if "withheld" in row.entry} == WITHHELD


def test_equal_words_are_whole() -> None:
    equal = [row for row in _tables()[0] if row.rule == "equal"]
    assert {row.word for row in equal} == {f"cpuid:0x0.0.{register}" for register in ("ebx", "ecx", "edx")}
    assert all(row.mask == (1 << _width(row.word)) - 1 for row in equal)


def test_a_name_of_qemu_is_our_name() -> None:
    """Except where one property of QEMU stands for several bits, or for one bit that has another's name."""
    every = (*_tables()[0], *_controls())
    rows = [row for row in every if row.word.startswith(("cpuid:", "msr:")) and "qemu" in row.entry]
    count = Counter(row.entry["qemu"] for row in rows)
    assert {row.name for row in rows if row.name != row.entry["qemu"]} == {
        "kvmclock-old", "vmx-invvpid-single-context", "vmx-invvpid-single-context-noglobals",
    }  # fmt: skip
    assert {name for name, times in count.items() if times > 1} == {"kvmclock", "vmx-invept-single-context"}


def test_every_name_of_vmx_that_qemu_and_libvirt_have_is_at_its_bit() -> None:
    """libvirt's differ from QEMU's where QEMU says INVEPT and means INVVPID."""
    rows = {(row.word, row.low): row for row in (*_tables()[0], *_controls()) if row.low == row.high}
    lines = (HERE / "data" / "vmx_names.txt").read_text("utf-8").splitlines()
    listed = [line.split() for line in lines if not line.startswith("#")]
    assert len(listed) == 99
    for word, bit, *names in listed:
        entry = rows[word, int(bit)].entry
        assert [entry.get("qemu", "-"), entry.get("libvirt", "-")] == names, f"{word} {bit}"
    places = {(word, int(bit)) for word, bit, *_names in listed}
    named = {place for place, row in rows.items() if {"qemu", "libvirt"} & set(row.entry)}
    assert {place for place in named if re.fullmatch(r"msr:0x4[89].", place[0])} == places


def test_every_monitoring_bit_that_libvirt_and_linux_name() -> None:
    """libvirt src/cpu_map/x86_features.xml; Linux arch/x86/include/asm/cpufeatures.h, word 11 (cqm_*)."""
    found = {
        (row.word, row.low): (row.entry.get("libvirt"), row.entry["linux"])
        for row in _tables()[0]
        if row.word.startswith("cpuid:0xf.") and "linux" in row.entry
    }
    assert found == {
        ("cpuid:0xf.0.edx", 1): (None, "cqm_llc"),
        ("cpuid:0xf.1.edx", 0): (None, "cqm_occup_llc"),
        ("cpuid:0xf.1.edx", 1): ("mbm_total", "cqm_mbm_total"),
        ("cpuid:0xf.1.edx", 2): ("mbm_local", "cqm_mbm_local"),
    }


def _csv_fields() -> list[tuple[str, int, str]]:
    """(word, mask, name) of each field of the public CPUID table, one for each subleaf of a range."""
    fields = []
    for line in (HERE / "data" / "x86_cpuid.csv").read_text("utf-8").splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        leaf, subleaves, register, bits, name, _title = (part.strip() for part in line.split(",", 5))
        high, _, low = bits.partition(":")
        last, _, first = subleaves.partition(":")
        mask = (1 << int(high) + 1) - (1 << int(low or high))
        for subleaf in range(int(first or last), int(last) + 1):
            fields.append((f"cpuid:{int(leaf, 16):#x}.{subleaf}.{register}", mask, name))
    return fields


def test_every_field_of_the_public_cpuid_table_is_classified() -> None:
    fields = _csv_fields()
    assert len(fields) > 937
    missing = [f"{word} {name} {mask:#x}" for word, mask, name in fields if _unclassified(word, mask)]
    assert missing == []


def test_every_bit_that_a_kvm_can_expose_is_classified() -> None:
    masks = json.loads(MASKS.read_text("utf-8"))
    kernels = {name: words for name, words in masks.items() if re.fullmatch(r"\d+\.\d+", name)}
    assert {"5.10", "6.1", "6.12", "7.2", "7.3"} <= set(kernels)
    missing = []
    for kernel, words in kernels.items():
        for word, kinds in words.items():
            for kind, bits in kinds.items():
                left = _unclassified(word, int(bits["mask"], 16))
                missing += [f"{kernel} {word} {kind} {left:#x}"] if left else []
    assert missing == []


def test_a_bit_that_a_kvm_can_expose_is_not_only_recorded() -> None:
    """What KVM passes to guests has to be merged, but for what the VMM, the guest or this project decides."""
    masks = json.loads(MASKS.read_text("utf-8"))
    decided = {"ht", "osxsave", "ospke", "apic", "apic-copy", "cmp-legacy", "arat"}
    for row in _tables()[0]:
        if row.rule in UNMERGED and row.name not in decided:
            for words in masks.values():
                for bits in words.get(row.word, {}).values() if isinstance(words, dict) else ():
                    assert not int(bits["mask"], 16) & row.mask, row.name
