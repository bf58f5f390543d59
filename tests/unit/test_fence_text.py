# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fence as text: what is written is read back, and what is not exactly understood is refused with its line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import AMD, ARCHITECTURE, CATALOG, INTEL, WORDS, feature_sets

from kvmneg import limits
from kvmneg.errors import BadInput, Incompatible
from kvmneg.features.featureset import FeatureSet, meet
from kvmneg.policy import fence_reader, fence_text
from kvmneg.policy.fence_text import Fence

if TYPE_CHECKING:
    from kvmneg.features.report import Report

ANY = feature_sets((INTEL, AMD, None))
HEAD = "architecture x86_64\n"


def binary(value: int, width: int = 32) -> str:
    return f"0b{value:0{width}b}"


@given(ANY)
def test_the_text_round_trips(granted: FeatureSet) -> None:
    fence = Fence(granted, 3)
    again = Fence.parse(fence.text(), generation=3)
    assert again.granted == granted
    assert (again.digest, again.generation, again.text()) == (fence.digest, 3, fence.text())


@given(st.lists(ANY, min_size=2, max_size=4), st.data())
def test_what_was_read_before_changes_nothing(sets: list[FeatureSet], data: st.DataObject) -> None:
    """Rows of the last text are kept, and lines of the last fence: each is what it is where nothing is."""
    alone = []
    for granted in sets:
        fence_reader._rows.clear()
        for kept in (fence_text._written[ARCHITECTURE], fence_text._last):
            kept.clear()
        text = Fence(granted).text()
        alone.append((text, Fence.parse(text).granted))
    for place in data.draw(st.lists(st.integers(0, len(sets) - 1), max_size=8)):
        text, granted = alone[place]
        assert Fence(sets[place]).text() == text
        fence_text._last.clear()
        assert Fence.parse(text).granted == granted == sets[place]


@given(ANY, ANY)
def test_equal_fences_have_equal_texts_and_no_others(a: FeatureSet, b: FeatureSet) -> None:
    assert (a == b) == (Fence(a).text() == Fence(b).text()) == (Fence(a).digest == Fence(b).digest)


@given(feature_sets(), st.randoms(use_true_random=False))
def test_comments_and_order_and_space_mean_nothing(granted: FeatureSet, order: object) -> None:
    head, architecture, *rows = Fence(granted).text().splitlines()
    order.shuffle(rows)  # type: ignore[attr-defined]
    edited = [architecture, *(f"\t {row.partition('#')[0]} # seen\r" for row in rows), "", "#", head]
    assert Fence.parse("\n".join(edited)).granted == granted


def test_a_text_written_by_hand() -> None:
    fence = Fence.parse(
        HEAD
        + f"cpuid:0x1.0.edx {binary(0x0783FBFF & CATALOG.words['cpuid:0x1.0.edx'].bits_mask)}  # no clflush\n"
        + "cpuid:0x80000008.0.eax.phys-bits = 46\ncpuid:0x80000008.0.eax.linear-bits = 0x30\n"
    )
    assert fence.granted.field("fpu") == 1
    assert fence.granted.field("avx2") == 0  # its word is not named: hidden
    assert fence.granted.field("phys-bits") == 46 and fence.granted.field("linear-bits") == 48
    assert fence.granted.field("guest-phys-bits") == 0  # a limit that is not named is no limit
    assert fence.granted.field("pmu-version") == 0
    assert fence.granted.value("cpuid:0x7.0.edx") == CATALOG.words["cpuid:0x7.0.edx"].or_mask
    assert "cpuid:0x80000008.0.eax.phys-bits = 46\n" in fence.text()
    bounding_nothing = fence.text().replace("guest-phys-bits = 0", "guest-phys-bits = 46")
    assert bounding_nothing != fence.text() and Fence.parse(bounding_nothing).digest == fence.digest
    line = next(row for row in fence.text().splitlines() if row.startswith("cpuid:0x1.0.edx"))
    assert line.split("#")[1].split()[:3] == ["fpu", "vme", "de"]


def test_a_fence_that_names_no_vendor_holds_for_any(intel: Report, amd: Report) -> None:
    fence = Fence.parse(HEAD + f"cpuid:0x1.0.edx {binary(1)}\n")
    for report in (intel, amd):
        assert fence.unmet(report.offer) == ()
    other = Fence(FeatureSet.of(ARCHITECTURE, dict(zip(CATALOG.equal_words, AMD, strict=True))))
    assert {blocker.word for blocker in other.unmet(intel.offer)} == set(CATALOG.equal_words)
    assert other.unmet(amd.offer) == ()


def test_no_fence_over_hosts_without_a_baseline(intel: Report, amd: Report) -> None:
    with pytest.raises(Incompatible) as caught:
        Fence(meet(intel.offer, amd.offer))
    assert len(caught.value.blockers) == 3


