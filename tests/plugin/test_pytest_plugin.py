# SPDX-License-Identifier: LGPL-2.1-or-later
"""The pytest plugin in runs of its own: what is skipped and why, what fails, what the log and JUnit say."""

from __future__ import annotations

import fcntl
import fnmatch
import os
import re
import struct
import subprocess
import tomllib
from array import array
from contextlib import suppress
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import pytest

from kvmneg.client import DEFAULT_SOCKET, Client
from kvmneg.features.report import Report
from kvmneg.policy import grade
from kvmneg.policy.contract import Contract
from kvmneg.testing.vm import pmus
from tests.served import daemon_in

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmneg.testing.host import Held
    from kvmneg.testing.vm import AppliedVm

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "kvmneg/data/recorded-host.json"
# as in tests/conftest.py; not both ways, which pytest refuses
LOADED = (
    ()
    if any(one.name == "kvmneg" for one in entry_points(group="pytest11"))
    else ("-p", "kvmneg.pytest_plugin")
)


@pytest.fixture
def run(pytester: pytest.Pytester) -> Callable[..., pytest.RunResult]:
    """run(source, *options): a file of tests, judged by the recorded report; `alone` in a process of its own."""

    def run_it(
        source: str, *options: str, report: Path | None = RECORDED, alone: bool = False
    ) -> pytest.RunResult:
        pytester.makepyfile(f"import pytest\n{source}")
        judged = () if report is None else (f"--kvm-report={report}",)
        # what the run does not need costs a second each time
        without = ("-p", "no:cacheprovider", "-p", "no:hypothesispytest")
        start = pytester.runpytest_subprocess if alone else pytester.runpytest_inprocess
        return start(*LOADED, *without, "-rs", *judged, *options)

    return run_it


def mark(text: str) -> str:
    return f"@pytest.mark.kvm({text})\ndef test_it(): pass\n"


# --- skip or fail


@pytest.mark.parametrize(
    "text",
    [
        "",
        'requires=["avx2", "kvm-pv-eoi"], level="x86-64-v3"',
        'requires=["avx2"]',  # with avx, xsave and more that it is built on
        'level="x86-64-v2"',
    ],
)
def test_what_the_host_gives_runs(run: Callable[..., pytest.RunResult], text: str) -> None:
    result = run(mark(text))
    result.assert_outcomes(passed=1)


def test_what_it_does_not_give_is_skipped_with_the_blockers(run: Callable[..., pytest.RunResult]) -> None:
    result = run(mark('requires=["avx512f", "avx2", "movdir64b"]'))
    result.assert_outcomes(skipped=1)
    (line,) = (line for line in result.outlines if line.startswith("SKIPPED"))
    assert "KVM cannot give it: " in line
    told = line.partition("recorded-milan: ")[2]
    features, _, because = told.partition(": ")
    assert {"avx512f", "movdir64b"} <= set(features.split())
    assert "avx2" not in features.split()  # it is there
    assert because == "the CPU does not have it [silicon]"


def test_strict_fails_with_the_blockers(run: Callable[..., pytest.RunResult], tmp_path: Path) -> None:
    """A failure of the test, also in JUnit, where harnesses tell it from an error of its set-up; no fixture is made."""
    source = """
@pytest.fixture
def guest(): print("A GUEST IS STARTED")
""" + mark('requires=["movdir64b"]').replace("test_it()", "test_it(guest)")
    result = run(source, "--kvm-strict", f"--junit-xml={tmp_path / 'junit.xml'}", "-rf", "-s")
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(failed=1)
    result.stdout.fnmatch_lines(
        [
            "KVM cannot give it: movdir64b cannot be given on recorded-milan",
            "*movdir64b (cpuid:0x7.0.ecx bit 28), wanted by the request: the CPU does not have it?[[]silicon]",
            "FAILED *::test_it - Unmet: KVM *",
        ]
    )
    for absent in ("Traceback", "pytest_plugin.py", "During handling", "A GUEST IS STARTED"):
        assert absent not in result.stdout.str()  # the reason, once, not where it was found
    (case,) = ElementTree.parse(tmp_path / "junit.xml").getroot().iter("testcase")
    assert [one.tag for one in case] == ["failure"]
    assert "movdir64b" in str(case[0].get("message"))


