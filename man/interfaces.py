# SPDX-License-Identifier: LGPL-2.1-or-later
"""Build-time only: org.kvmneg(7) from its prose and the commented interface files. Prints scdoc.

interfaces.py PROSE ERRORS INTERFACE...

PROSE is org.kvmneg.7.scd.in, ERRORS kvmneg/errors.py, each INTERFACE a .varlink file. A line of the prose that is
"@methods NAME@", "@types NAME@" or "@errors NAME@" gives way to that part of the interface of this name, in the
order of its file; "@common@" to the parameters that many methods have. What a member means stands in the interface
file alone.
"""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any, NamedTuple

_NAME = r"[A-Za-z][A-Za-z0-9]*"
_FIELD = re.compile(rf"({_NAME}): ([^,()]+?)(?:,|$)")
_MEMBER = re.compile(rf"(type|method|error) ({_NAME})\s*")
# Parameters that mean the same wherever they are: told once, under COMMON PARAMETERS.
_COMMON = frozenset(("reason", "expectedGeneration", "dryRun", "allowInteractiveAuthentication"))


class Group(NamedTuple):
    """Fields that one comment is about: names and types as the file has them; the comment's paragraphs."""

    fields: tuple[tuple[str, str], ...]
    comment: tuple[str, ...]


class Member(NamedTuple):
    """One type, method or error. `output` is a method's; the others have `fields` alone."""

    kind: str
    name: str
    comment: tuple[str, ...]
    fields: tuple[Group, ...]
    output: tuple[Group, ...]

    def plain(self) -> list[tuple[str, str]]:
        """Its fields, the comments left out."""
        return [field for group in self.fields for field in group.fields]


class Interface(NamedTuple):
    """One .varlink file."""

    name: str
    comment: tuple[str, ...]
    members: tuple[Member, ...]

    def of(self, kind: str) -> list[Member]:
        """Its types, methods or errors."""
        return [member for member in self.members if member.kind == kind]


def read(text: str) -> Interface:
    """An interface file. Raises ValueError for what it does not understand: a structure within a field, say."""
    lines, members = text.splitlines(), []
    name, about = "", []
    comment: list[str] = []
    while lines:
        line = lines.pop(0)
        if line.startswith("#"):
            comment.append(line)
            continue
        if line.startswith("interface "):
            name, about = line.split()[1], comment
        elif found := _MEMBER.match(line):
            body = line[found.end() :]
            while not _whole(body):
                body += "\n" + lines.pop(0)
            members.append(_member(found[1], found[2], comment, body))
        elif line:
            raise ValueError(f"not understood: {line}")
        comment = []
    return Interface(name, _paragraphs(about), tuple(members))


def _whole(body: str) -> bool:
    code = re.sub(r"#.*", "", body)
    return code.count("(") == code.count(")") > 0 and not code.rstrip().endswith("->")


def _member(kind: str, name: str, comment: list[str], body: str) -> Member:
    code = re.sub(r"#[^\n]*", lambda found: " " * len(found[0]), body)  # brackets of comments do not count
    arrow = code.index("->") if kind == "method" else len(code)
    fields = []
    for start, end in ((0, arrow), (arrow, len(code))):
        opened, closed = code.find("(", start, end), code.rfind(")", start, end)
        fields.append(_groups(body[opened + 1 : closed]) if opened >= 0 else ())
    return Member(kind, name, _paragraphs(comment), *fields)


def _groups(text: str) -> tuple[Group, ...]:
    """The fields between the brackets: what no empty line parts goes together, under one comment."""
    found = []
    for block in re.split(r"\n\s*\n", text.strip()):
        lines = [line.strip() for line in block.splitlines()]
        code = " ".join(line for line in lines if not line.startswith("#"))
        fields = tuple((name, kind.strip()) for name, kind in _FIELD.findall(code))
        if ", ".join(f"{name}: {kind}" for name, kind in fields) != code.rstrip(","):
            raise ValueError(f"not understood: {code}")
        if fields:
            found.append(Group(fields, _paragraphs([line for line in lines if line.startswith("#")])))
    return tuple(found)


def _paragraphs(lines: list[str]) -> tuple[str, ...]:
    text = "\n".join(line.removeprefix("#").strip() for line in lines)
    return tuple(" ".join(part.split()) for part in text.split("\n\n") if part.strip())


# -- as scdoc ---------------------------------------------------------------------------------------


def escaped(text: str) -> str:
    """Text that scdoc shows as it is, wherever its lines break; 'names' are underlined in the place of their quotes."""
    plain = re.sub(r"([\\*_#|\[\]~`-])", r"\\\1", text)
    return re.sub(rf"(?<!\w)'({_NAME})'(?!\w)", r"_\1_", plain)


def in_words(kind: str, *, output: bool) -> str:
    """A type as people say it: "?[]string" of an input is "list of string; may be left out"."""
    plain = kind.removeprefix("?")
    item = plain.removeprefix("[]").removeprefix("[string]")
    told = {"object": "JSON object", "bool": "boolean", "int": "integer"}.get(item, item)
    if plain.startswith("[]"):
        told = f"list of {told}"
    elif plain.startswith("[string]"):
        told = f"map from string to {told}"
    if plain == kind:
        return told
    return f"{told}, or null" if output else f"{told}; may be left out"


