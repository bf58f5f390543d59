# SPDX-License-Identifier: LGPL-2.1-or-later
"""org.kvmneg(7) and org.kvmneg1(7) against the interface files, as others' parsers read them."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from varlink import scanner

from kvmneg import errors, limits
from kvmneg.service import authorization
from kvmneg.service.interfaces import introspection

TOP = Path(__file__).parents[2]
MAN = TOP / "man"
DESCRIPTIONS = {name: introspection.description(name) for name in introspection.INTERFACES}
GENERATOR = runpy.run_path(str(MAN / "interfaces.py"), run_name="interfaces")
PROSE = (MAN / "org.kvmneg.7.scd.in").read_text("utf-8")
PAGE: str = GENERATOR["page"](
    PROSE,
    runpy.run_path(str(TOP / "kvmneg/errors.py")),
    [GENERATOR["read"](text) for text in DESCRIPTIONS.values()],
).replace("\\", "")  # as it is read, not as scdoc needs it


def members(kind: type) -> dict[str, Any]:
    """The methods or errors of all interfaces, by their full names."""
    found = {}
    for interface, text in DESCRIPTIONS.items():
        parts = scanner.Interface(text).members
        found |= {f"{interface}.{name}": one for name, one in parts.items() if isinstance(one, kind)}
    return found


def sections(level: str, page: str = PAGE) -> dict[str, str]:
    """The text below each heading of a level: "#" or "##"."""
    parts = re.split(rf"^{level} (.*)\n", page, flags=re.MULTILINE)
    return {
        name: re.split(r"^#", text, flags=re.MULTILINE)[0]
        for name, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def told(text: str) -> list[tuple[str, bool]]:
    """The fields that a text tells of, and whether each may be null."""
    rows = re.findall(r"^\t*_(\w+)_: (.*?)(?:\+\+)?$", text, re.MULTILINE)
    return [(name, kind.endswith((", or null", "; may be left out"))) for name, kind in rows]


def declared(structure: Any) -> list[tuple[str, bool]]:
    return [(name, isinstance(kind, scanner._Maybe)) for name, kind in structure.fields.items()]


def test_every_method_has_a_section_and_no_section_is_of_none():
    names = [name for name in sections("##") if name.startswith("org.") and " " not in name]
    assert len(names) == len(set(names)) > 30
    assert set(names) == set(members(scanner._Method))


@pytest.mark.parametrize("method", members(scanner._Method))
def test_a_method_has_its_parameters_and_its_reply(method):
    member = members(scanner._Method)[method]
    given, _, replied = sections("##")[method].partition("\n*Reply*")
    shared = re.search(r"^.*: see \*COMMON PARAMETERS\*$", given, re.MULTILINE)
    elsewhere = set(re.findall(r"_(\w+)_", shared[0])) if shared else set()
    common = dict(told(sections("#")["COMMON PARAMETERS"]))
    assert elsewhere <= common.keys()
    inputs = declared(member.in_type)
    assert told(given) == [field for field in inputs if field[0] not in elsewhere]
    assert elsewhere == {name for name, _ in inputs} & common.keys()
    assert all(common[name] == maybe for name, maybe in inputs if name in elsewhere)
    assert told(replied) == declared(member.out_type)


def test_a_method_tells_what_it_does_before_its_parameters():
    for method in members(scanner._Method):
        first = sections("##")[method].strip().partition("\n")[0]
        assert len(first) > 10, method
        assert not first.startswith("*"), method


def test_every_comment_of_the_interfaces_is_on_the_page():
    """Line by line, but for types that stand there as another interface's, and lists of errors."""

    def words(text: str) -> str:
        return " ".join(re.sub(r"[_'*]", "", text).split())

    flat, left_out, counted = (
        words(PAGE),
        {"Why not: as in org.kvmneg.", "One reason, as in org.kvmneg.", "As in org.kvmneg."},
        0,
    )
    for text in DESCRIPTIONS.values():
        prose = re.sub(r"^# Errors:.*(?:\n#.*)*", "", text, flags=re.MULTILINE)
        for line in re.findall(r"^ *# (.*)$", prose, re.MULTILINE):
            if not line.startswith("SPDX") and line not in left_out:
                assert words(line) in flat, line
                counted += 1
    assert counted > 300


