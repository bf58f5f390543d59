# SPDX-License-Identifier: LGPL-2.1-or-later
"""Documents from elsewhere: truncated, newer, huge, nested, of wrong types. Only BadInput ever comes out."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features.report import Report, parse_json
from kvmneg.policy.contract import Contract
from kvmneg.policy.fence_text import Fence

DATA = Path(__file__).parents[1] / "unit" / "data" / "intel-ice-lake.json"
BYTES = DATA.read_bytes()
DOCUMENT: dict[str, Any] = json.loads(BYTES)
UNTIMED = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


def changed(**sections: object) -> bytes:
    return json.dumps({**DOCUMENT, **sections}).encode()


def refused(data: bytes) -> BadInput:
    with pytest.raises(BadInput) as caught:
        Report.loads(data, file="node7.json")
    assert caught.value.message.startswith("node7.json") and caught.value.fields["file"] == "node7.json"
    assert caught.value.exit_code == 5
    assert len(caught.value.message) < 1000
    return caught.value


def test_the_report_itself_is_good() -> None:
    assert Report.loads(BYTES).host == "node-intel"


def test_every_truncation_is_refused() -> None:
    whole = len(BYTES.rstrip())
    for length in [*range(200), *range(200, whole, 37), whole - 1]:
        error = refused(BYTES[:length])
        assert "cut short" in error.message, length
        assert error.fields["line"] in {
            BYTES[:length].count(b"\n") + 1,
            BYTES[:length].rstrip().count(b"\n") + 1,
        }


def test_a_report_of_a_newer_kvmneg_says_so() -> None:
    error = refused(changed(format="kvmneg.report/2"))
    assert "newer kvmneg (kvmneg.report/2" in error.message and "update" in error.hint


@pytest.mark.parametrize(
    "form", [None, 1, "", "kvmneg.report", "kvmneg.report/x", "kvmneg.contract/1", [], {}]
)
def test_another_document_is_no_report(form: object) -> None:
    assert "not a report" in refused(changed(format=form)).message


@pytest.mark.parametrize(
    "architecture", [None, 1, "", "riscv64", "x86_64_names", "arm64_names", [], {}, ["x86_64"]]
)
def test_another_architecture_is_refused(architecture: object) -> None:
    assert "arm64" in refused(changed(architecture=architecture)).message


def test_unknown_keys_are_of_a_newer_writer_and_left_alone() -> None:
    report = Report.loads(changed(future={"a": [1, None]}, note="x"))
    assert report.offer == Report.loads(BYTES).offer


def test_unknown_words_are_kept_and_not_offered() -> None:
    report = Report.loads(changed(offer={**DOCUMENT["offer"], "cpuid:0x77.3.ecx": "0xffffffff"}))
    assert report.unclassified() == {"cpuid:0x77.3.ecx": 0xFFFF_FFFF}
    assert report.offer == Report.loads(BYTES).offer


@pytest.mark.parametrize("section", ["offer", "accept", "silicon"])
@pytest.mark.parametrize(
    "words",
    [None, 1, "x", [], True, {"cpuid:0x7": "0x0"}, {"": "0x0"}, {"CPUID:0x7.0.ebx": "0x0"}, {"cpuid:0x7.0.ebx": 5},
     {"cpuid:0x7.0.ebx": None}, {"cpuid:0x7.0.ebx": "0x100000000"}, {"cpuid:0x7.0.ebx": "5"}, {"msr:0x10a": "-0x1"},
     {"cpuid:0x7.0.ebx": ["0x0"]}, {"cpuid:0x7.0.ebx": "0x" + "0" * 5000}],
)  # fmt: skip
def test_wrong_words(section: str, words: object) -> None:
    assert section in refused(changed(**{section: words})).message


@pytest.mark.parametrize("section", ["measured", "combo", "identity", "enforcement"])
@pytest.mark.parametrize("value", [None, 1, "x", [], True])
def test_wrong_sections(section: str, value: object) -> None:
    assert f"{section} is not a JSON object" in refused(changed(**{section: value})).message


@pytest.mark.parametrize("section", ["measured", "enforcement"])
def test_sections_of_strings(section: str) -> None:
    assert f"{section} holds strings" in refused(changed(**{section: {"host": 7}})).message


@pytest.mark.parametrize("text", ["\x1b[2J", "a\nb", "\ud800", "\x00", "\u202e"])
def test_nothing_that_a_terminal_obeys(text: str) -> None:
    """A host's name is printed on an admin's terminal: another machine does not get to write there."""
    assert "cannot be printed" in refused(changed(measured={"host": text})).message
    assert "cannot be printed" in refused(changed(combo={"vmms": [{text: "x"}]})).message
    assert "cannot be printed" in refused(changed(identity={"vendor": text})).message


def test_no_offer() -> None:
    document = {key: value for key, value in DOCUMENT.items() if key != "offer"}
    assert "has no offer" in refused(json.dumps(document).encode()).message


def test_too_many_words() -> None:
    words = {f"msr:{index:#x}": "0x0" for index in range(limits.WORDS + 1)}
    assert str(limits.WORDS) in refused(changed(offer=words)).message
    del words["msr:0x0"]
    assert len(Report.loads(changed(offer=words)).offer_words) == limits.WORDS


@pytest.mark.parametrize("unit", [b"\0", b"\xff", b"{", b"[", b'"', b"9", b" ", b"kvmneg "])
def test_ten_mebibytes_of_junk(unit: bytes) -> None:
    error = refused(unit * (10 * 1024 * 1024 // len(unit)))
    assert str(limits.REPORT_BYTES) in error.message
    error = refused((unit * limits.REPORT_BYTES)[: limits.REPORT_BYTES])
    assert "not JSON" in error.message


@pytest.mark.parametrize("opening", ["[", '{"a":', '[{"combo":'])
def test_a_hundred_thousand_deep(opening: str) -> None:
    assert "not JSON" in refused(opening.encode() * 100_000).message
    closing = opening.replace("[", "]").replace("{", "}").replace('"a":', "").replace('"combo":', "")[::-1]
    assert "not JSON" in refused((opening * 100_000 + "1" + closing * 100_000).encode()).message


def test_nested_sections() -> None:
    nest: Any = "x"
    for _ in range(limits.NESTING_DEPTH):
        nest = [nest]
    assert "nested more than" in refused(changed(combo={"a": nest})).message
    assert Report.loads(changed(combo={"a": nest[0][0]}))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "9" * 5000, "1e999999999"])
def test_numbers_that_are_none(text: str) -> None:
    document = changed(measured={"host": "@"}).replace(b'"@"', text.encode())
    refused(document)


def test_a_key_named_twice() -> None:
    twice = BYTES.replace(b'"offer":', b'"offer": {}, "offer":', 1)
    assert "names a key twice" in refused(twice).message


@pytest.mark.parametrize(
    "data", [b"", b" ", b"null", b"[]", b'"x"', b"1", b"{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}{}"]
)
def test_small_junk(data: bytes) -> None:
    refused(data)


@UNTIMED
@given(
    st.binary(max_size=200) | st.text(max_size=100).map(lambda text: text.encode("utf-8", "surrogatepass"))
)
def test_any_bytes(data: bytes) -> None:
    with pytest.raises(BadInput):
        Report.loads(data)
    with pytest.raises(BadInput):
        Contract.from_binary(data)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(("0x0", "0x1", "sse2")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def paths(value: object, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [here, *(path for key, item in items for path in paths(item, (*here, key)))]


PATHS = paths(DOCUMENT)


@UNTIMED
@given(st.lists(st.tuples(st.sampled_from(PATHS), JSON, st.booleans()), min_size=1, max_size=3))
def test_any_value_at_any_place(changes: list[tuple[tuple[Any, ...], Any, bool]]) -> None:
    """Wherever another value stands, the report is refused with BadInput or is one: it writes itself again."""
    document: Any = copy.deepcopy(DOCUMENT)
    for path, value, renamed in changes:
        holder = document
        try:
            for key in path[:-1]:
                holder = holder[key]
            if not path:
                document = value
            elif renamed and isinstance(holder, dict):
                holder[str(value)] = holder.pop(path[-1])
            else:
                holder[path[-1]] = value
        except (KeyError, TypeError, IndexError, AttributeError):
            continue
    try:
        report = Report.loads(json.dumps(document).encode())
    except BadInput:
        return
    again = Report.loads(json.dumps(report.to_json()).encode())
    assert again.offer == report.offer and again.accept == report.accept
    assert again.digest() == report.digest()
    assert Fence.parse(Fence(report.offer).text()).granted == report.offer


def test_parse_json_names_the_line() -> None:
    with pytest.raises(BadInput, match=r"^f:3: not JSON: .*column 1"):
        parse_json(b'{\n"a": 1\n"b": 2}', file="f", limit=100)
    with pytest.raises(BadInput, match="larger than 3 bytes"):
        parse_json(b"[1] ", file="f", limit=3)
    assert parse_json(b"[1]", file="f", limit=3) == [1]
