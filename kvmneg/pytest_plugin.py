# SPDX-License-Identifier: LGPL-2.1-or-later
"""pytest's plugin: tests that need something of KVM say what, and run where a guest can have it.

    @pytest.mark.kvm(requires=["avx2", "kvm-pv-eoi"], level="x86-64-v3", enforced=True)
    def test_migrates(kvm_contract): ...

Where the host cannot give that, the test is skipped, or with --kvm-strict fails, and the blockers say why; a mark that
makes no sense is an error. The daemon is asked, and its fence holds, where there is one (--kvm-socket); else this host
is measured, once a process. kvmneg-pytest(7) has all of it.

Loaded in every run of pytest where kvmneg is installed: nothing of kvmneg is imported, and nothing measured, until a
test uses it. Under pytest-xdist each worker finds the host for itself, for it may run elsewhere, and says with its
first report what it found (_Told); the log and JUnit have it once.
"""

from __future__ import annotations

import os
from contextlib import contextmanager

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping
    from pathlib import Path
    from typing import Any

    from _pytest.outcomes import Failed, Skipped

    from kvmneg.features.report import Report
    from kvmneg.testing.host import Held, Host
    from kvmneg.testing.needs import Needs
    from kvmneg.testing.vm import AppliedVm
else:
    Failed, Skipped = pytest.fail.Exception, pytest.skip.Exception

_MARK = (
    "kvm(requires=[], level=None, enforced=False): needs a usable KVM, on which a guest can have these features and "
    "this level, and, with enforced, sees what its contract says"
)
_FIXTURES = frozenset(("kvm_report", "kvm_contract", "kvm_vm"))
_host_key = pytest.StashKey["Host | Exception"]()
_told_key = pytest.StashKey[bool]()
_CARRIED = "kvmneg_host"  # of a worker's report: what _Told.add takes


class Unmet(Failed):
    """What a test needs is not there, and --kvm-strict: a failure of the test, wherever it was found out."""

    __module__ = "builtins"  # as pytest's own: its summary has "Unmet: ..."


class Missing(Skipped):
    """The same without --kvm-strict: told with the place of the test."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("kvm", "what KVM gives to guests here (kvmneg)")
    group.addoption(
        "--kvm-strict",
        action="store_true",
        help="fail tests whose needs KVM does not meet, instead of skipping",
    )
    group.addoption(
        "--kvm-socket",
        metavar="PATH",
        help="ask this kvmnegd; else the usual one, if it runs, else KVM itself",
    )
    group.addoption("--kvm-report", metavar="FILE", help="judge by this report: what would run on that host?")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARK)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Told(config), "kvmneg-told")


def pytest_unconfigure(config: pytest.Config) -> None:
    found = config.stash.get(_host_key, None)
    if found is not None and not isinstance(found, Exception):
        found.close()


# --- the host


def _host(config: pytest.Config) -> Host:
    """The host, found once a process. Raises what finding it did."""
    found = config.stash.get(_host_key, None)
    if found is None:
        from kvmneg.testing.host import Host

        try:
            found = Host.find(config.getoption("--kvm-socket"), config.getoption("--kvm-report"))
        except Exception as error:  # whatever it is, only tests that need a KVM fail, and each tells it
            found = error
        config.stash[_host_key] = found
    if isinstance(found, Exception):
        raise found.with_traceback(None)
    return found


def _uses(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())  # a doctest's, or another plugin's item, may have none
    return item.get_closest_marker("kvm") is not None or not _FIXTURES.isdisjoint(fixtures)


# --- what the log and JUnit say of it


def _found(config: pytest.Config) -> dict[str, Any]:
    """{"properties", "source"} of the host, or {"error"}: what a worker can send."""
    try:
        host = _host(config)
        return {"properties": dict(host.properties()), "source": host.source}
    except Exception as error:
        return {"error": (str(error) or type(error).__name__).splitlines()[0]}


class _Told:
    """What was found of the host, by this process or by pytest-xdist's workers, each different answer once."""

    def __init__(self, config: pytest.Config) -> None:
        self._config = config
        self._workers: list[tuple[dict[str, Any], list[str]]] = []

    def lines(self, found: Mapping[str, Any]) -> list[str]:
        if "error" in found:
            return [f"kvm: {found['error']}"]
        told = found["properties"]
        return [
            f"kvm: {told['kvm-host']}, {found['source']}; Linux {told['kvm-kernel']}; {told['kvm-grade']}",
            f"kvm: offer {told['kvm-offer']}",
            f"kvm: combo {told['kvm-combo']}",
        ]

    def to_junit(self, found: Mapping[str, Any]) -> None:
        if self._config.getoption("xmlpath", None):
            from _pytest.junitxml import xml_key  # what the fixture record_testsuite_property uses

            xml = self._config.stash.get(xml_key, None)
            if xml is not None:
                for name, value in found.get("properties", {}).items():
                    xml.add_global_property(name, value)

    @pytest.hookimpl(tryfirst=True)  # before the terminal reports the collection
    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if not self._config.getoption("collectonly") and any(map(_uses, session.items)):
            self.to_junit(_found(self._config))

    def pytest_report_collectionfinish(self) -> list[str]:
        return self.lines(_found(self._config)) if _host_key in self._config.stash else []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A worker says what it found."""
        carried = report.__dict__.pop(_CARRIED, None)
        if carried is None:
            return
        for found, workers in self._workers:
            if found == carried["found"]:
                workers.append(carried["worker"])
                return
        self._workers.append((carried["found"], [carried["worker"]]))
        self.to_junit(carried["found"])

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        """The workers' answers; more than one are of several hosts, or of one that changed meanwhile."""
        for found, workers in self._workers:
            if len(self._workers) > 1:
                terminalreporter.write_line(f"kvm: of {' '.join(sorted(workers))}:")
            for line in self.lines(found):
                terminalreporter.write_line(line)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """An unmet need is the test's, not its set-up's; a worker's first report of a test with one names the host."""
    report = yield
    raised = call.excinfo.value if call.excinfo else None
    if isinstance(raised, Unmet):
        report.when = "call"  # FAILED, not ERROR
    elif isinstance(raised, Missing):
        path, line, _ = item.reportinfo()
        report.longrepr = os.fspath(path), (line or 0) + 1, f"Skipped: {raised.msg}"
    config = item.config
    if hasattr(config, "workerinput") and _told_key not in config.stash and _uses(item):
        config.stash[_told_key] = True
        carried = {"worker": config.workerinput["workerid"], "found": _found(config)}
        setattr(report, _CARRIED, carried)
    return report