WRONG = [
    # text, line, part of the message
    ("", 0, "names no architecture"),
    ("# only a comment\n", 0, "names no architecture"),
    ("architecture riscv64\n", 1, "no catalogue"),
    ("architecture x86_64_names\n", 1, "no catalogue"),
    ("architecture \n", 1, "architecture comes first"),
    (f"cpuid:0x1.0.edx {binary(1)}\n", 1, "architecture comes first"),
    (HEAD + "architecture x86_64\n", 2, "twice"),
    (HEAD + "\n# c\ncpuid:0x99.0.eax 0b1\n", 4, "no word of the catalogue"),
    (HEAD + "avx2\n", 2, "neither a word with its bits nor a number"),
    (HEAD + f"cpuid:0x1.0.edx {binary(1)} {binary(1)}\n", 2, "neither"),
    (HEAD + "cpuid:0x1.0.edx 0b1\n", 2, "32 binary digits"),
    (HEAD + f"cpuid:0x1.0.edx {binary(1, 33)}\n", 2, "32 binary digits"),
    (HEAD + f"cpuid:0x1.0.edx {binary(1)[2:]}\n", 2, "32 binary digits"),
    (HEAD + "cpuid:0x1.0.edx 0x0f8bfbff\n", 2, "32 binary digits"),
    (HEAD + "cpuid:0x1.0.edx 0b" + "2" * 32 + "\n", 2, "32 binary digits"),
    (HEAD + f"msr:0x10a {binary(1)}\n", 2, "64 binary digits"),
    (HEAD + f"cpuid:0x1.0.edx {binary(1)}\n" * 2, 3, "given twice, first on line 2"),
    (HEAD + f"cpuid:0x1.0.edx {binary(1 << 10)}\n", 2, "no feature of one bit lies at 10"),
    (HEAD + f"cpuid:0x1.0.edx {binary(1 << 28)}\n", 2, "no feature of one bit lies at 28"),  # ht: the VMM's
    (HEAD + f"cpuid:0x80000008.0.eax {binary(1)}\n", 2, "no feature of one bit lies at 0"),
    (HEAD + "cpuid:0x80000008.0.eax.phys-bits = 46\n" * 2, 3, "given twice"),
    (HEAD + "cpuid:0x80000008.0.eax.phys-bits = 256\n", 2, "number of 8 bits"),
    (HEAD + "cpuid:0x80000008.0.eax.phys-bits = -1\n", 2, "number of 8 bits"),
    (HEAD + "cpuid:0x80000008.0.eax.phys-bits = many\n", 2, "is no number"),
    (HEAD + "cpuid:0x80000008.0.eax.phys-bits =\n", 2, "is no number"),
    (HEAD + "cpuid:0x80000008.0.eax.phys-bits = " + "9" * 5000 + "\n", 2, "is no number"),
    (HEAD + "cpuid:0x80000008.0.eax.linear = 48\n", 2, "is no number of the catalogue"),
    (HEAD + "cpuid:0x7.0.eax.phys-bits = 46\n", 2, "is no number of the catalogue"),
    (HEAD + "cpuid:0x1.0.edx.fpu = 1\n", 2, "is no number of the catalogue"),
    (HEAD + "cpuid:0x1.0.ebx.initial-apic-id = 1\n", 2, "is no number of the catalogue"),
    (HEAD + "phys-bits = 46\n", 2, "no word of the catalogue"),
    (HEAD + "\ud800 0b1\n", 2, "no word of the catalogue"),
    (HEAD + "# hidden \u2028cpuid:0x1.0.edx x\ncpuid:0x1.0.edx x\n", 3, "32 binary digits"),
]


@pytest.mark.parametrize(("text", "line", "message"), WRONG)
def test_a_fence_edited_wrongly_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        Fence.parse(text, file="my.fence")
    assert caught.value.fields == {"file": "my.fence", "line": line or None}
    assert caught.value.message.startswith(f"my.fence:{line}: " if line else "my.fence: ")


def test_a_comment_cannot_hide_a_line() -> None:
    """A separator of Unicode starts no line: what an editor shows as a comment is one."""
    text = HEAD + f"# hidden\u2028cpuid:0x1.0.edx {binary(1)}\x0bcpuid:0x1.0.edx {binary(1)}\n"
    assert Fence.parse(text).granted == FeatureSet.empty(ARCHITECTURE)


def test_a_feature_without_its_base_is_a_mistake() -> None:
    text = HEAD + f"cpuid:0x7.0.ebx {binary(1 << 5)}  # avx2\n"
    with pytest.raises(BadInput, match="avx2 is granted without what it is built on") as caught:
        Fence.parse(text, file="f")
    assert caught.value.fields["line"] == 2
    assert "avx" in caught.value.hint
    text = HEAD + "msr:0x179.mce-banks = 10\n" + f"msr:0x179 {binary(0, 64)}\n"
    with pytest.raises(BadInput, match="mce-banks is granted without") as caught:
        Fence.parse(text, file="f")
    assert caught.value.fields["line"] == 2


def test_a_fence_has_a_size() -> None:
    with pytest.raises(BadInput, match=str(limits.FENCE_BYTES)):
        Fence.parse(HEAD + "#" * limits.FENCE_BYTES)
    assert Fence.parse(HEAD + "#" * (limits.FENCE_BYTES - len(HEAD))).granted == FeatureSet.empty(
        ARCHITECTURE
    )


PIECES = st.sampled_from(
    [
        *WORDS[:40],
        "=",
        "0b",
        "0b0101",
        binary(0),
        binary(1),
        "phys-bits",
        ".",
        "#",
        "\n",
        " ",
        "architecture",
        "x86_64",
        "1",
    ]
)


@given(st.lists(PIECES | st.text(max_size=4), max_size=30).map("".join))
def test_any_text_is_a_fence_or_refused(text: str) -> None:
    for whole in (text, HEAD + text):
        try:
            fence = Fence.parse(whole)
        except BadInput:
            continue
        assert Fence.parse(fence.text()).granted == fence.granted


@given(st.data())
def test_a_changed_text_is_refused_or_another_fence(data: st.DataObject) -> None:
    granted = data.draw(feature_sets())
    text = Fence(granted).text()
    at = data.draw(st.integers(0, len(text) - 1))
    changed = text[:at] + data.draw(st.sampled_from("01_xb=.# \n9a")) + text[at + 1 :]
    try:
        fence = Fence.parse(changed)
    except BadInput:
        return
    assert Fence.parse(fence.text()).granted == fence.granted