def test_a_skip_is_told_with_the_place_of_its_test(run: Callable[..., pytest.RunResult]) -> None:
    result = run(mark('requires=["movdir64b"]') + mark('level="x86-64-v4"').replace("test_it", "test_other"))
    places = {line.split(": ")[0] for line in result.outlines if line.startswith("SKIPPED")}
    name = "test_a_skip_is_told_with_the_place_of_its_test.py"
    assert places == {f"SKIPPED [1] {name}:2", f"SKIPPED [1] {name}:4"}


def test_what_follows_from_another_blocker_is_named_only(
    run: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    document = Report.loads(RECORDED.read_bytes()).to_json()
    ecx = int(document["offer"]["cpuid:0x1.0.ecx"], 16)
    document["offer"]["cpuid:0x1.0.ecx"] = f"{ecx & ~(1 << 26):#x}"  # no XSAVE
    changed = Report.from_json(document)
    (tmp_path / "report").write_bytes(changed.canonical()[:-1] + b',"measured":{"host":"changed"}}')
    result = run(mark('requires=["avx2"]'), report=tmp_path / "report")
    (line,) = (line for line in result.outlines if line.startswith("SKIPPED"))
    assert line.count("[dependency]") == 1
    assert " xcr0-avx" in line and line.endswith(": not without what they are built on [dependency]")


def test_what_is_enforced(run: Callable[..., pytest.RunResult], tmp_path: Path) -> None:
    """Of a host whose KVM replaces a word of the contract, or that was not tried, the answer is no."""
    document = Report.loads(RECORDED.read_bytes()).to_json()
    cpuid = {word for word in document["offer"] if word.startswith(("cpuid:", "msr:"))}
    for grades, outcome in (
        (dict.fromkeys(cpuid, "honoured"), {"passed": 1}),
        (dict.fromkeys(cpuid, "honoured") | {"cpuid:0x1.0.edx": "replaced"}, {"skipped": 1}),
        ({}, {"skipped": 1}),
    ):
        report = tmp_path / "report.json"
        changed = Report.from_json({**document, "enforcement": grades})
        report.write_bytes(changed.canonical()[:-1] + b',"measured":{"host":"changed"}}')
        run(mark("enforced=True"), report=report).assert_outcomes(**outcome)
        run(mark("enforced=False"), report=report).assert_outcomes(passed=1)


def test_marks_of_class_and_module_add_up(run: Callable[..., pytest.RunResult]) -> None:
    source = """
pytestmark = pytest.mark.kvm(requires=["avx2"])
@pytest.mark.kvm(level="x86-64-v4")
class TestAll:
    @pytest.mark.kvm(level="x86-64-v2")  # the closest counts
    def test_lower(self): pass
    def test_level(self): pass
    @pytest.mark.kvm(requires=["movdir64b"], level="x86-64-v2")
    def test_feature(self): pass
def test_module(): pass
"""
    run(source).assert_outcomes(passed=2, skipped=2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('requires=["avxx2"]', "no feature is called 'avxx2'*did you mean avx2, "),
        (
            'requires=["svebitprem"]',
            "no feature is called 'svebitprem'*did you mean svebitperm",
        ),  # arm64's
        ('requires=["avx2", "zzzzzzzz"]', "no feature is called 'zzzzzzzz'*`kvmneg features` lists them"),
        ('level="x86-64-v9"', "no level is called 'x86-64-v9'*did you mean x86-64-v4, "),
        ('level="haswell"', "no level is called 'haswell'*there are *x86-64-v1"),
        ('requires=["avx2", "sve"]', "no architecture has all of it*avx2 is x86_64's, sve is arm64's"),
        ('requires=["sve"], level="x86-64-v2"', "no architecture has all of it*x86-64-v2 is x86_64's"),
        ('requires="avx2"', "requires is a list of features*write requires="),
        ('require=["avx2"]', "it has no require*it has requires, level, enforced"),
        ('"avx2"', "it has no 'avx2'"),
        ("requires=[2]", "requires is a list of names"),
        ("level=3", "level is a name"),
        ('enforced="no"', "enforced is True or False"),
    ],
)
def test_a_mark_that_makes_no_sense_is_an_error(
    run: Callable[..., pytest.RunResult], text: str, message: str, tmp_path: Path
) -> None:
    """With what is nearest, once, and never a failure: skipping it would hide the mistake for ever.

    No host is looked at: a mistake shows where there is no KVM too.
    """
    result = run(mark(text), "--kvm-strict", report=tmp_path / "missing")
    result.assert_outcomes(errors=1)
    out = result.stdout.str().partition("= ERRORS =")[2].partition("short test summary")[0]
    assert fnmatch.fnmatch(out, f"*the mark kvm makes no sense: *{message}*")
    assert out.count("makes no sense") == 1


