# SPDX-License-Identifier: LGPL-2.1-or-later
"""The manual pages tell every command, option, error and JSON field, and render without errors."""

import argparse
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmneg import errors, limits
from kvmneg.cli import COMMANDS, arguments
from kvmneg.service import settings
from kvmneg.service.interfaces import introspection

TOP = Path(__file__).parents[2]
MAN = TOP / "man"
PAGES = (
    "kvmneg.1", "kvmnegd.8", "libkvmneg.3", "libkvmneg-client.3", "kvmneg-pytest.7", "org.kvmneg1.7", "kvmneg.toml.5",
    "org.kvmneg.7",
)  # fmt: skip
CLIENT = MAN.parent / "client"


# What mandoc says of scdoc's own output, whatever the page.
HARMLESS = ("WARNING: skipping paragraph macro: PP ",)


def source(page: str) -> str:
    """What scdoc is given: a file, or of org.kvmneg(7) what is made of the interface files."""
    if page != "org.kvmneg.7":
        return (MAN / f"{page}.scd").read_text("utf-8")
    command = [
        sys.executable,
        "-P",
        MAN / "interfaces.py",
        MAN / "org.kvmneg.7.scd.in",
        TOP / "kvmneg/errors.py",
    ]
    files = [TOP / f"kvmneg/service/interfaces/{name}.varlink" for name in introspection.INTERFACES]
    return subprocess.run([*command, *files], capture_output=True, check=True).stdout.decode("utf-8")