# --- the mark


def _needs(item: pytest.Item) -> Needs:
    """What the test's marks say, the function's and those of its class and module. Raises UsageError."""
    from kvmneg.testing.needs import Needs

    needs = Needs.of_marks((mark.args, mark.kwargs) for mark in item.iter_markers("kvm"))
    needs.check()
    return needs


def pytest_runtest_setup(item: pytest.Item) -> None:
    """After the marks skip and skipif, which pytest looks at first, and before fixtures are made."""
    if item.get_closest_marker("kvm") is None:
        return
    with _refusing(item.config):
        needs = _needs(item)
        if needs:
            _host(item.config).contract(needs)
        elif item.config.getoption("--kvm-report") is None:
            _usable()


def _usable() -> None:
    """Raises NoKvm where this process cannot use KVM."""
    from kvmneg.host.kvm import Kvm

    Kvm.open().close()


@contextmanager
def _refusing(config: pytest.Config) -> Iterator[None]:
    """Skip where the host is why; a mark that makes no sense, or a daemon that fails, is an error."""
    from kvmneg.errors import KvmnegError
    from kvmneg.testing.needs import brief, refusal

    try:
        yield
    except KvmnegError as error:
        unmet, blockers = refusal(error), getattr(error, "blockers", ())
        if not unmet:
            raise Failed(str(error), pytrace=False) from None
        if config.getoption("--kvm-strict"):
            lines = [error.hint] if error.hint else []
            lines += [blocker.describe() for blocker in blockers]
            raise Unmet("\n  ".join([unmet, *lines]), pytrace=False) from None
        raise Missing(f"{unmet}: {brief(blockers)}" if blockers else unmet) from None


# --- fixtures


@pytest.fixture(scope="session")
def kvm_report(pytestconfig: pytest.Config) -> Report:
    """What KVM of this host offers (kvmneg.features.report.Report)."""
    with _refusing(pytestconfig):
        return _host(pytestconfig).report


@pytest.fixture
def kvm_contract(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Held]:
    """The contract of this test's VM, by its marks: `contract`, and `path`, the file that a VMM opens.

    With a daemon the VM holds it until the test ends.
    """
    with _refusing(request.config):
        held = _host(request.config).hold(_needs(request.node), str(tmp_path))
    with held:
        yield held


@pytest.fixture
def kvm_vm(kvm_contract: Held, pytestconfig: pytest.Config) -> Iterator[AppliedVm]:
    """A VM with one vCPU, never run, to which the contract is applied: descriptors `vm` and `vcpu`.

    Where KVM does not keep to it, the test is skipped; `enforced` in the mark says so beforehand.
    """
    from kvmneg.testing.vm import AppliedVm

    if pytestconfig.getoption("--kvm-report") is not None:
        pytest.skip("another host's contract: --kvm-report only tells what would run")
    with _refusing(pytestconfig):
        vm = AppliedVm(kvm_contract.path)
    with vm:
        yield vm