def test_a_test_of_another_architecture_is_skipped(run: Callable[..., pytest.RunResult]) -> None:
    result = run(mark('requires=["sve"]'))
    result.assert_outcomes(skipped=1)
    assert "the guest is arm64, host recorded-milan is x86_64" in result.stdout.str()


def test_marks_of_one_parameter(run: Callable[..., pytest.RunResult]) -> None:
    """Class, function and parameter: each adds what it needs."""
    source = """
@pytest.mark.kvm(level="x86-64-v2")
class TestAll:
    @pytest.mark.parametrize("name", [
        "none",
        pytest.param("avx2", marks=pytest.mark.kvm(requires=["avx2"])),
        pytest.param("v4", marks=pytest.mark.kvm(level="x86-64-v4")),
        pytest.param("movdir64b", marks=[pytest.mark.kvm(requires=["movdir64b"]), pytest.mark.xfail]),
    ])
    def test_it(self, name, kvm_contract):
        assert name in ("none", "avx2")
        assert bool(kvm_contract.contract.granted.explicit()["cpuid:0x7.0.ebx"] & 1 << 5) == (name == "avx2")
"""
    result = run(source, "-v")
    result.assert_outcomes(passed=2, skipped=2)
    result.stdout.fnmatch_lines(["*[[]none[]] PASSED*", "*[[]avx2[]] PASSED*", "*[[]v4[]] SKIPPED*"])


def test_what_is_skipped_anyway_is_not_looked_at(run: Callable[..., pytest.RunResult]) -> None:
    source = '@pytest.mark.skipif(True, reason="not today")\n' + mark('requires=["nonsense"]')
    result = run(source)
    result.assert_outcomes(skipped=1)
    assert "not today" in result.stdout.str()


# --- what the log and JUnit say


def header(result: pytest.RunResult) -> list[str]:
    return [line for line in result.outlines if line.startswith("kvm: ")]


def test_the_log_names_the_host(run: Callable[..., pytest.RunResult]) -> None:
    report = Report.loads(RECORDED.read_bytes())
    first, *digests = header(run(mark('level="x86-64-v2"')))
    assert first == f"kvm: recorded-milan, from {RECORDED}; Linux {report.combo['kernel']}; unverified"
    assert digests == [f"kvm: offer {report.offer.digest()}", f"kvm: combo {report.combo_digest()}"]


