# SPDX-License-Identifier: LGPL-2.1-or-later
"""All that one libvirt is asked, in one session: baselines of the recorded hosts and of this one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from xml.etree import ElementTree as ET

from kvmneg.features import words
from kvmneg.features.featureset import FeatureSet
from kvmneg.host import x86
from kvmneg.host.kvm import raw_cpuid

if TYPE_CHECKING:
    from tests.packages.tree import Tree
    from tests.peers.libvirt_causes import Host
    from tests.peers.libvirt_data import CpuMap, Dump, dumps
    from tests.peers.libvirt_live import EMULATOR, Reply, Session, named
else:  # whoever loads this has loaded them
    from libvirt_causes import Host
    from libvirt_data import CpuMap, dumps
    from libvirt_live import EMULATOR, Session, named

OWN = "this host"
_FAR = 7  # between the hosts of a wide triple: coprime with the numbers of hosts of each vendor but one's 1

Group = tuple[str, ...]


class Model(NamedTuple):
    """Whether a QEMU can run a model, and what it lacks of it; None where libvirt is too old to tell (before 11.0)."""

    usable: bool
    blockers: frozenset[str] | None


class Live(NamedTuple):
    """One libvirt's answers, by the names of the hosts asked about; `hypervisor` and `models` by virt type."""

    version: str
    full: str
    cpu_map: CpuMap
    hosts: dict[str, Host]
    baselines: dict[Group, Reply]
    mixed: dict[Group, Reply]
    with_own: dict[Group, Reply]
    hypervisor: dict[str, dict[Group, Reply]]
    models: dict[str, dict[str, Model]]

    def group(self, names: Group) -> list[Host]:
        return [self.hosts[name] for name in names]


def ask(version: str, trees: Sequence[Tree], data: Path, folder: Path, *, kvm: bool) -> Live:
    """Start that libvirt, ask it everything, end it. `trees`: libvirt's and, if needed, a QEMU's."""
    cpu_map = CpuMap(trees[0].path("usr/share/libvirt/cpu_map"))
    with Session([tree.root for tree in trees], folder, kvm=kvm) as session:
        own, own_text = _own(session, cpu_map)
        hosts, texts = {OWN: own}, {OWN: own_text}
        for dump in dumps(data):
            hosts[dump.name], texts[dump.name] = _recorded(dump, cpu_map)
        pairs = list(combinations((name for name in hosts if name != OWN), 2))
        alike = [pair for pair in pairs if len({hosts[name].vendor for name in pair}) == 1]
        guests = {name: cpu_map.describe(host.told, host.vendor, guest=True) for name, host in hosts.items()}
        kinds = ("qemu", "kvm") if kvm else ("qemu",)
        return Live(
            version,
            trees[0].version,
            cpu_map,
            hosts,
            _baselines(session, [*alike, *_triples(hosts.values())], texts),
            _baselines(session, [pair for pair in pairs if pair not in alike], texts),
            _baselines(
                session,
                [(OWN, name) for name in hosts if hosts[name].vendor == own.vendor and name != OWN],
                texts,
            ),
            {kind: _baselines(session, alike, guests, kind) for kind in kinds},
            {kind: _models(session, kind) for kind in kinds},
        )


def _recorded(dump: Dump, cpu_map: CpuMap) -> tuple[Host, str]:
    """A recorded host and the XML of it that this libvirt knows: models with a version came with libvirt 10."""
    cpu = dump.xml("host")
    if cpu_map.has_model(cpu.findtext("model", "")):
        told, text = cpu_map.effective(cpu), ET.tostring(cpu, "unicode")
    else:
        told = cpu_map.effective(dump.xml("guest")) & cpu_map.places.keys()
        text = cpu_map.describe(told, dump.vendor)
    return Host(dump.name, dump.vendor, dump.report.offer_words, dump.report.offer, told), text


def _own(session: Session, cpu_map: CpuMap) -> tuple[Host, str]:
    """This host: the CPU of the daemon's capabilities, beside what the CPUID instruction says here."""
    (reply,) = session.ask(["capabilities"])
    cpu = reply.xml().find("host/cpu")
    assert cpu is not None
    raw = x86.decoder().silicon(raw_cpuid(0))
    told = cpu_map.effective(cpu)
    host = Host(OWN, cpu.findtext("vendor", ""), raw, FeatureSet.of(words.X86_64, raw), told)
    return host, ET.tostring(cpu, "unicode")


def _triples(hosts: Iterable[Host]) -> list[Group]:
    """Each recorded host with the next two of its vendor, in the order of names, and with two far ones."""
    found = []
    for vendor in ("Intel", "AMD"):
        names = [host.name for host in hosts if host.vendor == vendor and host.name != OWN]
        for step in (1, _FAR):
            places = ([(start + step * i) % len(names) for i in range(3)] for start in range(len(names)))
            found += [tuple(names[place] for place in sorted(triple)) for triple in places]
    return list(dict.fromkeys(found))


def _baselines(
    session: Session, groups: Sequence[Group], texts: dict[str, str], virtualization: str = ""
) -> dict[Group, Reply]:
    """The baseline of each group: of CPUs, or with a kind of virtualization, of what its QEMU makes of them."""
    commands = []
    for number, group in enumerate(groups):
        path = session.give(f"{virtualization}{number}.xml", "".join(texts[name] for name in group))
        if virtualization:
            commands.append(
                f"hypervisor-cpu-baseline --features --virttype {virtualization} --emulator {EMULATOR} {path}"
            )
        else:
            commands.append(f"cpu-baseline --features {path}")
    return dict(zip(groups, session.ask(commands), strict=True))


def _models(session: Session, virtualization: str) -> dict[str, Model]:
    """What libvirt tells of each CPU model of its QEMU here."""
    (reply,) = session.ask([f"domcapabilities --virttype {virtualization} --emulatorbin {EMULATOR}"])
    capabilities = reply.xml()
    blockers = {one.attrib["model"]: named(one) for one in capabilities.iter("blockers")}
    return {
        one.text or "": Model(one.get("usable") == "yes", blockers.get(one.text or "") if blockers else None)
        for one in capabilities.iterfind("cpu/mode[@name='custom']/model")
    }
