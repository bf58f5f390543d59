# SPDX-License-Identifier: LGPL-2.1-or-later
"""pytest's plugin: tests that need something of KVM say what, and run where a guest can have it.

    @pytest.mark.kvm(requires=["avx2", "kvm-pv-eoi"], level="x86-64-v3", enforced=True)
    def test_migrates(kvm_contract): ...

Where the host cannot give that, the test is skipped, or with --kvm-strict fails, and the blockers say why; a bare
`@pytest.mark.kvm` needs a usable KVM. Features come with those they are built on; without a level a guest has
x86-64-v1. `enforced` asks for a KVM that keeps to every word of the contract (kvmneg(1), --require-enforced).

The daemon is asked, and its fence holds, where there is one (--kvm-socket); else this host is measured, once a run.
After collection, and in JUnit's properties, stand the host's digest, kernel and grade. Loaded in every run of pytest
where kvmneg is installed: nothing of kvmneg is imported, and nothing measured, until a test uses it.
"""

from __future__ import annotations

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from kvmneg.errors import KvmnegError
    from kvmneg.features.report import Report
    from kvmneg.testing.host import Held, Host
    from kvmneg.testing.needs import Needs
    from kvmneg.testing.vm import AppliedVm

_MARK = (
    "kvm(requires=[], level=None, enforced=False): needs a usable KVM, on which a guest can have these features and "
    "this level, and, with enforced, sees what its contract says"
)
_FIXTURES = frozenset(("kvm_report", "kvm_contract", "kvm_vm"))
_host_key = pytest.StashKey["Host | KvmnegError"]()


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


def pytest_unconfigure(config: pytest.Config) -> None:
    found = config.stash.get(_host_key, None)
    if found is not None and not isinstance(found, Exception):
        found.close()


# --- the host


def _host(config: pytest.Config) -> Host:
    """The host, found once a run. Raises what finding it did."""
    found = config.stash.get(_host_key, None)
    if found is None:
        from kvmneg.errors import KvmnegError
        from kvmneg.testing.host import Host

        try:
            found = Host.find(config.getoption("--kvm-socket"), config.getoption("--kvm-report"))
        except KvmnegError as error:
            found = error
        config.stash[_host_key] = found
    if isinstance(found, Exception):
        raise found
    return found


def _uses(item: pytest.Item) -> bool:
    fixtures = getattr(item, "fixturenames", ())  # a doctest's, or another plugin's item, may have none
    return item.get_closest_marker("kvm") is not None or not _FIXTURES.isdisjoint(fixtures)


@pytest.hookimpl(tryfirst=True)  # before the terminal reports the collection
def pytest_collection_finish(session: pytest.Session) -> None:
    if session.config.getoption("collectonly") or not any(map(_uses, session.items)):
        return
    try:
        properties = _host(session.config).properties()
    except Exception:
        return  # whatever it is, only tests that need a KVM fail, and each tells it
    if session.config.getoption("xmlpath", None):
        from _pytest.junitxml import xml_key  # what the fixture record_testsuite_property uses

        xml = session.config.stash.get(xml_key, None)  # a worker of pytest-xdist has none
        if xml is not None:
            for name, value in properties.items():
                xml.add_global_property(name, value)


def pytest_report_collectionfinish(config: pytest.Config) -> list[str]:
    found = config.stash.get(_host_key, None)
    if found is None:
        return []
    if isinstance(found, Exception):
        return [f"kvm: {str(found).splitlines()[0]}"]
    told = found.properties()
    return [
        f"kvm: {told['kvm-host']}, {found.source}; Linux {told['kvm-kernel']}; {told['kvm-grade']}",
        f"kvm: offer {told['kvm-offer']}",
        f"kvm: combo {told['kvm-combo']}",
    ]


# --- the mark


def _needs(item: pytest.Item) -> Needs:
    """What the test's marks say, the function's and those of its class and module. Raises UsageError."""
    from kvmneg.testing.needs import Needs

    return Needs.of_marks((mark.args, mark.kwargs) for mark in item.iter_markers("kvm"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """After the marks skip and skipif, which pytest looks at first, and before fixtures are made."""
    if item.get_closest_marker("kvm") is None:
        return
    from kvmneg.errors import KvmnegError

    try:
        needs = _needs(item)
        if needs:
            _host(item.config).contract(needs)
        elif item.config.getoption("--kvm-report") is None:
            _usable()
    except KvmnegError as error:
        _refuse(item.config, error)


def _usable() -> None:
    """Raises NoKvm where this process cannot use KVM."""
    from kvmneg.host.kvm import Kvm

    Kvm.open().close()


def _refuse(config: pytest.Config, error: KvmnegError) -> None:
    """Skip where the host is why; a mark that makes no sense, or a daemon that fails, is a failure."""
    from kvmneg.errors import Blocked, NoKvm, NotApplied
    from kvmneg.testing.needs import brief

    if not isinstance(error, Blocked | NoKvm | NotApplied) or config.getoption("--kvm-strict"):
        lines = [blocker.describe() for blocker in getattr(error, "blockers", ())]
        pytest.fail("\n  ".join([str(error), *lines]), pytrace=False)
    if isinstance(error, NoKvm):
        pytest.skip(f"no usable KVM: {error.message}")
    if isinstance(error, NotApplied):
        pytest.skip(f"KVM does not keep to the contract: {error.message}")
    pytest.skip(f"KVM cannot give it: {error.message}: {brief(error.blockers)}")


# --- fixtures


@pytest.fixture(scope="session")
def kvm_report(pytestconfig: pytest.Config) -> Report:
    """What KVM of this host offers (kvmneg.features.report.Report)."""
    from kvmneg.errors import KvmnegError

    try:
        return _host(pytestconfig).report
    except KvmnegError as error:
        _refuse(pytestconfig, error)
        raise


@pytest.fixture
def kvm_contract(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Held]:
    """The contract of this test's VM, by its marks: `contract`, and `path`, the file that a VMM opens.

    With a daemon the VM holds it until the test ends.
    """
    from kvmneg.errors import KvmnegError

    try:
        held = _host(request.config).hold(_needs(request.node), str(tmp_path))
    except KvmnegError as error:
        _refuse(request.config, error)
        raise
    with held:
        yield held


@pytest.fixture
def kvm_vm(kvm_contract: Held, pytestconfig: pytest.Config) -> Iterator[AppliedVm]:
    """A VM with one vCPU, never run, to which the contract is applied: descriptors `vm` and `vcpu`.

    Where KVM does not keep to it, the test is skipped; `enforced` in the mark says so beforehand.
    """
    from kvmneg.errors import KvmnegError
    from kvmneg.testing.vm import AppliedVm

    if pytestconfig.getoption("--kvm-report") is not None:
        pytest.skip("another host's contract: --kvm-report only tells what would run")
    try:
        vm = AppliedVm(kvm_contract.path)
    except KvmnegError as error:
        _refuse(pytestconfig, error)
        raise
    with vm:
        yield vm
