# SPDX-License-Identifier: LGPL-2.1-or-later
"""QEMU 7.2, 10.0 and 11.1 on the real /dev/kvm: their verdicts on every CPU model, bit by bit, are ours.

Bits that only one side has a name for are not compared; every other difference is a line of
qemu_differences.txt. Versions that are not installed are unpacked beside (tests/packages).
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

import pytest

from kvmneg.emit import qemu
from kvmneg.features.featureset import FeatureSet
from kvmneg.features.report import Report
from kvmneg.host import qemu_probe
from kvmneg.host.qemu_probe import Build
from kvmneg.policy.contract import Contract
from kvmneg.policy.vmm import Through, through

HERE = Path(__file__).parent


def _load(name: str, path: Path) -> ModuleType:
    """A helper by its file: tests are imported without their folders on the path."""
    if name not in sys.modules:
        folders = [str(path.parent)] if path.name == "__init__.py" else None
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=folders)
        assert spec and spec.loader
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


if TYPE_CHECKING:
    from tests.packages import errors, store, versions
    from tests.packages.tree import Tree
    from tests.peers import differences, qemu_live
else:
    _load("kvmneg_packages", HERE.parent / "packages/__init__.py")
    errors, store, versions = (
        importlib.import_module(f"kvmneg_packages.{name}") for name in ("errors", "store", "versions")
    )
    differences = _load("qemu_differences", HERE / "differences.py")
    qemu_live = _load("qemu_live", HERE / "qemu_live.py")

LIST = HERE / "qemu_differences.txt"
# Where Debian has them; of several suites the first that still does.
SUITES = {"7.2": ("bookworm",), "10.0": ("trixie",), "11.1": ("trixie-backports", "sid")}
VERSIONS = tuple(SUITES)


class Judged(NamedTuple):
    """One QEMU's answers beside ours: where they differ, by part, and how much was compared."""

    version: str
    models: dict[str, set[tuple[str, int]]]
    host: set[tuple[str, int]]
    host_bits: int
    seen: Through
    answers: qemu_live.Answers

    @property
    def parts(self) -> dict[str, set[tuple[str, int]]]:
        return {"models": set().union(*self.models.values()), "host": self.host}


@pytest.fixture(scope="module")
def report(kvm_report: Report) -> Report:
    """This host, measured."""
    if kvm_report.architecture != "x86_64":
        pytest.skip("processor flags are x86's")
    return kvm_report


@pytest.fixture(scope="module")
def judged(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Judged]:
    """judged(version) → that QEMU, asked once for all tests."""

    @cache
    def ask(version: str) -> Judged:
        build = qemu_probe.probe(_path(version, tmp_path_factory.mktemp("qemu")))
        assert versions.satisfies(build.version, version)
        return _judge(version, build, report)

    return ask


def _path(version: str, folder: Path) -> str:
    """A program that is this QEMU: the installed one where it is of that version, else an unpacked one's wrapper."""
    installed = qemu_probe.find()
    if installed and versions.satisfies(qemu_probe.probe(installed).version, version):
        return installed
    tree = _unpacked(version)
    if isinstance(tree, str):
        pytest.skip(tree)
    return str(tree.wrapper(tree.qemu(), folder / f"qemu-{version}"))


@cache  # a mirror that is out of reach is not asked again
def _unpacked(version: str) -> Tree | str:
    """The tree of that version, or why there is none: the mirror is out of reach, or Debian has moved on."""
    packages = store.Store()
    wishes = [store.Wanted("qemu-system-x86", version, suite) for suite in SUITES[version]]
    for wanted in wishes:
        cached = packages.cached(wanted)
        if cached is not None:
            return cached
    others = []
    for wanted in wishes:
        try:
            return packages.get(wanted, exact=True)
        except errors.NoTool as error:
            return str(error)
        except errors.Unreachable as error:
            return f"the mirror is not reachable: {error}"
        except errors.Missing as error:
            others.append(str(error))
    return f"the archive has no QEMU {version} any more: {'; '.join(others)}"


