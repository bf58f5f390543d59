# SPDX-License-Identifier: LGPL-2.1-or-later
"""libvirt's CPU map and its recorded hosts, as libvirt's tests and packages hold them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from xml.etree import ElementTree as ET

from kvmneg.emit import libvirt_cpudata, qemu_expansion
from kvmneg.emit.imported import Measured
from kvmneg.features import catalog as catalogs
from kvmneg.features import words
from kvmneg.features.report import Report

_PREFIX = "x86_64-cpuid-"
_KINDS = (".xml", ".json", "-host.xml", "-guest.xml", "-enabled.xml")

Words = dict[str, int]
NAMES = catalogs.names(words.X86_64)


class CpuMap:
    """libvirt's cpu_map directory: its features by name and place, and its models expanded."""

    def __init__(self, directory: Path) -> None:
        self._models: dict[str, ET.Element] = {}
        for path in directory.glob("x86_*.xml"):
            for model in ET.parse(path).getroot().findall("model"):
                self._models[model.attrib["name"]] = model
        root = ET.parse(directory / "x86_features.xml").getroot()
        self.places = {
            feature.attrib["name"]: dict(self._places(feature)) for feature in root.iter("feature")
        }

    @staticmethod
    def _places(feature: ET.Element) -> Iterator[tuple[str, int]]:
        for item in feature:
            if item.tag == "cpuid":
                leaf, subleaf = (int(item.get(name, "0"), 16) for name in ("eax_in", "ecx_in"))
                for register in words.REGISTERS:
                    if register in item.attrib:
                        yield words.cpuid_word(leaf, subleaf, register), int(item.attrib[register], 16)
            elif item.tag == "msr":
                low, high = (int(item.get(name, "0"), 16) for name in ("eax", "edx"))
                word = words.msr_word(int(item.attrib["index"], 16))
                if word in NAMES.controls and not high:
                    # until libvirt 12 a VMX control is where QEMU's feature word has it, not the MSR: by its number
                    low, high = 0, low
                yield word, high << 32 | low

    def expand(self, name: str) -> set[str]:
        """A model's features. What a later libvirt added to a model, or removed, is not assumed of a CPU."""
        model = self._models[name]
        found: set[str] = set()
        base = model.find("model")
        if base is not None:
            found |= self.expand(base.attrib["name"])
        for feature in model.findall("feature"):
            if feature.get("removed") == "yes":
                found.discard(feature.attrib["name"])
            elif feature.get("added") != "yes":
                found.add(feature.attrib["name"])
        return found

    def has_model(self, name: str) -> bool:
        return name in self._models

    def describe(self, names: frozenset[str], vendor: str, *, guest: bool = False) -> str:
        """A <cpu> of this map that has exactly these features: the model with most of them, and the others."""
        known = names & self.places.keys()
        fitting = [
            name for name in self._models if self.vendor(name) in ("", vendor) and self.expand(name) <= known
        ]
        model = max(fitting, key=lambda name: (len(self.expand(name)), name))
        cpu = ET.Element("cpu", {"mode": "custom", "match": "exact"} if guest else {})
        if not guest:
            ET.SubElement(cpu, "arch").text = "x86_64"
        ET.SubElement(cpu, "model").text = model
        ET.SubElement(cpu, "vendor").text = vendor
        for name in sorted(known - self.expand(model)):
            ET.SubElement(cpu, "feature", {"name": name, **({"policy": "require"} if guest else {})})
        return ET.tostring(cpu, "unicode")

    def vendor(self, name: str) -> str:
        """The vendor that a model is bound to, "" where it is to none."""
        model = self._models[name]
        own, base = model.find("vendor"), model.find("model")
        if own is not None:
            return own.attrib["name"]
        return self.vendor(base.attrib["name"]) if base is not None else ""

    def effective(self, cpu: ET.Element) -> frozenset[str]:
        """The features of a <cpu>: its model's, with those that it requires and without those it disables."""
        found = self.expand(cpu.findtext("model", ""))
        for feature in cpu.findall("feature"):
            change = found.discard if feature.get("policy") == "disable" else found.add
            change(feature.attrib["name"])
        return frozenset(found)

    def names(self, values: dict[str, int]) -> frozenset[str]:
        """libvirt's names, as the catalogue has them, of the bits that are set in our words."""
        features = (feature for word, value in values.items() for feature in NAMES.within(word, value))
        return frozenset(feature.libvirt for feature in features if feature.libvirt in self.places)


class Dump:
    """One recorded host: its raw CPUID as a report, and what libvirt and QEMU said of it."""

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        self.name = name
        self._files = files
        self.report: Report = libvirt_cpudata.read(files[".xml"], Measured(name))

    def xml(self, kind: str) -> ET.Element:
        return ET.fromstring(self._files[f"-{kind}.xml"])

    @cached_property
    def vendor(self) -> str:
        return self.xml("host").findtext("vendor", "")

    def reply(self) -> Words | None:
        """The words of QEMU's reply, where it was recorded (the file goes on with other replies)."""
        if ".json" not in self._files:
            return None
        first, _ = json.JSONDecoder().raw_decode(self._files[".json"].decode())
        return qemu_expansion.read(json.dumps(first).encode(), Measured(self.name)).offer_words

    def enabled(self) -> Words:
        """What libvirt read out of that reply."""
        return libvirt_cpudata.read(self._files["-enabled.xml"], Measured(self.name)).offer_words


def dumps(folder: Path) -> list[Dump]:
    """The recorded hosts of the peers' data, in the order of their names."""
    with tarfile.open(folder / "libvirt/cputestdata-half.tar.xz") as archive:
        content = {
            Path(member.name).name.removeprefix(_PREFIX): archive.extractfile(member) for member in archive
        }
        data = {name: file.read() for name, file in content.items() if file is not None}
    hosts = sorted(name.removesuffix("-host.xml") for name in data if name.endswith("-host.xml"))
    return [Dump(host, {kind: data[host + kind] for kind in _KINDS if host + kind in data}) for host in hosts]
