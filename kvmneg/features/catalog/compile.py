# SPDX-License-Identifier: LGPL-2.1-or-later
"""Build-time only: the catalogue's TOML tables become two Python modules, so that loading them is free.

    python compile.py --architecture x86_64 --output-dir DIR TABLE.toml …

writes DIR/_x86_64.py (masks, fields and dependencies: all that merging needs) and DIR/_x86_64_names.py (what
people call the features). A feature without a rule, a name used twice, an unknown name in `requires` or two
features on one bit stop the build.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

_WORD_KEYS = ("rule", "why", "controls")
_TEXT_KEYS = ("title", "why", "withheld", "qemu", "linux", "libvirt", "vendor", "settable")
_PLACE_KEYS = (
    "bit", "bits", "rule", "requires", "value", "unset", "with", "default1", "msr", "capability", "flag",
)  # fmt: skip
_FEATURE_KEYS = frozenset(_PLACE_KEYS + _TEXT_KEYS)
_REQUIREMENT = re.compile(r"(?P<absent>!?)(?P<name>[a-z0-9.-]+)(?:>=(?P<least>0x[0-9a-f]+|[1-9][0-9]*))?")
_NAME = re.compile(r"[a-z0-9]+(?:[.-][a-z0-9]+)*")
_LEAF = r"(?:cpuid|hyperv):0x(?:0|[1-9a-f][0-9a-f]{0,7})"
_SUBLEAF = rf"{_LEAF}\.(?:0|[1-9][0-9]*)"
_NAMED = "kvm|tap|vhost-net|tsc|state|arm"
_REST = rf"(?:msr|arm64):0x(?:0|[1-9a-f][0-9a-f]*)|(?:{_NAMED}):[a-z0-9-]+"
_WORD = re.compile(rf"{_SUBLEAF}\.e[abcd]x|{_REST}")
_WHOLE = re.compile(rf"{_LEAF}|{_SUBLEAF}|{_SUBLEAF}\.e[abcd]x|{_REST}")


def _module_of(name: str) -> Any:
    """A module of the pure core by its file, as kvmneg itself is not installed while it is being built."""
    path = Path(__file__).resolve().parent.parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rules = _module_of("rules")
needs = _module_of("catalog/needs")
# A field of these cannot be a base: less of it may be more (0 is "no limit"), or it is never merged.
_NO_BASE = rules.UNMERGED | {
    rules.EQUAL, rules.MINIMUM_NONZERO, rules.LOWEST, rules.SIGNED_MINIMUM, rules.HIGHEST, rules.EQUAL_OR_ONE,
    rules.EQUAL_OR_TWO, rules.MATCH,
}  # fmt: skip
_WIDTHS = dict.fromkeys(("cpuid", "hyperv", "kvm"), 32)
_WIDTHS |= dict.fromkeys(("msr", "tap", "vhost-net", "tsc", "state", "arm64", "arm"), 64)


class CatalogError(Exception):
    """A table says something that cannot be meant."""


class Feature(NamedTuple):
    """One row of a table, checked."""

    name: str
    word: str
    shift: int
    width: int
    rule: str
    row: dict[str, Any]

    @property
    def mask(self) -> int:
        return ((1 << self.width) - 1) << self.shift


def _bits(place: str, row: dict[str, Any], limit: int) -> tuple[int, int]:
    """(lowest bit, width) of a row."""
    if ("bit" in row) == ("bits" in row):
        raise CatalogError(f"{place}: give either bit or bits")
    if "bit" in row:
        high = low = row["bit"]
    else:
        match = re.fullmatch(r"([0-9]+):([0-9]+)", str(row["bits"]))
        if match is None:
            raise CatalogError(f'{place}: bits are like "7:0"')
        high, low = int(match[1]), int(match[2])
    if type(low) is not int or not 0 <= low <= high < limit:
        raise CatalogError(f"{place}: bits {high}:{low} do not lie in a {limit}-bit word")
    return low, high - low + 1


def _feature(word: str, name: str, row: Any, default: str | None) -> Feature:
    place = f"{word} {name}"
    if not isinstance(row, dict) or not _NAME.fullmatch(name):
        raise CatalogError(f"{place}: a feature is a lower-case name with a table")
    if not _WORD.fullmatch(word):
        raise CatalogError(f"{place}: {word!r} is no word's address")
    unknown = set(row) - _FEATURE_KEYS
    if unknown:
        raise CatalogError(f"{place}: unknown keys {sorted(unknown)}")
    rule = row.get("rule", default)
    if rule not in rules.MEANING:
        wrong = f"no such rule {rule!r}" if rule else "no rule: there is no default"
        raise CatalogError(f"{place}: {wrong}")
    limit = _WIDTHS[word.partition(":")[0]]
    shift, width = _bits(place, row, limit)
    feature = Feature(name, word, shift, width, str(rule), row)
    _check(feature, place, limit)
    _check_state(feature, place)
    return feature


def _check_state(feature: Feature, place: str) -> None:
    """What tells of a class of state: an MSR in KVM's list, or a capability and a flag of its answer."""
    row, told = feature.row, {"msr", "capability"} & set(feature.row)
    if told and (not feature.word.startswith("state:") or feature.width != 1):
        raise CatalogError(f"{place}: a class of state is one bit of a state: word")
    if len(told) > 1 or ("flag" in row and "capability" not in row):
        raise CatalogError(f"{place}: state stands for an MSR, or for a capability and a flag of its answer")


