# SPDX-License-Identifier: LGPL-2.1-or-later
"""The binary contract: read by a decoder written from the documented offsets, and nothing damaged is taken."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import ARCHITECTURE, CATALOG, FULL, NAMES, feature_sets

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features import rules, words
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.policy.contract import GRADES, Contract, binding_mask
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.negotiation import negotiate
from kvmneg.policy.request import Request
from kvmneg.policy.scope import SCOPE


class Decoded(NamedTuple):
    fence_generation: int
    fence_digest: bytes
    grade: int
    words: dict[str, tuple[int, int]]  # word → value, mask


def u32(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<I", data, at)[0])


def u64(data: bytes, at: int) -> int:
    return int(struct.unpack_from("<Q", data, at)[0])


def decode(data: bytes) -> Decoded:
    """Field by field from the offsets that kvmneg/policy/contract.py documents."""
    assert data[0:8] == b"KVMNEGC\0"
    assert (u32(data, 8), u32(data, 12)) == (1, 1)
    assert (u32(data, 16), u32(data, 20), u32(data, 28)) == (len(data), 160, 0)
    assert data[32:64] == hashlib.sha256(data[:32] + bytes(32) + data[64:]).digest()
    cpuid, msr, arm64, capability, state, flags = (u32(data, 104 + 4 * place) for place in range(6))
    assert arm64 == state == flags == 0
    assert data[128:160] == bytes(32)
    found: dict[str, tuple[int, int]] = {}
    at = 160
    for _ in range(cpuid):
        function, index, space, reserved = (u32(data, at + 4 * place) for place in range(4))
        assert reserved == 0
        for place, register in enumerate(("eax", "ebx", "ecx", "edx")):
            value, mask = u32(data, at + 16 + 4 * place), u32(data, at + 32 + 4 * place)
            kind = ("cpuid", "hyperv")[space]
            if mask:
                found[f"{kind}:{function:#x}.{index}.{register}"] = (value, mask)
            assert not value & ~mask
        at += 48
    for _ in range(msr):
        assert u32(data, at + 4) == 0
        found[f"msr:{u32(data, at):#x}"] = (u64(data, at + 8), u64(data, at + 16))
        at += 24
    for _ in range(capability):
        name = data[at : at + 40].rstrip(b"\0").decode()
        assert (u32(data, at + 40), u32(data, at + 44)) == (0, 0)
        found[name] = (u64(data, at + 48), u64(data, at + 56))
        at += 64
    assert at == len(data)
    return Decoded(u64(data, 64), data[72:104], u32(data, 24), found)


def sealed(data: bytes) -> bytes:
    """The bytes with a digest that fits them: as somebody would write who wants to be believed."""
    zeroed = data[:32] + bytes(32) + data[64:]
    return data[:32] + hashlib.sha256(zeroed).digest() + data[64:]


@given(feature_sets(), st.integers(0, 2**64 - 1), st.sampled_from(GRADES))
def test_an_independent_reader_finds_every_word(granted: FeatureSet, generation: int, grade: str) -> None:
    fence = (generation, granted.digest()) if generation else (0, "")
    contract = Contract(granted, fence, grade)
    read = decode(contract.binary())
    assert (read.fence_generation, GRADES[read.grade]) == (generation, grade)
    assert read.fence_digest == (bytes.fromhex(granted.digest()[7:]) if generation else bytes(32))
    assert contract.words() == {word: value for word, (value, _mask) in read.words.items()}
    for word, (value, mask) in read.words.items():
        judged = CATALOG.words[word].judged
        assert value & judged == granted.value(word) & mask & judged
    for word, value, rule in ((word, granted.value(word), CATALOG.words[word]) for word in CATALOG.words):
        bound = read.words.get(word, (0, 0))[1]
        if word.startswith("cpuid:"):
            # whatever is not granted is bound to 0, but for or-bits that nobody can read
            assert rule.judged & ~bound & ~rule.or_mask == 0
            assert bound & rule.or_mask | value & rule.or_mask == rule.or_mask


@given(feature_sets(), st.integers(1, 9))
def test_the_binary_form_round_trips(granted: FeatureSet, generation: int) -> None:
    contract = Contract(granted, (generation, granted.digest()), "partial")
    again = Contract.from_binary(contract.binary())
    assert again.granted == granted
    assert (again.digest, again.fence, again.grade) == (contract.digest, contract.fence, contract.grade)
    assert again.binary() == contract.binary()
    assert again.to_json() == contract.to_json()


@given(feature_sets(), feature_sets())
def test_digests_are_equal_where_contracts_are(a: FeatureSet, b: FeatureSet) -> None:
    assert (Contract(a).digest == Contract(b).digest) == (Contract(a).binary() == Contract(b).binary())
    if a != b:
        assert Contract(a).digest != Contract(b).digest
    assert Contract(a).digest != Contract(a, (1, a.digest())).digest


@pytest.fixture(scope="module")
def real(intel: Report) -> bytes:
    fence = Fence(intel.offer, 7)
    return negotiate(
        Request(level="x86-64-v3", require=("arch-capabilities",)), intel, fence
    ).contract.binary()


def test_every_flipped_byte_is_refused(real: bytes) -> None:
    for at in range(len(real)):
        for value in (real[at] ^ 0x01, real[at] ^ 0x80, 0 if real[at] else 0xFF):
            with pytest.raises(BadInput):
                Contract.from_binary(real[:at] + bytes([value]) + real[at + 1 :])


def test_every_truncation_and_extension_is_refused(real: bytes) -> None:
    for length in range(len(real)):
        with pytest.raises(BadInput):
            Contract.from_binary(real[:length])
    for tail in (b"\0", bytes(48), real):
        with pytest.raises(BadInput):
            Contract.from_binary(real + tail)
    with pytest.raises(BadInput, match=str(limits.CONTRACT_BYTES)):
        Contract.from_binary(real + bytes(limits.CONTRACT_BYTES))


@given(st.data())
def test_what_is_sealed_again_is_refused_or_reads_as_it_is_written(data: st.DataObject) -> None:
    """A digest shows damage, not an author: every field is checked by itself."""
    binary = bytearray(Contract(FeatureSet.of(ARCHITECTURE, FULL)).binary())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, 200) | st.integers(0, len(binary) - 1))
        binary[at] = data.draw(st.integers(0, 255))
    try:
        contract = Contract.from_binary(sealed(bytes(binary)))
    except BadInput:
        return
    read = decode(contract.binary())
    assert contract.words() == {word: value for word, (value, _mask) in read.words.items()}


@pytest.mark.parametrize(
    ("at", "value", "match"),
    [
        (0, b"X", "not a contract of this version"),
        (8, b"\x02", "not a contract of this version"),
        (12, b"\x03", "header"),
        (12, b"\x02", "arm64"),
        (16, b"\0", "its header says"),
        (20, b"\0", "header"),
        (24, b"\x03", "header"),
        (28, b"\x01", "header"),
        (72, b"\x01", "header"),  # the digest of a fence of generation 0
        (104, b"\xff", "its header says"),
        (112, b"\x01", "sections that x86_64 does not have"),
        (128, b"\x01", "header"),
        (160 + 8, b"\x02", "order|CPUID entry"),
        (160 + 12, b"\x01", "CPUID entry"),
    ],
)
def test_each_field_of_the_header_is_checked(at: int, value: bytes, match: str) -> None:
    binary = Contract(FeatureSet.of(ARCHITECTURE, FULL)).binary()
    with pytest.raises(BadInput, match=match):
        Contract.from_binary(sealed(binary[:at] + value + binary[at + 1 :]))


def test_entries_are_sorted_and_bind_something() -> None:
    read = decode(Contract(FeatureSet.of(ARCHITECTURE, FULL)).binary())
    for kind in ("cpuid:", "hyperv:", "msr:", "kvm:"):
        mine = [word for word in read.words if word.startswith(kind)]
        assert mine == sorted(mine, key=words.order) and len(mine) > 3
    first = Contract(FeatureSet.of(ARCHITECTURE, FULL)).binary()
    swapped = first[:160] + first[208:256] + first[160:208] + first[256:]
    with pytest.raises(BadInput, match="order"):
        Contract.from_binary(sealed(swapped))
    unbound = first[:176] + bytes(32) + first[208:]
    with pytest.raises(BadInput, match="CPUID entry"):
        Contract.from_binary(sealed(unbound))
    stray = first[:176] + b"\xff" * 16 + bytes(15) + b"\x01" + first[208:]
    with pytest.raises(BadInput, match="does not bind"):
        Contract.from_binary(sealed(stray))


# -- what is bound -----------------------------------------------------------------------------------


def test_constants_of_policy_are_in_every_contract() -> None:
    bound = Contract(FeatureSet.empty(ARCHITECTURE)).words()
    assert bound["cpuid:0x1.0.edx"] == 1 << 9  # APIC
    assert bound["cpuid:0x6.0.eax"] == 1 << 2  # ARAT


def test_an_msr_that_the_guest_is_not_shown_is_not_bound(intel: Report) -> None:
    plain = negotiate(Request(level="x86-64-v2"), intel).contract
    shown = negotiate(Request(level="x86-64-v2", require=("arch-capabilities", "rdctl-no")), intel).contract
    assert "msr:0x10a" not in plain.words() and "msr:0x480" not in plain.words()
    assert shown.words()["msr:0x10a"] == 1 | 1 << 17  # and FB_CLEAR, which the host has: a guest is told
    assert binding_mask(shown.granted, "msr:0x10a") & 1 << 4  # ssb-no: not asked for, and bound to 0


def test_or_bits_beyond_the_highest_leaf_are_not_bound(software: Report, amd: Report) -> None:
    word = "cpuid:0x80000021.0.eax"
    told = CATALOG.words[word].or_mask
    nowhere = FeatureSet.of(ARCHITECTURE, {**software.offer_words, word: told})
    assert not binding_mask(nowhere, word) & told
    assert Contract.from_binary(Contract(nowhere).binary()).granted == nowhere
    assert binding_mask(amd.offer, word) & told == told
    assert Contract(amd.offer).words()[word] & told == 1 << 1 | 1 << 5


def test_a_number_of_machine_check_banks_that_nobody_named_is_not_bound(intel: Report) -> None:
    """KVM_X86_SETUP_MCE takes no vCPU without one, and a fence may leave the word out: all but the number is bound."""
    word = "msr:0x179"
    host = Report(
        ARCHITECTURE, measured={}, combo={}, identity={}, offer={**intel.offer_words, word: 0x9000520}
    )
    named = negotiate(Request(maximum=True), host, Fence(host.offer, 1)).contract
    assert named.words()[word] == 0x9000520 and binding_mask(named.granted, word) & 0xFF == 0xFF
    silent = Fence(FeatureSet.of(ARCHITECTURE, {**host.offer.words, word: 0}), 1)
    contract = negotiate(Request(maximum=True), host, silent).contract
    assert contract.granted.field("mca") and contract.words()[word] == 0
    assert (
        binding_mask(contract.granted, word) & (0xFF | 1 << 8 | 1 << 27) == 1 << 8 | 1 << 27
    )  # MCG_CTL, LMCE
    assert Contract.from_binary(contract.binary()).granted == contract.granted


def test_bits_that_are_not_kvmnegs_are_not_bound() -> None:
    full = FeatureSet.of(ARCHITECTURE, FULL)
    constants = {(word, bit) for word, mask, _value in CATALOG.policy for bit in range(64) if mask >> bit & 1}
    for feature in NAMES.by_name.values():
        if feature.rule in rules.UNMERGED and feature.word in CATALOG.words:
            for bit in range(feature.shift, feature.shift + feature.width):
                bound = bool(binding_mask(full, feature.word) >> bit & 1)
                assert bound == ((feature.word, bit) in constants), feature.name


def test_the_document_is_a_view(intel: Report) -> None:
    fence = Fence(intel.offer, 7)
    contract = negotiate(Request(level="x86-64-v2"), intel, fence).contract
    document = contract.to_json()
    assert document["format"] == "kvmneg.contract/1"
    assert document["digest"] == "sha256:" + contract.binary()[32:64].hex()
    assert document["fence"] == {"generation": 7, "digest": fence.digest}
    assert document["scope"] == list(SCOPE)
    assert {word: int(text, 16) for word, text in document["words"].items()} == contract.words()
    assert Contract(contract.granted).to_json()["fence"] is None
    assert any(line.startswith("judged") for line in SCOPE) and any(
        line.startswith("not judged") for line in SCOPE
    )


# -- the document is read back -----------------------------------------------------------------------


@given(feature_sets(), st.integers(0, 9), st.sampled_from(GRADES))
def test_the_document_round_trips(granted: FeatureSet, generation: int, grade: str) -> None:
    fence = (generation, granted.digest()) if generation else (0, "")
    contract = Contract(granted, fence, grade)
    document = json.loads(json.dumps(contract.to_json()))
    assert Contract.from_json(document).binary() == contract.binary()


def test_masks_tell_which_bits_bind(intel: Report) -> None:
    contract = negotiate(Request(level="x86-64-v2"), intel).contract
    document, read = contract.to_json(), decode(contract.binary())
    every = {
        word: (1 << (32 if word.startswith(("cpuid:", "hyperv:", "kvm:")) else 64)) - 1 for word in read.words
    }
    bound = {word: int(text, 16) for word, text in document["masks"].items()}
    assert {**every, **bound} == {word: mask for word, (_value, mask) in read.words.items()}
    assert all(bound[word] != every[word] for word in bound)
    assert not bound["cpuid:0x1.0.ecx"] & 1 << 27  # OSXSAVE is the guest's
    assert not bound["cpuid:0x1.0.ebx"] >> 16  # APIC ids are the VMM's


_CHANGES: dict[str, tuple[Any, str]] = {
    "format": ("kvmneg.contract/2", "format is"),
    "digest": ("sha256:" + "0" * 64, "altered"),
    "architecture": ("riscv", "architecture"),
    "fence": ({"generation": 8, "digest": "sha256:" + "1" * 64}, "altered"),
    "grade": ("enforced", "altered"),
    "words": ({"cpuid:0x1.0.ecx": "0xffffffff"}, "mask without its word"),
    "masks": ({}, "altered"),
}


@pytest.mark.parametrize("field", _CHANGES)
def test_a_document_that_was_altered_is_refused(intel: Report, field: str) -> None:
    value, told = _CHANGES[field]
    document = negotiate(Request(level="x86-64-v2"), intel, Fence(intel.offer, 7)).contract.to_json()
    Contract.from_json(document)
    with pytest.raises(BadInput, match=told):
        Contract.from_json({**document, field: value}, file="x")


@pytest.mark.parametrize(
    "change",
    [
        {"words": {"cpuid:0x1.0.ecx": "0x1"}, "masks": {"cpuid:0x1.0.ecx": "0x2"}},
        {"words": {"cpuid:0x1.0.ecx": "0x0"}, "masks": {"cpuid:0x1.0.ecx": "0x0"}},
        {"words": {"cpuid:0x1.0.ecx": 1}},
        {"words": {"nonsense": "0x1"}},
        {"words": []},
        {"words": None},
        {"masks": []},
        {"masks": {"cpuid:0x1.0.ecx": None}},
        {"masks": {"nonsense": "0x1"}},
        {"fence": {"generation": "7", "digest": "sha256:" + "1" * 64}},
        {"fence": {"generation": 0, "digest": "sha256:" + "1" * 64}},
        {"fence": {"generation": 1 << 64, "digest": "sha256:" + "1" * 64}},
        {"fence": {"generation": 7, "digest": None}},
        {"fence": {"generation": 7, "digest": "sha256:" + "x" * 64}},
        {"fence": []},
        {"grade": "superb"},
        {"grade": None},
        {"grade": []},
        {"architecture": []},
        {"architecture": None},
        {"digest": None},
        {"words": {f"cpuid:{leaf:#x}.0.eax": "0x0" for leaf in range(limits.WORDS + 1)}, "masks": {}},
    ],
)
def test_a_document_of_another_shape_is_refused(change: dict[str, Any]) -> None:
    document = Contract(FeatureSet.of(ARCHITECTURE, FULL)).to_json()
    with pytest.raises(BadInput, match=r"^x: "):
        Contract.from_json({**document, **change}, file="x")
    for other in (None, [], "contract", 7):
        with pytest.raises(BadInput, match="not a contract"):
            Contract.from_json(other)


def test_a_document_without_masks_binds_every_bit() -> None:
    whole = {"cpuid:0x0.0.ebx": "0x756e6547"}
    document = {**Contract(FeatureSet.empty(ARCHITECTURE)).to_json(), "words": whole}
    del document["masks"]
    with pytest.raises(BadInput, match="altered"):
        Contract.from_json(document)
    entry = struct.pack("<12I", 0, 0, 0, 0, 0, 0x756E6547, 0, 0, 0, 0xFFFFFFFF, 0, 0)
    header = struct.pack(
        "<8sIIIIII32sQ32s6I32s",
        b"KVMNEGC\0",
        1,
        1,
        208,
        160,
        0,
        0,
        bytes(32),
        0,
        bytes(32),
        1,
        0,
        0,
        0,
        0,
        0,
        bytes(32),
    )
    digest = "sha256:" + hashlib.sha256(header + entry).hexdigest()
    read = Contract.from_json({**document, "digest": digest})
    assert read.words() == {"cpuid:0x0.0.ebx": 0x756E6547}
    assert "masks" not in read.to_json()