def options(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every option of a parser and of the parsers below it."""
    for action in parser._actions:
        yield from (text for text in action.option_strings if text.startswith("--"))
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from options(below)


def section(page: str, command: str) -> str:
    """The part of the page that is the command's: its own heading to the next, fence's verbs together."""
    parts = re.findall(
        rf"^## {command}\b.*?(?=^## (?!{command}\b)|^# )", source(page), re.DOTALL | re.MULTILINE
    )
    assert parts, f"kvmneg(1) has no section on {command}"
    return "\n".join(parts)


def of_every_command(page: str) -> str:
    """The parts that hold for several commands: common options and the request's."""
    return source(page).partition("# COMMANDS")[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_of_a_command_is_on_its_page(command: str) -> None:
    told = section("kvmneg.1", command)
    request = {
        "--max",
        "--level",
        "--require",
        "--optional",
        "--exact",
        "--require-enforced",
        "--tsc-khz",
        "--vmm",
    }
    common = {"--json", "--socket", "--no-ask-password", "--help", *request}
    for option in options(arguments.parser_of(command)):
        place = of_every_command("kvmneg.1") if option in common else told
        assert f"*{option}" in place, f"kvmneg {command} {option}"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_in_the_synopsis_with_its_required_options(command: str) -> None:
    synopsis = source("kvmneg.1").partition("# SYNOPSIS")[2].partition("# DESCRIPTION")[0]
    assert f"*kvmneg {command}" in synopsis


@pytest.mark.parametrize("command", COMMANDS)
def test_no_section_tells_of_an_option_that_its_command_does_not_have(command: str) -> None:
    terms = re.findall(r"^\*--.*$", section("kvmneg.1", command), re.MULTILINE)
    told = {option for term in terms for option in re.findall(r"\*(--[a-z-]+)", term)}
    assert told <= set(options(arguments.parser_of(command)))


def synopses() -> Iterator[tuple[str, list[str], set[str]]]:
    """Of each line of the synopsis the command, its verbs, and the options it names."""
    text = source("kvmneg.1").partition("# SYNOPSIS")[2].partition("# DESCRIPTION")[0]
    for line in re.findall(r"^\*kvmneg [a-z].*$", text, re.MULTILINE):
        bold = re.findall(r"\*([^*]+)\*", line)
        words = bold[0].split(" ")[1:]
        verbs_of = words[1:] + [word for word in bold[1:] if word.isalpha()]
        yield words[0], verbs_of, {word.split(" ")[0] for word in bold if word.startswith("--")}


def test_the_synopsis_has_every_verb_and_its_own_options_only() -> None:
    shown: dict[str, set[str]] = {}
    for command, named, told in synopses():
        parser = arguments.parser_of(command)
        below = (
            {
                verb: one
                for action in parser._subparsers._group_actions
                for verb, one in action.choices.items()
            }
            if verbs(parser)
            else {}
        )  # type: ignore[union-attr]
        shown.setdefault(command, set()).update(named)
        for one in [below[verb] for verb in named] or [parser]:
            assert told <= set(options(one)), (command, named)
            required = {
                action.option_strings[0]
                for action in one._actions
                if action.required and action.option_strings
            }
            assert required <= told, (command, named)
    assert {command: names for command, names in shown.items() if names} == {
        command: set(verbs(arguments.parser_of(command)))
        for command in COMMANDS
        if verbs(arguments.parser_of(command))
    }


def test_every_option_on_the_page_exists() -> None:
    known = {option for command in COMMANDS for option in options(arguments.parser_of(command))}
    told = set(re.findall(r"\*(--[a-z-]+)", source("kvmneg.1")))
    assert told <= known | {"--version", "--help"}


def test_every_option_of_the_daemon_is_on_its_page() -> None:
    shown = subprocess.run(
        [sys.executable, "-P", "-m", "kvmneg.service.daemon", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    found = set(re.findall(r"(?<!\S)(--[a-z-]+)", shown))
    assert "--socket" in found
    page = source("kvmnegd.8")
    terms = re.findall(
        r"^(?:\*-h\*, )?\*(--[a-z-]+)\*", page.partition("# OPTIONS")[2].partition("\n# ")[0], re.MULTILINE
    )
    assert set(terms) == found
    synopsis = page.partition("# SYNOPSIS")[2].partition("# DESCRIPTION")[0]
    assert set(re.findall(r"\*(--[a-z-]+)\*", synopsis)) == found - {"--help", "--version"}


def test_every_exit_code_is_on_the_page() -> None:
    told = source("kvmneg.1").partition("# EXIT STATUS")[2]
    for code in {error.exit_code for error in errors.family()}:
        assert f"*{code}*\n" in told


def verbs(parser: argparse.ArgumentParser) -> list[str]:
    found = [action.choices for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    return list(found[0]) if found else []


def test_every_command_that_prints_json_has_its_shape_on_the_page() -> None:
    """Each command, or each of its verbs, is a term of the section JSON: "vm started, saved", "features"."""
    told = set()
    for term in re.findall(
        r"^([a-z].*)$", source("kvmneg.1").partition("\n# JSON\n")[2].partition("\n# ")[0], re.MULTILINE
    ):
        command = ""
        for one in re.sub(r" \(.*\)", "", term).split(", "):
            first, _, verb = one.partition(" ")
            command, verb = (first, verb) if first in COMMANDS else (command, first)
            told.add(f"{command} {verb}".strip())
    for command in COMMANDS:
        for verb in verbs(arguments.parser_of(command)) or [""]:
            assert f"{command} {verb}".strip() in told, f"{command} {verb}"


@pytest.mark.parametrize("page", PAGES)
def test_examples_fit_a_screen_and_lose_no_backslash(page: str) -> None:
    """80 columns, of which 11 are the margin. scdoc takes a backslash away from what follows it, in examples too."""
    for text in re.findall(r"^```\n(.*?)^```$", source(page), re.DOTALL | re.MULTILINE):
        shown = re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)
        assert max(map(len, shown.splitlines())) <= 69, text
        assert not re.search(r"(?<!\\)(?:\\\\)*\\[^\\*_]", text), text


SECTIONS = {page.rpartition(".")[0]: page.rpartition(".")[2] for page in PAGES}
# Of others' packages, which are not here to be looked at.
OTHERS = {
    "busctl(1)", "pkttyagent(1)", "cpuid(1)", "free(3)", "ioctl(2)", "polkit(8)", "pytest(1)", "qemu-system-x86_64(1)",
    "systemd.service(5)", "systemd.socket(5)", "varlinkctl(1)",
}  # fmt: skip


def plain(text: str) -> str:
    """Without examples, and without what makes words bold or underlined."""
    return re.sub(
        r"\*|\\|(?<!\w)_|_(?!\w)", "", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_page_that_is_referred_to_is_there(page: str) -> None:
    text = plain(source(page).partition("\n")[2])
    found = set(re.findall(r"(?<![\w.-])([a-z][\w.-]*)\(([1-9])\)", text))
    ours = {f"{name}({number})" for name, number in SECTIONS.items()}
    assert {f"{name}({number})" for name, number in found} <= ours | OTHERS
    also = text.partition("# SEE ALSO")[2]
    referred = {name for name in ours if re.search(rf"(?<![\w.-]){re.escape(name)}", also)}
    assert referred, "it leads nowhere"
    assert f"{page.rpartition('.')[0]}({page.rpartition('.')[2]})" not in referred


@pytest.mark.parametrize(
    "number",
    [
        limits.CALL_BYTES // 1024,
        limits.NESTING_DEPTH,
        limits.CONNECTIONS,
        limits.CONNECTIONS_PER_UID,
        limits.WATCHERS,
        limits.LEASES,
        limits.LEASES_PER_UID,
        limits.ROLLBACK_COMBOS,
        int(limits.FIRST_CALL_SECONDS),
        int(limits.LEASE_UNSTARTED_SECONDS),
    ],
)
def test_the_limits_on_the_page_are_the_limits(number: int) -> None:
    told = source("kvmnegd.8").partition("# LIMITS")[2].partition("\n# ")[0]
    assert re.search(rf"(?<!\d){number}(?!\d)", told)


def test_every_function_limit_and_error_of_the_c_client_is_on_its_page() -> None:
    header = (CLIENT / "kvmneg-client.h").read_text("utf-8")
    page = source("libkvmneg-client.3")
    synopsis, _, told = page.partition("# DESCRIPTION")
    functions = set(re.findall(r"\b(kvmneg_\w+)\(", header)) - {
        "kvmneg_contract_open",
        "kvmneg_contract_free",
    }
    assert {f"{function}(" for function in functions} == set(re.findall(r"kvmneg_\w+\(", synopsis))
    limits_of = dict(re.findall(r"(KVMNEG_CLIENT_\w+_MAX) = ([\d *]+),", header))
    assert len(limits_of) == 4
    for name, value in limits_of.items():
        number = math.prod(map(int, value.split("*")))
        shown = {64 * 1024: "64 KiB", 1024 * 1024: "1 MiB"}.get(number, str(number))
        assert re.search(rf"\*{name}\*,\s+{shown}\b", told), name
    assert set(re.findall(r"-E[A-Z]+\b", header)) == set(re.findall(r"-E[A-Z]+\b", told))


def test_every_option_fixture_property_and_argument_of_the_plugin_is_on_its_page() -> None:
    page = source("kvmneg-pytest.7")
    plugin = (MAN.parent / "kvmneg/pytest_plugin.py").read_text("utf-8")
    told = set(re.findall(r"^\*([a-z_-]+)\*", page, re.MULTILINE))
    options_of = set(re.findall(r'addoption\(\s*"(--[a-z-]+)"', plugin))
    fixtures = set(re.findall(r"^@pytest.fixture.*\ndef (\w+)\(", plugin, re.MULTILINE))
    properties = set(
        re.findall(r'"(kvm-[a-z]+)": ', (MAN.parent / "kvmneg/testing/host.py").read_text("utf-8"))
    )
    arguments_of = {"requires", "level", "enforced"}
    assert (len(options_of), len(fixtures), len(properties)) == (3, 3, 6)
    assert {*options_of, *fixtures, *properties, *arguments_of} <= told
    for reason in ("no usable KVM:", "KVM cannot give it:", "KVM does not keep to the contract:"):
        assert f"_{reason}_" in page
        assert reason in (MAN.parent / "kvmneg/testing/needs.py").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_a_page_renders(page: str, tmp_path: Path) -> None:
    if not shutil.which("scdoc"):
        pytest.skip("scdoc is not installed")
    made = subprocess.run(["scdoc"], input=source(page), capture_output=True, text=True, check=False)
    assert made.returncode == 0, made.stderr
    rendered = tmp_path / page
    rendered.write_text(made.stdout, "utf-8")
    if not shutil.which("mandoc"):
        pytest.skip("mandoc is not installed")
    linted = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning", rendered], capture_output=True, text=True, check=False
    )
    found = [
        line for line in linted.stdout.splitlines() if not any(harmless in line for harmless in HARMLESS)
    ]
    assert found == []


def test_every_function_of_the_library_is_on_its_page() -> None:
    script = (MAN.parent / "csrc/libkvmneg.map").read_text("ascii")
    named = set(re.findall(r"^\s+(kvmneg_\w+);$", script, re.MULTILINE))
    assert len(named) > 30
    told = set(re.findall(r"kvmneg_[a-z0-9_]*[a-z0-9]", source("libkvmneg.3").replace("\\", "")))
    assert named <= told
    structures = set(
        re.findall(r"^struct (kvmneg_\w+)", (MAN.parent / "csrc/kvmneg.h").read_text("utf-8"), re.MULTILINE)
    )
    assert told <= named | structures


def test_every_setting_is_on_its_page_and_no_other() -> None:
    part = source("kvmneg.toml.5").partition("# SETTINGS")[2].partition("\n# ")[0]
    assert set(re.findall(r"^\*([a-z-]+)\* = ", part, re.MULTILINE)) == set(settings.KEYS)