def _listed(groups: tuple[Group, ...], *, output: bool) -> list[str]:
    rows: list[str] = []
    for fields, comment in groups:
        names = [f"_{escaped(name)}_: {escaped(in_words(kind, output=output))}" for name, kind in fields]
        rows.append("++\n".join(names))  # one row: a line that goes on has no indentation of its own
        for number, paragraph in enumerate(comment):
            rows += ([""] if number else []) + ["\t" + escaped(paragraph)]
        rows.append("")
    return rows


def _told(interface: Interface, member: Member) -> tuple[list[str], str]:
    """What the comment of a method says, and the errors it lists last; of "as of X" those of X."""
    prose, _, listed = "\n".join(member.comment).partition("Errors: ")
    if found := re.fullmatch(r"as of (\w+)\.", listed):
        (other,) = (one for one in interface.of("method") if one.name == found[1])
        listed = _told(interface, other)[1]
    return [part.strip() for part in prose.split("\n") if part.strip()], listed


def common(interfaces: list[Interface]) -> tuple[Group, ...]:
    """What _COMMON mean, in the order in which they come. Raises ValueError where methods differ about it."""
    groups = dict.fromkeys(
        group for one in interfaces for method in one.of("method") for group in method.fields
    )
    shared = tuple(group for group in groups if _COMMON & {name for name, _ in group.fields})
    names = [name for group in shared for name, _ in group.fields]
    if sorted(names) != sorted(_COMMON):
        raise ValueError(f"not told with the same words everywhere: {', '.join(names)}")
    return shared


def methods(interface: Interface, shared: tuple[Group, ...]) -> list[str]:
    """What the interface is for; each method: what it does, its parameters, its reply, its errors."""
    rows = [row for part in interface.comment for row in (escaped(part), "")]
    for member in interface.of("method"):
        told, listed = _told(interface, member)
        rows += [f"## {interface.name}.{member.name}", ""]
        rows += [row for part in told for row in (escaped(part), "")]
        rows += _input(member, shared)
        rows += (
            ["*Reply*", "", *_listed(member.output, output=True)] if member.output else ["*Reply*: empty", ""]
        )
        rows += [f"*Errors*: {escaped(listed)}", ""] if listed else []
    return rows


def _input(method: Member, shared: tuple[Group, ...]) -> list[str]:
    own = tuple(group for group in method.fields if group not in shared)
    others = [f"_{name}_" for group in method.fields if group in shared for name, _ in group.fields]
    if not (own or others):
        return ["*Parameters*: none", ""]
    rows = ["*Parameters*", "", *_listed(own, output=False)] if own else []
    head = "Also" if own else "*Parameters*:"
    return [*rows, f"{head} {', '.join(others)}: see *COMMON PARAMETERS*", ""] if others else rows


def types(interface: Interface, seen: list[Member]) -> list[str]:
    """Each structure but those that an interface before has as well. `seen` is added to."""
    rows: list[str] = []
    given = {kind.strip("?[]") for method in interface.of("method") for _, kind in method.plain()}
    for member in interface.of("type"):
        same = [one for one in seen if (one.name, one.plain()) == (member.name, member.plain())]
        seen.append(member)
        if same:
            continue
        rows += [f"## {member.name} of {interface.name}", ""]
        rows += [row for part in member.comment for row in (escaped(part), "")]
        rows += _listed(member.fields, output=member.name not in given)
    return rows


def errors(interface: Interface, exits: dict[str, int], dbus: dict[str, str]) -> list[str]:
    """Each error: what it means and what to do, its own parameters, and what others tell it as."""
    rows: list[str] = []
    for member in interface.of("error"):
        name = f"{interface.name}.{member.name}"
        rows += [f"*{name}*", *(row for part in member.comment for row in ("\t" + escaped(part), ""))]
        for fields, comment in member.fields:
            own = tuple(
                field for field in fields if field[0] not in ("message", "hint")
            )  # every error has these
            if own:
                rows += ["\t" + row if row else "" for row in _listed((Group(own, comment),), output=True)]
        if name in dbus:
            rows += [f"\tExit status {exits[name]}. D\\-Bus: {dbus[name]}", ""]
    return rows


def page(prose: str, table: dict[str, Any], interfaces: list[Interface]) -> str:
    """The page. `table` is kvmneg.errors, as runpy gives it. Raises ValueError for what the prose leaves out."""
    exits = {error.varlink: error.exit_code for error in table["family"]()}
    dbus = {name: table["dbus_name"](name) for name in exits}
    shared = common(interfaces)
    seen: list[Member] = []
    parts = {"@common@": _listed(shared, output=False)}
    for one in interfaces:
        parts[f"@methods {one.name}@"] = methods(one, shared)
        parts[f"@types {one.name}@"] = types(one, seen)
        parts[f"@errors {one.name}@"] = errors(one, exits, dbus)
    missing = {place for place, rows in parts.items() if rows} - set(prose.splitlines())
    if missing:
        raise ValueError(f"the prose has no place for {', '.join(sorted(missing))}")
    return "".join(f"{row}\n" for line in prose.splitlines() for row in parts.get(line, [line]))


def main() -> None:
    prose, table, *files = sys.argv[1:]
    interfaces = [read(Path(file).read_text("utf-8")) for file in files]
    text = page(Path(prose).read_text("utf-8"), runpy.run_path(table), interfaces)
    sys.stdout.buffer.write(text.encode("utf-8"))


if __name__ == "__main__":
    main()