def _judge(version: str, build: Build, report: Report) -> Judged:
    seen = through(report, f"qemu-{version}")
    answers = qemu_live.ask(build, seen)
    models = {
        name: qemu_live.blockers(answers.properties[name], seen) ^ qemu_live.places(names)
        for name, names in answers.unavailable.items()
    }
    host = answers.properties["host"]
    differing = qemu_live.host_differences(host, seen.report.offer)
    return Judged(version, models, differing, qemu_live.both_know(host), seen, answers)


def _due(judged: Judged, part: str, report: Report) -> set[tuple[str, int]]:
    """The listed differences that must show in this part: a model's only where some model asks for the bit."""
    lines = [line for line in differences.read(LIST) if line.version == judged.version]
    found = {line.place for line in lines if line.part in (part, "both") and line.due(report)}
    if part == "models":
        properties = judged.answers.properties.values()
        found &= {qemu_live.place(feature) for each in properties for feature in qemu_live.requested(each)}
    return found


@pytest.mark.kvm
@pytest.mark.parametrize("version", VERSIONS)
def test_every_model_is_judged_as_qemu_judges_it(
    version: str, judged: Callable[[str], Judged], report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged(version)
    due = _due(found, "models", report)
    unlisted = {name: sorted(places - due) for name, places in found.models.items() if places - due}
    assert not unlisted
    lacking = sum(map(bool, found.answers.unavailable.values()))
    _say(
        capsys,
        f"QEMU {version}: {len(found.models)} models, {lacking} of them lack something here;"
        f" {len(due)} listed differences",
    )


@pytest.mark.kvm
@pytest.mark.parametrize("version", VERSIONS)
def test_the_offer_is_what_qemu_gives_its_host_model(
    version: str, judged: Callable[[str], Judged], report: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    found = judged(version)
    due = _due(found, "host", report)
    assert sorted(found.host - due) == []
    assert found.host_bits > 200, "QEMU 7.2 names more than 200 bits that the catalogue names too"
    _say(capsys, f"QEMU {version}: -cpu host, {found.host_bits} bits compared; {len(due)} listed differences")


@pytest.mark.kvm
@pytest.mark.parametrize("version", VERSIONS)
def test_no_listed_difference_is_stale(version: str, judged: Callable[[str], Judged], report: Report) -> None:
    found = judged(version)
    for part, places in found.parts.items():
        assert sorted(_due(found, part, report) - places) == [], f"{part}: no longer different"


@pytest.mark.kvm
def test_a_lost_bit_would_show(judged: Callable[[str], Judged], report: Report) -> None:
    """The comparison sees one bit: without SSE2 in the offer, every model that has it is judged wrongly."""
    found = judged(VERSIONS[0])
    word, bit = "cpuid:0x1.0.edx", 26
    words = {**report.offer_words, word: report.offer_words[word] & ~(1 << bit)}
    poorer = Report(
        report.architecture,
        measured=report.measured,
        combo=report.combo,
        identity=report.identity,
        offer=words,
        silicon=report.silicon_words,
    )
    seen = through(poorer, f"qemu-{VERSIONS[0]}")
    properties = found.answers.properties["qemu64"]
    assert (word, bit) in qemu_live.blockers(properties, seen)
    assert (word, bit) not in qemu_live.blockers(properties, found.seen)
    assert (word, bit) in qemu_live.host_differences(found.answers.properties["host"], seen.report.offer)


def _complaints(program: str, machine: str, cpu: str) -> str:
    """What a QEMU that emulates says of a CPU before it ends: TCG has no VMX, and QEMU names each bit that it drops."""
    command = [program, "-machine", machine, "-accel", "tcg", *qemu_live.QUIET, "-cpu", cpu]
    talk = b'{"execute": "qmp_capabilities"}\n{"execute": "quit"}\n'
    done = subprocess.run(command, input=talk, capture_output=True, timeout=qemu_live.SECONDS, check=False)
    said = done.stderr.decode()
    assert done.returncode == 0, said
    return said


@pytest.mark.parametrize("version", VERSIONS)
def test_every_vmx_property_has_the_place_that_qemu_tells(version: str, tmp_path: Path) -> None:
    """With every property on, at the MSR and bit that QEMU's own warnings name; a control's bit is its number."""
    program = _path(version, tmp_path)
    build = qemu_probe.probe(program)
    names = {name for name in build.properties if name.startswith("vmx-")}
    assert len(names) >= 88, "QEMU 7.2 has so many"
    assert names <= set(qemu_live.NAMED)
    cpu = ",".join(["base", "vmx=on", *(f"{name}=on" for name in sorted(names))])
    said = _complaints(program, build.machine, cpu)
    told = re.findall(r"MSR\(([0-9A-F]+)[hH]\)\.(\S+) \[bit (\d+)\]", said)
    assert {(f"msr:{int(index, 16):#x}", int(bit), name) for index, name, bit in told} == {
        (one.word, one.shift - 32 if one.whole else one.shift, name)
        for name in names
        for one in qemu_live.NAMED[name]
    }


@pytest.mark.parametrize("version", VERSIONS)
def test_a_contract_with_vmx_is_parsed_and_complete_in_itself(version: str, tmp_path: Path) -> None:
    """No property that this QEMU does not know, and none whose base it was not given: with enforce=on it would end."""
    program = _path(version, tmp_path)
    build = qemu_probe.probe(program)
    recorded = HERE.parent / "unit/data/intel-ice-lake.json"
    host = Report.loads(recorded.read_bytes(), file=recorded.name)
    offer = through(host, f"qemu-{version}").report.offer
    # Hyper-V's are KVM's only: QEMU 7.2 ends for want of it
    values = {word: value for word, value in offer.words.items() if not word.startswith("hyperv:")}
    granted = Contract(FeatureSet.of(host.architecture, values))
    cpu = qemu.emit(granted, build.machine, known=build.properties).cpu
    assert "vmx=on" in cpu.split(",") and cpu.endswith(",enforce=on")
    said = _complaints(program, build.machine, cpu.removesuffix(",enforce=on"))
    assert "vmx-ept [bit 1]" in said, "TCG has no EPT"
    assert [line for line in said.splitlines() if "depends on other features" in line] == []


def test_every_listed_difference_is_of_a_version_and_a_bit_that_are_compared() -> None:
    first = {qemu_live.place(features[0]) for features in qemu_live.NAMED.values()}
    for line in differences.read(LIST):
        assert line.version in VERSIONS
        assert line.place in first, f"{line.word} {line.bit}: QEMU has no name for it"


@pytest.mark.parametrize(
    "text",
    [
        "cpuid:0x1.0.ecx 3 7.2 models kvmneg\n",
        "cpuid:0x1.0.ecx x 7.2 models kvmneg lacking cpu.c: why\n",
        "cpuid:0x1.0.ecx * 7.2 models kvmneg lacking cpu.c: why\n",
        "cpuid:0x1.0.ecx 3 7.2 nowhere kvmneg lacking cpu.c: why\n",
        "cpuid:0x1.0.ecx 3 7.2 models nobody lacking cpu.c: why\n",
        "cpuid:0x1.0.ecx 3 7.2 models kvmneg never cpu.c: why\n",
        "cpuid:0x1.0.ecx 3 7.2 models kvmneg lacking nothing\n",
        "cpuid:0x1.0.ecx 3 7.2 models kvmneg lacking cpu.c: why\n" * 2,
    ],
)
def test_a_malformed_line_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"list\.txt:[12]"):
        differences.read(path)


def _say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """A line for people in the middle of a run."""
    with capsys.disabled():
        sys.stdout.write(f"\n{text}\n")