def _check(feature: Feature, place: str, limit: int) -> None:
    """What a rule demands of its row, so that closing dependencies stays an interior operator."""
    rule, row = feature.rule, feature.row
    if rule == rules.EQUAL and (feature.width != limit or row.get("requires")):
        raise CatalogError(f"{place}: what must be equal is a whole word and built on nothing")
    if rule == rules.VMX_CONTROLS and feature.width != 64:
        raise CatalogError(f"{place}: VMX controls are 64 bits, must-be-1 and may-be-1")
    if rule == rules.VERSION_RANGE and feature.width != 16:
        raise CatalogError(f"{place}: a range of versions is 16 bits, the highest and the lowest")
    if rule == rules.SIGNED_MINIMUM and feature.width != 4:
        raise CatalogError(f"{place}: a field with a sign is 4 bits")
    if rule == rules.INTERVAL and feature.width != 64:
        raise CatalogError(f"{place}: an interval is 64 bits, the highest and the lowest")
    if rule not in rules.BITWISE and rule not in rules.UNMERGED and "." in feature.name:
        raise CatalogError(f"{place}: a number's name has no dot: fences write WORD.NAME = N")
    if (rule == rules.POLICY) != ("value" in row):
        raise CatalogError(f"{place}: a constant of policy has a value, and nothing else has")
    if rule == rules.POLICY and not 0 <= row["value"] < 1 << feature.width:
        raise CatalogError(f"{place}: the value does not fit its bits")
    if (rule == rules.MINIMUM_NONZERO) != ("unset" in row):
        raise CatalogError(
            f"{place}: a limit that may be absent says what holds then (unset), and nothing else"
        )
    if "with" in row and (rule != rules.EQUAL_OR_DROP or feature.width != limit):
        raise CatalogError(f"{place}: only a whole word that is equal or dropped is one value with another")
    if "default1" in row and (rule != rules.VMX_CONTROLS or not 0 <= row["default1"] < 1 << 32):
        raise CatalogError(f"{place}: only of VMX controls some are 1 where they are not offered, of 32")
    if row.get("withheld") and rule != rules.AND:
        raise CatalogError(f"{place}: only an and-feature can be withheld")


def _control(word: str, name: str, row: Any) -> Feature:
    """One control of a word: the bit that says that it may be 1 (Intel SDM vol. 3D A.2), whatever it merges by."""
    place = f"{word} {name}"
    if not isinstance(row, dict) or not _NAME.fullmatch(name):
        raise CatalogError(f"{place}: a control is a lower-case name with a table")
    unknown = set(row) - {"bit", "requires", *_TEXT_KEYS}
    if unknown:
        raise CatalogError(f"{place}: unknown keys {sorted(unknown)}")
    shift, _width = _bits(place, {"bit": row.get("bit")}, 32)
    return Feature(name, word, 32 + shift, 1, rules.VMX_CONTROLS, row)


