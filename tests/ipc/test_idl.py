# SPDX-License-Identifier: LGPL-2.1-or-later
"""The .varlink files, read by the PyPI package varlink, against everything in Python that repeats them."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
from varlink import scanner

from kvmneg import errors
from kvmneg.client import Client
from kvmneg.features.difference import Blocker
from kvmneg.service.interfaces import introspection
from kvmneg.service.interfaces.parameters import METHODS, TYPES
from kvmneg.service.varlink import message

INTERFACES = {name: scanner.Interface(introspection.description(name)) for name in introspection.INTERFACES}
OURS = [name for name in INTERFACES if name.startswith("org.kvmneg")]


def of_kind(interface: str, kind: type) -> dict[str, Any]:
    return {
        name: member for name, member in INTERFACES[interface].members.items() if isinstance(member, kind)
    }


def written(kind: Any) -> str:
    """A type as an interface file has it."""
    for prefix, package in (("?", scanner._Maybe), ("[]", scanner._Array), ("[string]", scanner._Dict)):
        if isinstance(kind, package):
            return prefix + written(kind.element_type)
    if isinstance(kind, scanner._CustomType):
        return str(kind.name)
    if isinstance(kind, scanner._Enum):
        return f"({', '.join(kind.fields)})"
    names = {bool: "bool", int: "int", float: "float", str: "string", scanner._Object: "object"}
    return names[type(kind)]


def fields(structure: Any) -> dict[str, str]:
    return {name: written(kind) for name, kind in structure.fields.items()}


@pytest.mark.parametrize("interface", INTERFACES)
def test_the_name_is_the_files(interface):
    assert INTERFACES[interface].name == interface


@pytest.mark.parametrize("interface", INTERFACES)
def test_no_name_twice(interface):
    """Types, methods and errors share one space of names: systemd's parser refuses what does not keep to it."""
    names = re.findall(r"^(?:type|method|error) (\w+)", introspection.description(interface), re.MULTILINE)
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("interface", INTERFACES)
def test_inputs_are_what_parameters_are_checked_against(interface):
    methods = of_kind(interface, scanner._Method)
    assert {name: fields(method.in_type) for name, method in methods.items()} == METHODS[interface]


def test_structures_of_inputs():
    declared = {}
    for interface in OURS:
        declared |= {name: fields(alias.type) for name, alias in of_kind(interface, scanner._Alias).items()}
    assert {name: declared[name] for name in TYPES} == TYPES
    inputs = [kinds for methods in METHODS.values() for kinds in methods.values()]
    used = {kind.replace("[string]", "[]").lstrip("?[]") for kinds in inputs for kind in kinds.values()}
    assert used - {"bool", "int", "float", "string", "object"} <= set(TYPES)


def test_a_blocker_has_the_fields_of_the_interface():
    declared = fields(of_kind("org.kvmneg", scanner._Alias)["Blocker"].type)
    blocker = Blocker("avx2", "cpuid:0x7.0.ebx", 5, "the request", "host node7", "kvm", "because")
    assert list(blocker.to_varlink()) == list(declared)
    assert [name for name, kind in declared.items() if kind.startswith("?")] == ["bit"]


def test_every_error_is_declared():
    """Each class that a daemon can send, under its name; Unreachable, VmmFault and NotApplied never are."""
    declared = {f"{interface}.{name}" for interface in OURS for name in of_kind(interface, scanner._Error)}
    sent = {error.varlink for error in errors.family()} - {
        errors.Unreachable.varlink,
        errors.VmmFault.varlink,
        errors.NotApplied.varlink,
    }
    assert errors.SlowWatcher.varlink in sent
    assert declared == sent


@pytest.mark.parametrize(
    "error",
    [
        errors.LimitExceeded("CALLS", 1),
        errors.Blocked("no", []),
        errors.Breached("no", []),
        errors.Incompatible("no", []),
        errors.BadInput("no", file="x", line=1),
        errors.KvmFault("KVM_X", 22),
        errors.NotPermitted("no"),
        errors.NoKvm("no", hint="load the module"),
        errors.StoreError("no"),
        errors.StaleOffer("no", offered=1, generation=2),
        errors.NoSuchContract("no", digest="x"),
        errors.UsageError("no", feature="x", base="y"),
        errors.GenerationMismatch("no", expected=1, actual=2),
        errors.NotPinned("no"),
        errors.WrongState("no", state="pinned"),
        errors.HostsMissing("no", hosts=[]),
        errors.GuestsAbove("no", guests=[], count=1),
        errors.ReadOnly("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_error_parameters_are_the_declared_ones(error):
    interface, _, name = error.varlink.rpartition(".")
    declared = fields(of_kind(interface, scanner._Error)[name].type)
    parameters = error.parameters()
    assert set(parameters) <= set(declared)
    required = {name for name, kind in declared.items() if not kind.startswith("?")}
    assert required <= {name for name, value in parameters.items() if value is not None}


def test_errors_of_every_service():
    declared = of_kind("org.varlink.service", scanner._Error)
    assert {kind.__name__ for kind in message.ServiceError.__subclasses__()} <= set(declared)
    for kind in message.ServiceError.__subclasses__():
        assert list(kind("x").parameters()) == list(declared[kind.__name__].type.fields)
        assert kind("x").varlink == f"org.varlink.service.{kind.__name__}"


def test_the_client_has_a_method_for_each():
    names = {name for name, _ in inspect.getmembers(Client, inspect.isfunction)}
    for interface, methods in METHODS.items():
        part = interface.removeprefix("org.kvmneg").removeprefix(".")
        prefix = f"{part.lower()}_" if part and interface != "org.varlink.service" else ""
        for method in methods:
            assert prefix + re.sub(r"(?<=[a-z])(?=[A-Z])", "_", method).lower() in names


@pytest.mark.parametrize("interface", INTERFACES)
def test_everything_is_commented_and_spelt_as_agreed(interface):
    """A comment on each member, and names in camelCase without underscores."""
    text = introspection.description(interface)
    for member in INTERFACES[interface].members:
        assert re.search(rf"#[^\n]*\n(type|method|error) {member}\b", text), member
    for name in re.findall(r"(\w+):", re.sub(r"#.*", "", text)):
        assert re.fullmatch(r"[a-z][A-Za-z0-9]*", name), name
    assert len(re.findall(r"^interface ", text, re.MULTILINE)) == 1
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", ["org.kvmneg.None", "", "../errors", "org.kvmneg.varlink"])
def test_other_interfaces_are_not_found(name):
    with pytest.raises(message.InterfaceNotFound) as error:
        introspection.get_interface_description(name)
    assert error.value.parameters() == {"interface": name}