def test_what_is_for_admins_says_so():
    """What takes a reason, and the audit, which names users: the daemon asks each for an admin."""
    known = {name for name, one in members(scanner._Method).items() if "reason" in one.in_type.fields}
    found = {name for name, text in sections("##").items() if re.search(r"\bFor admins\.", text)}
    assert found == {*known, "org.kvmneg.Fence.Audit"}


def test_the_errors_that_a_method_names_exist():
    known = {name.rpartition(".")[2] for name in members(scanner._Error)} | set(members(scanner._Error))
    counted = 0
    for method, text in sections("##").items():
        for listed in re.findall(r"^\*Errors\*: (.*)\.$", text, re.MULTILINE):
            names = re.sub(r"\(.*?\)", "", listed)
            for name in names.split(","):
                assert not name.strip() or name.strip() in known, (method, name)
                counted += 1
    assert counted > 100


def test_every_type_has_its_fields():
    """Those of several interfaces once: they have to be the same then."""
    known: dict[tuple[str, str], Any] = {}
    for interface, text in DESCRIPTIONS.items():
        for name, alias in scanner.Interface(text).members.items():
            if isinstance(alias, scanner._Alias):
                known[name, interface] = declared(alias.type)
    found = {}
    for heading, text in sections("##").items():
        if match := re.fullmatch(r"(\w+) of (org\.[\w.]+)", heading):
            found[match[1], match[2]] = told(text)
    assert found.items() <= known.items()
    for (name, interface), fields in known.items():
        if (name, interface) not in found:
            assert any(one == name and fields == rows for (one, _), rows in found.items()), (name, interface)


def test_every_error_has_its_parameters_its_exit_status_and_its_name_by_dbus():
    part = PAGE.partition("\n# ERRORS\n")[2].partition("\n# ")[0]
    rows = re.split(r"^\*(org\.\S+)\*$", part, flags=re.MULTILINE)
    found = dict(zip(rows[1::2], rows[2::2], strict=True))
    known = members(scanner._Error)
    assert sorted(found) == sorted(known)
    for name, text in found.items():
        fields = [field for field in declared(known[name].type) if field[0] not in ("message", "hint")]
        assert told(text) == fields, name
        error = errors.BY_VARLINK_NAME.get(name)
        tail = f"\tExit status {error.exit_code}. D-Bus: {errors.dbus_name(name)}\n" if error else "\n"
        assert tail in text, name
        assert ("Exit status" in text) == bool(error), name


def test_every_call_can_be_found():
    """Each method stands under FINDING A CALL, by its full name or behind one of its interface."""
    found = set()
    for line in re.findall(r"^(\*.*)$", sections("#")["FINDING A CALL"], re.MULTILINE):
        interface = ""
        for name in re.findall(r"\*([\w.]+)\*", line):
            interface = name.rpartition(".")[0] or interface
            found.add(f"{interface}.{name.rpartition('.')[2]}")
    assert found == set(members(scanner._Method))


def test_every_action_of_polkit_is_told():
    part = re.findall(r"^\*org\.kvmneg1.*$", sections("#")["WHO MAY CALL"], re.MULTILINE)
    names = {name.rpartition(".")[2] for line in part for name in re.findall(r"\*([\w.]+)\*", line)}
    assert names == set(authorization.ACTIONS)