class Tables:
    """All tables of one architecture."""

    def __init__(self, paths: list[Path]) -> None:
        self.features: dict[str, Feature] = {}
        self.leaves: dict[str, tuple[str, str]] = {}
        self.words: dict[str, list[Feature]] = {}
        self.controls: dict[str, Feature] = {}
        for path in sorted(paths):
            try:
                self._read(tomllib.loads(path.read_text("utf-8")))
            except (CatalogError, tomllib.TOMLDecodeError) as error:
                raise CatalogError(f"{path.name}: {error}") from None
        for name, feature in (self.features | self.controls).items():
            for text in feature.row.get("requires", ()):
                self.requirement(name, text)
            self.unset(feature)
        self.groups = self._groups()

    def unset(self, feature: Feature) -> tuple[int, ...]:
        """The lowest bit of the number that holds where a limit is 0, as a tuple; none of other features."""
        if "unset" not in feature.row:
            return ()
        base = self.features.get(feature.row["unset"])
        if base is None or base[1:2] + base[3:5] != (feature.word, feature.width, rules.MINIMUM):
            raise CatalogError(f"{feature.name}: unset is a minimum of the same word and width")
        return (base.shift,)

    def _groups(self) -> dict[str, tuple[str, ...]]:
        """Words that are one value together, by the word that is 0 only where all are (`with` names it)."""
        groups: dict[str, tuple[str, ...]] = {}
        for feature in self.features.values():
            if "with" in feature.row:
                base = self.features.get(feature.row["with"])
                alike = base is not None and base.rule == feature.rule and base.width == feature.width
                if base is None or not alike or "with" in base.row:
                    raise CatalogError(f"{feature.name}: with is a word that is equal or dropped, by itself")
                if feature.row.get("requires") != base.row.get("requires") or not feature.row.get("requires"):
                    raise CatalogError(f"{feature.name}: it requires what {base.name} does: they go together")
                groups[base.word] = (*groups.get(base.word, ()), feature.word)
        return groups

    def _read(self, table: dict[str, Any]) -> None:
        for word, body in table.items():
            if not isinstance(body, dict) or not _WHOLE.fullmatch(word):
                raise CatalogError(f"{word!r} is no leaf and no word")
            default = body.get("rule")
            rows = {key: row for key, row in body.items() if key not in _WORD_KEYS}
            if rows:
                for name, row in rows.items():
                    self._add(_feature(word, name, row, default))
                for name, row in body.get("controls", {}).items():
                    self._add_control(_control(word, name, row))
            elif default not in rules.UNMERGED:
                raise CatalogError(f"{word}: a whole leaf must be one of {sorted(rules.UNMERGED)}")
            elif word in self.leaves:
                raise CatalogError(f"{word} is described twice")
            else:
                self.leaves[word] = (str(default), body.get("why", ""))

    def _add_control(self, control: Feature) -> None:
        if [one.rule for one in self.words[control.word]] != [rules.VMX_CONTROLS]:
            raise CatalogError(f"{control.word}: only a word of the rule {rules.VMX_CONTROLS} has controls")
        if any((one.word, one.shift) == (control.word, control.shift) for one in self.controls.values()):
            raise CatalogError(f"{control.word} {control.name}: its bit is another control's too")
        if control.name in self.controls or control.name in self.features:
            raise CatalogError(f"{control.name} is used for two features")
        self.controls[control.name] = control

    def whole(self, feature: Feature) -> Feature:
        """What merges: of a control the whole word that it is a bit of."""
        return self.words[feature.word][0] if feature.name in self.controls else feature

    def _add(self, feature: Feature) -> None:
        if feature.name in self.features or feature.name in self.controls:
            raise CatalogError(f"{feature.name} is used for two features")
        row = self.words.setdefault(feature.word, [])
        if any(other.mask & feature.mask for other in row):
            raise CatalogError(f"{feature.word} {feature.name}: its bits are another feature's too")
        index = feature.row.get("msr")
        if index is not None and index in (other.row.get("msr") for other in self.features.values()):
            raise CatalogError(f"{feature.name}: MSR {index:#x} is another class's too")
        row.append(feature)
        self.features[feature.name] = feature

    def requirement(self, name: str, text: str) -> tuple[Feature, int]:
        """What `name` needs: the base and the least value it must have (0: an or-bit that is clear)."""
        match = _REQUIREMENT.fullmatch(text)
        base = self.features.get(match["name"]) or self.controls.get(match["name"]) if match else None
        if match is None or base is None:
            raise CatalogError(f"{name} requires {text!r}, which is no feature")
        if bool(match["absent"]) != (base.rule == rules.OR):
            raise CatalogError(f"{name} requires {text!r}: write ! before an or-feature, and only there")
        if base.rule in _NO_BASE or (match["least"] and base.rule != rules.MINIMUM):
            raise CatalogError(f"{name} requires {text!r}: {base.name} ({base.rule}) cannot be built on")
        return base, 0 if match["absent"] else int(match["least"] or "1", 0)


def _following(feature: Feature) -> int:
    """The feature's bits where they come and go with what they are built on, 0 where they are asked for.

    So do numbers, and the second place of a feature that CPUID shows twice (avx-copy, amx-int8-alias).
    State is what a guest carries, whatever was asked for: its classes come along with the features that make it.
    """
    number = feature.rule not in rules.BITWISE and feature.rule not in rules.UNMERGED
    requires = feature.row.get("requires", ())
    twice = any(feature.name == f"{base}-{kind}" for base in requires for kind in ("copy", "alias"))
    state = feature.word.startswith("state:")
    return feature.mask if twice or state or (number and requires) else 0