def test_two_boots_of_a_host_compare_as_the_same(
    run: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    document = Report.loads(RECORDED.read_bytes()).to_json()
    file = tmp_path / "junit.xml"
    found = []
    for boot in ("1", "2"):
        again = Report.from_json({**document, "combo": {**document["combo"], "boot": boot}})
        (tmp_path / "report").write_bytes(again.canonical()[:-1] + b',"measured":{"host":"same"}}')
        run(mark('level="x86-64-v2"'), f"--junit-xml={file}", report=tmp_path / "report")
        rows = ElementTree.parse(file).getroot().iterfind("testsuite/properties/property")
        found.append({row.get("name"): row.get("value") for row in rows})
    first, second = found
    assert {name for name in first if first[name] != second[name]} == {"kvm-digest"}


def test_junit_names_the_host_for_comparison(run: Callable[..., pytest.RunResult], tmp_path: Path) -> None:
    report = Report.loads(RECORDED.read_bytes())
    file = tmp_path / "junit.xml"
    run(mark('level="x86-64-v4"'), f"--junit-xml={file}").assert_outcomes(skipped=1)
    suite = ElementTree.parse(file).getroot().find("testsuite")
    assert suite is not None
    found = {one.get("name"): one.get("value") for one in suite.iterfind("properties/property")}
    assert found == {
        "kvm-host": "recorded-milan",
        "kvm-digest": report.digest(),
        "kvm-offer": report.offer.digest(),
        "kvm-combo": report.combo_digest(),
        "kvm-kernel": report.combo["kernel"],
        "kvm-grade": "unverified",
    }
    skipped = suite.find("testcase/skipped")
    assert skipped is not None
    assert "avx512f" in str(skipped.get("message"))


# --- under pytest-xdist


FOUR = "\n".join(mark('requires=["avx2"]').replace("test_it", f"test_{n}") for n in range(4))


def properties(file: Path) -> list[tuple[str | None, str | None]]:
    rows = ElementTree.parse(file).getroot().iterfind("testsuite/properties/property")
    return [(row.get("name"), row.get("value")) for row in rows]


@pytest.mark.parametrize("option", ["-v", "-x"])
def test_workers_name_the_host_once(
    run: Callable[..., pytest.RunResult], tmp_path: Path, option: str
) -> None:
    """The same lines and properties as of a run without workers, also of a run that ends at the first failure."""
    one, two = tmp_path / "one.xml", tmp_path / "two.xml"
    failing = FOUR.replace("pass", "assert False")
    alone = run(failing, option, f"--junit-xml={one}")
    shared = run(failing, option, f"--junit-xml={two}", "-n2", alone=True)
    shared.assert_outcomes(failed=shared.parseoutcomes()["failed"])
    assert header(shared) == header(alone) != []
    assert properties(two) == properties(one) != []


def test_workers_of_several_hosts_are_told_apart(
    run: Callable[..., pytest.RunResult], pytester: pytest.Pytester, tmp_path: Path
) -> None:
    document = Report.loads(RECORDED.read_bytes()).to_json()
    for worker in ("gw0", "gw1"):
        changed = Report.from_json({**document, "combo": {**document["combo"], "kernel": f"of {worker}"}})
        report = changed.canonical()[:-1] + b',"measured":{"host":"node"}}'
        (tmp_path / worker).write_bytes(report)
    pytester.makeconftest(
        f"""
def pytest_configure(config):
    if hasattr(config, "workerinput"):
        config.option.kvm_report = "{tmp_path}/" + config.workerinput["workerid"]
"""
    )
    file = tmp_path / "junit.xml"
    options = ("--dist=each", "--tx=2*popen", f"--junit-xml={file}")
    result = run(FOUR, *options, report=None, alone=True)
    result.assert_outcomes(passed=8)
    lines = header(result)
    for worker in ("gw0", "gw1"):
        assert lines.index(f"kvm: of {worker}:") + 1 == lines.index(
            f"kvm: node, from {tmp_path / worker}; Linux of {worker}; unverified"
        )
    kernels = {value for name, value in properties(file) if name == "kvm-kernel"}
    assert kernels == {"of gw0", "of gw1"}


def test_workers_without_it_say_nothing(run: Callable[..., pytest.RunResult], tmp_path: Path) -> None:
    result = run("def test_it(): pass", "-n2", report=tmp_path / "missing", alone=True)
    result.assert_outcomes(passed=1)
    assert header(result) == []


def test_a_run_without_it_costs_and_says_nothing(
    run: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    """Not one module of kvmneg but the plugin is loaded, no report is read."""
    source = """
import sys
def test_it():
    assert sorted(name for name in sys.modules if name.startswith("kvmneg")) == ["kvmneg", "kvmneg.pytest_plugin"]
"""
    options = (f"--junit-xml={tmp_path / 'junit.xml'}",)
    result = run(source, *options, report=tmp_path / "missing", alone=True)
    result.assert_outcomes(passed=1)
    assert header(result) == []
    assert "property" not in (tmp_path / "junit.xml").read_text()


def test_collecting_alone_measures_nothing(run: Callable[..., pytest.RunResult], tmp_path: Path) -> None:
    result = run(mark('level="x86-64-v2"'), "--collect-only", report=tmp_path / "missing")
    assert result.ret == pytest.ExitCode.OK
    assert header(result) == []


def test_a_report_that_is_none_fails_each_test(run: Callable[..., pytest.RunResult], tmp_path: Path) -> None:
    (tmp_path / "report").write_text("{}")
    result = run(mark('level="x86-64-v2"') + "def test_other(): pass", report=tmp_path / "report")
    result.assert_outcomes(errors=1, passed=1)
    assert "report" in header(result)[0]


def test_a_fault_fails_the_tests_that_need_it_and_no_other(
    run: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    """Also one that nobody foresaw, an extension that does not load: not the run of a suite with two such tests."""
    pytester.makeconftest("import sys\nsys.modules['kvmneg._libkvmneg'] = None\n")
    source = mark('level="x86-64-v2"') + "def test_other(): pass"
    nobody = pytester.path / "nobody"
    result = run(source.replace("test_it()", "test_it(kvm_report)"), report=None, alone=True)
    if not os.path.exists(DEFAULT_SOCKET):
        result.assert_outcomes(errors=1, passed=1)
        assert "kvmneg._libkvmneg" in result.stdout.str()
    result = run(source, f"--kvm-socket={nobody}", report=None, alone=True)
    result.assert_outcomes(errors=1, passed=1)


# --- where there is no KVM


def test_without_kvm(run: Callable[..., pytest.RunResult], pytester: pytest.Pytester) -> None:
    """Skipped, and strict: failed, with what is wrong with the device. In processes of their own: KVM is replaced."""
    pytester.makeconftest(
        """
from kvmneg.errors import NoKvm
from kvmneg.host.kvm import Kvm
def gone(path="/dev/kvm"):
    raise NoKvm("/dev/kvm is missing", hint="load it")
Kvm.open = gone
"""
    )
    for text in ("", 'level="x86-64-v2"'):
        nowhere = f"--kvm-socket={pytester.path / 'nowhere'}"
        result = run(mark(text), report=None, alone=True)
        if not os.path.exists(DEFAULT_SOCKET):
            result.assert_outcomes(skipped=1)
            result.stdout.fnmatch_lines(["SKIPPED*no usable KVM: /dev/kvm is missing"])
            run(mark(text), "--kvm-strict", report=None, alone=True).assert_outcomes(failed=1)
        if text:  # a daemon that was named and is not there is no reason to skip
            run(mark(text), nowhere, report=None, alone=True).assert_outcomes(errors=1)


# --- fixtures


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[str]:
    """The socket of a kvmnegd that serves the recorded report."""
    with daemon_in(tmp_path, "--report", str(RECORDED)) as path:
        yield path


HELD = """
from pathlib import Path
from kvmneg.client import DEFAULT_SOCKET, Client
from kvmneg.policy.contract import Contract
@pytest.mark.kvm(requires=["avx2"], level="x86-64-v2")
def test_it(kvm_contract, kvm_report):
    held = kvm_contract.contract
    print("DIGEST", held.digest, kvm_contract.vm or "-")
    assert Contract.from_binary(Path(kvm_contract.path).read_bytes()).digest == held.digest
    assert kvm_report.host == "recorded-milan"
    if kvm_contract.vm:
        with Client(SOCKET) as client:
            assert client.get_contract(held.digest)["path"] == kvm_contract.path
"""


def held(result: pytest.RunResult) -> tuple[str, str]:
    """(digest, VM) that HELD printed."""
    (line,) = (line for line in result.outlines if "DIGEST" in line)
    digest, vm = line.partition("DIGEST")[2].split()
    return digest, vm


def test_a_contract_without_a_daemon(run: Callable[..., pytest.RunResult]) -> None:
    result = run(HELD, "-s")
    result.assert_outcomes(passed=1)
    assert held(result)[1] == "-"


def test_a_contract_that_a_daemon_holds_until_the_test_ends(
    run: Callable[..., pytest.RunResult], daemon: str
) -> None:
    """The same contract as without one; afterwards nobody holds it."""
    result = run(f"SOCKET = {daemon!r}\n{HELD}", "-s", f"--kvm-socket={daemon}", report=None)
    result.assert_outcomes(passed=1)
    assert header(result)[0].startswith(f"kvm: recorded-milan, from kvmnegd on {daemon}; ")
    digest, vm = held(result)
    assert digest == held(run(HELD, "-s"))[0]
    with Client(daemon) as client:
        assert client.get_contract(digest)["path"] is None
        with pytest.raises(Exception, match="holds no contract"):
            client.end(vm)


def test_the_fence_of_the_daemon_holds(run: Callable[..., pytest.RunResult], daemon: str) -> None:
    with Client(daemon) as client:
        client.fence_pin("for a test", source="level:x86-64-v2")
    result = run(mark('requires=["avx2"]'), f"--kvm-socket={daemon}", report=None)
    result.assert_outcomes(skipped=1)
    assert "the pinned fence does not name it [fence]" in result.stdout.str()


# --- the manual page's examples


def example(of: str) -> str:
    """The example of kvmneg-pytest(7) with this in it."""
    page = (ROOT / "man/kvmneg-pytest.7.scd").read_text("utf-8").replace("\\*", "*")
    (found,) = (
        text for text in re.findall(r"^```\n(.*?)^```$", page, re.DOTALL | re.MULTILINE) if of in text
    )
    return str(found)


def test_the_example_of_the_page(run: Callable[..., pytest.RunResult]) -> None:
    source = (
        example("start_guest")
        + "\ndef start_guest(path): print('STARTED', __import__('os').path.getsize(path))\n"
    )
    result = run(source, "-s")
    result.assert_outcomes(
        passed=3, skipped=2
    )  # the recorded host has no AVX-512, and no guest of it was graded
    assert sum("STARTED" in line for line in result.outlines) == 3
    run(source, "--kvm-strict").assert_outcomes(passed=3, failed=2)


def test_the_example_that_compares_two_runs(run: Callable[..., pytest.RunResult], tmp_path: Path) -> None:
    document = Report.loads(RECORDED.read_bytes()).to_json()
    script = "".join(
        line for line in example("diff before").splitlines(True) if not line.startswith("pytest ")
    )

    def ran(name: str, kernel: str, boot: str) -> None:
        combo = {**document["combo"], "kernel": kernel, "boot": boot}
        changed = Report.from_json({**document, "combo": combo})
        (tmp_path / "report").write_bytes(changed.canonical()[:-1] + b',"measured":{"host":"node"}}')
        run(mark('level="x86-64-v2"'), f"--junit-xml={tmp_path / name}.xml", report=tmp_path / "report")

    ran("before", "6.1", "1")
    ran("after", "6.1", "2")
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert (tmp_path / "before.txt").read_text().count("\n") == 5
    ran("after", "6.12", "3")
    done = subprocess.run(["sh", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    changed = {line.split('"')[1] for line in done.stdout.splitlines() if line.startswith(">")}
    assert changed == {"kvm-kernel", "kvm-combo"}


# --- the package


def test_the_entry_point() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["entry-points"]["pytest11"] == {"kvmneg": "kvmneg.pytest_plugin"}


# --- on this KVM


@pytest.mark.kvm
def test_measured_here(kvm_report: Report) -> None:
    """Our own tests use it."""
    from kvmneg.host.measure import measure

    assert kvm_report.offer == measure().offer


@pytest.mark.kvm
def test_a_contract_of_this_host(kvm_contract: Held) -> None:
    path = Path(kvm_contract.path)
    assert Contract.from_binary(path.read_bytes()).digest == kvm_contract.contract.digest


@pytest.mark.kvm
def test_a_vm_under_its_contract(
    run: Callable[..., pytest.RunResult], kvm_contract: Held, kvm_report: Report
) -> None:
    """It holds every word, where KVM keeps to them; elsewhere no test gets a VM that does not."""
    source = """
@pytest.mark.kvm
def test_it(kvm_vm, kvm_contract):
    assert kvm_vm.contract.binary() == kvm_contract.contract.binary()
    kvm_vm.contract.verify(kvm_vm.vcpu)
"""
    result = run(source, report=None)
    if not {"replaced", "refused"} & set(grade.broken(kvm_contract.contract.granted, kvm_report).values()):
        result.assert_outcomes(passed=1)
    else:
        result.assert_outcomes(skipped=1)
        assert "KVM does not keep to the contract: " in result.stdout.str()
        run(source, "--kvm-strict", report=None).assert_outcomes(failed=1)


@pytest.mark.kvm
def test_the_pmu_of_a_vm(kvm_vm: AppliedVm) -> None:
    """One of the CPUs', where KVM lets a VM choose; choosing another fails, and so does one that is none."""
    has = bytearray(struct.pack("=IIQQ", 0, 0, 3, 0))  # KVM_ARM_VCPU_PMU_V3_SET_PMU
    try:
        chooses = fcntl.ioctl(kvm_vm.vcpu, 0x4018AEE3, has) == 0  # KVM_HAS_DEVICE_ATTR
    except OSError:
        chooses = False
    assert (kvm_vm.pmu in pmus()) == chooses
    assert (kvm_vm.pmu == -1) == (not chooses)


def set_attribute(fd: int, group: int, attribute: int, value: int | None = None) -> None:
    """KVM_SET_DEVICE_ATTR."""
    held = array("Q", [value or 0])
    address = 0 if value is None else held.buffer_info()[0]
    fcntl.ioctl(fd, 0x4018AEE1, struct.pack("=IIQQ", 0, group, attribute, address))


@pytest.mark.kvm
def test_the_vgic_of_a_vm(kvm_vm: AppliedVm) -> None:
    """Initialised by the test, at its addresses, it takes the contract's revision; x86 has none."""
    if os.uname().machine != "aarch64":
        assert kvm_vm.vgic == -1
        return
    with suppress(OSError):  # of v3: KVM_VGIC_V3_ADDR_TYPE_DIST, _REDIST; of v2: _DIST, _CPU
        set_attribute(kvm_vm.vgic, 0, 2, 0x0800_0000)
        set_attribute(kvm_vm.vgic, 0, 3, 0x080A_0000)
    with suppress(OSError):
        set_attribute(kvm_vm.vgic, 0, 0, 0x0800_0000)
        set_attribute(kvm_vm.vgic, 0, 1, 0x0801_0000)
    set_attribute(kvm_vm.vgic, 4, 0)  # KVM_DEV_ARM_VGIC_GRP_CTRL, KVM_DEV_ARM_VGIC_CTRL_INIT
    kvm_vm.contract.vgic(kvm_vm.vgic)
    kvm_vm.contract.verify_vgic(kvm_vm.vgic)
    kvm_vm.contract.verify(kvm_vm.vcpu)


def test_event_sources_of_cpus(tmp_path: Path) -> None:
    """Of those that sysfs lists the ones that CPUs have; a source of the whole machine has no list."""
    for name, kind, cpus in (
        ("armv8_cortex_a53", "8", "0-3"),
        ("armv8_cortex_a73", "9", "4,6-7"),
        ("software", "1", ""),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "type").write_text(f"{kind}\n")
        if cpus:
            (tmp_path / name / "cpus").write_text(f"{cpus}\n")
    assert pmus(str(tmp_path)) == {8: {0, 1, 2, 3}, 9: {4, 6, 7}}
    assert pmus(str(tmp_path / "missing")) == {}


def test_no_vm_for_another_hosts_report(run: Callable[..., pytest.RunResult]) -> None:
    result = run(mark('level="x86-64-v2"').replace("test_it()", "test_it(kvm_vm)"))
    result.assert_outcomes(skipped=1)
    assert "another host's contract" in result.stdout.str()