def test_the_limits_are_the_limits():
    rows = re.findall(r"\*([A-Z_]+)\*, (\d+)", sections("#")["LIMITS"])
    assert len(rows) > 10
    assert {name: int(value) for name, value in rows} == {
        name: int(getattr(limits, name)) for name, _ in rows
    }
    assert f"{limits.REPLY_BYTES >> 20} MiB" in sections("#")["LIMITS"]
    assert limits.GENERATIONS == 1 << 53
    assert f"up to {limits.MEASURE_SECONDS:g} seconds" in sections("#")["CALLS AND REPLIES"]


def test_the_build_makes_the_same_page(tmp_path):
    """By the command that meson runs, outside of this process."""
    files = [TOP / f"kvmneg/service/interfaces/{name}.varlink" for name in introspection.INTERFACES]
    command = [
        sys.executable,
        "-P",
        MAN / "interfaces.py",
        MAN / "org.kvmneg.7.scd.in",
        TOP / "kvmneg/errors.py",
        *files,
    ]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True)
    assert made.stdout.decode("utf-8").replace("\\", "") == PAGE


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("interface x.y\nmethod A(a: (b: int)) -> ()\n", "not understood"),
        ("interface x.y\nmethod A(a: int) -> ()\nenum B (a, b)\n", "not understood"),
        ("interface x.y\ntype A (one, two)\n", "not understood"),
    ],
)
def test_what_the_generator_does_not_understand_it_refuses(text, fault):
    with pytest.raises(ValueError, match=fault):
        GENERATOR["read"](text)


def test_prose_without_a_place_is_refused():
    interfaces = [GENERATOR["read"](text) for text in DESCRIPTIONS.values()]
    table = runpy.run_path(str(TOP / "kvmneg/errors.py"))
    with pytest.raises(ValueError, match=r"@types org\.kvmneg\.Guests@"):
        GENERATOR["page"](PROSE.replace("@types org.kvmneg.Guests@\n", ""), table, interfaces)


# -- D-Bus ------------------------------------------------------------------------------------------

XML = ElementTree.parse(TOP / "units/org.kvmneg1.xml").getroot()
DBUS = (MAN / "org.kvmneg1.7.scd").read_text("utf-8")


def signature(member: ElementTree.Element) -> str:
    """As the page has it: *Name*(s _in_) -> s _out_; signals have no direction."""
    arguments = {"in": [], "out": []}  # type: dict[str, list[str]]
    for one in member.findall("arg"):
        arguments[one.get("direction", "in")].append(f"{one.get('type')} _{one.get('name')}_")
    output = f" -> {', '.join(arguments['out'])}" if arguments["out"] else ""
    return f"*{member.get('name')}*({', '.join(arguments['in'])}){output}"


@pytest.mark.parametrize("interface", [one.get("name") for one in XML.findall("interface")])
def test_every_method_signal_and_property_by_dbus_is_on_its_page(interface):
    (node,) = (one for one in XML.findall("interface") if one.get("name") == interface)
    part = sections("##", DBUS)[interface]
    told_calls = re.findall(r"^(\*\w+\*\(.*)$", part, re.MULTILINE)
    calls = [signature(one) for one in node if one.tag in ("method", "signal")]
    assert sorted(told_calls) == sorted(calls)
    properties = {one.get("name"): one.get("type") for one in node.findall("property")}
    found = dict(re.findall(r"^\*(\w+)\*\n\t.*?\((\w+)\)", part, re.MULTILINE))
    assert found == properties


def test_every_interface_by_dbus_is_on_its_page():
    assert [name for name in sections("##", DBUS) if name.startswith("org.")] == [
        one.get("name") for one in XML.findall("interface")
    ]


def test_every_error_by_dbus_is_on_its_page():
    """But what never leaves the daemon, and what only Watch and Begin give, which D-Bus does not have."""
    never = {errors.Unreachable, errors.VmmFault, errors.NotApplied, errors.SlowWatcher, errors.StaleOffer}
    sent = {errors.dbus_name(error.varlink) for error in set(errors.family()) - never}
    found = set(re.findall(r"^\*(org\.kvmneg1\.Error\.\w+)\*$", DBUS, re.MULTILINE))
    assert found == sent