def _word(tables: Tables, word: str, features: list[Feature]) -> tuple[Any, ...]:
    """One row of WORDS: the word, and-, or- and hint-mask, numbers, known bits, bits that follow."""
    masks = dict.fromkeys(rules.BITWISE, 0)
    numbers = []
    for feature in sorted(features, key=lambda one: one.shift):
        if feature.rule in rules.BITWISE:
            masks[feature.rule] |= feature.mask
        elif feature.rule not in rules.UNMERGED:
            numbers.append((feature.shift, feature.width, feature.rule, *tables.unset(feature)))
    known = sum(feature.mask for feature in features)
    follow = sum(map(_following, features))
    return word, masks[rules.AND], masks[rules.OR], masks[rules.HINT], tuple(numbers), known, follow


def _bottom(row: tuple[Any, ...]) -> int:
    """The bottom of one row of WORDS."""
    _word, _and, bottom, _hint, numbers, *_ = row
    for shift, width, rule, *unset in numbers:
        bottom |= (0 if unset else rules.RULES[rule].bottom(width)) << shift
    return int(bottom)


def merging(tables: Tables) -> str:
    """The module that merging needs: WORDS, LEAVES, POLICY, GROUPS and more (see catalog/__init__.py)."""
    # a word of a whole leaf that is only recorded has names, and no more
    words = [
        _word(tables, word, features)
        for word, features in tables.words.items()
        if word.partition(".")[0] not in tables.leaves or any(one.rule != rules.REPORTED for one in features)
    ]
    policy = [
        (feature.word, feature.mask, feature.row["value"] << feature.shift)
        for feature in tables.features.values()
        if feature.rule == rules.POLICY
    ]
    # one row for all features of a word that need the same: closing costs by the row
    rows: dict[tuple[str, str, int, int], int] = {}

    def bases(name: str) -> list[str]:
        required = tables.features[name].row.get("requires", ())
        return [tables.whole(tables.requirement(name, text)[0]).name for text in required]

    for feature in (tables.features[name] for name in needs.bases_first(tables.features, bases)):
        for text in feature.row.get("requires", ()) if feature.rule not in rules.UNMERGED else ():
            base, least = tables.requirement(feature.name, text)
            key = (feature.word, base.word, base.mask, least << base.shift)
            rows[key] = rows.get(key, 0) | feature.mask
    requires = [(word, mask, *rest) for (word, *rest), mask in rows.items()]
    closing = needs.arranged(requires, {row[0]: _bottom(row) for row in words})
    leaves = {leaf: rule for leaf, (rule, _why) in tables.leaves.items()}
    groups = list(tables.groups.items())
    every = tables.features.values()
    msrs = {one.row["msr"]: (one.word, one.mask) for one in every if "msr" in one.row}
    told = [
        (one.word, one.mask, f"kvm:{one.row['capability']}", one.row.get("flag", -1))
        for one in every
        if "capability" in one.row
    ]
    parts = {"WORDS": words, "LEAVES": leaves, **closing, "POLICY": policy, "GROUPS": groups}
    return _module({**parts, "STATE_MSRS": msrs, "STATE_CAPABILITIES": told})


def naming(tables: Tables) -> str:
    """The module of names: FEATURES and CONTROLS, a row each (see catalog/__init__.py), DEFAULT1, and LEAF_REASONS."""

    def row(feature: Feature) -> tuple[Any, ...]:
        # a control is nothing without its word
        word = (tables.whole(feature).name,) if feature.name in tables.controls else ()
        required = (*word, *feature.row.get("requires", ()))
        return (*feature[:5], required, *(feature.row.get(key, "") for key in _TEXT_KEYS))

    return _module(
        {
            "FEATURES": [row(feature) for feature in tables.features.values()],
            "CONTROLS": [row(control) for control in tables.controls.values()],
            "DEFAULT1": {
                feature.word: feature.row.get("default1", 0)
                for feature in tables.features.values()
                if feature.rule == rules.VMX_CONTROLS
            },
            "LEAF_REASONS": {leaf: why for leaf, (_rule, why) in tables.leaves.items()},
        }
    )


def _module(values: dict[str, Any]) -> str:
    head = "# Generated by kvmneg/features/catalog/compile.py; the tables beside it are the source.\n"
    parts = []
    for name, value in values.items():
        if isinstance(value, dict):
            body = "".join(f"    {key!r}: {item!r},\n" for key, item in value.items())
            kind = "" if value else ": dict[str, object]"  # a type checker cannot tell that of an empty one
            parts.append(f"{name}{kind} = {{\n{body}}}\n")
        else:
            body = "".join(f"    {item!r},\n" for item in value)
            parts.append(f"{name} = (\n{body})\n")
    return head + "".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--architecture", required=True)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("tables", type=Path, nargs="+")
    arguments = parser.parse_args()
    try:
        tables = Tables(arguments.tables)
    except CatalogError as error:
        sys.exit(f"catalogue: {error}")
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for suffix, text in (("", merging(tables)), ("_names", naming(tables))):
        (arguments.output_dir / f"_{arguments.architecture}{suffix}.py").write_text(text, "utf-8")


if __name__ == "__main__":
    main()
