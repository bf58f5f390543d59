# SPDX-License-Identifier: LGPL-2.1-or-later
"""What every run of the tests ends by saying: which KVM it ran on, which ioctls, what was skipped and why.

In CI a skip that tests/allowed-skips.txt does not list is a failure, as is a missing tool. Where /dev/kvm is
usable, the ioctls of MINIMUM must have run: a suite that passes without touching KVM shows nothing.

Tests marked `hosts` run in emulated hosts (tests/hosts): --hosts=few one of each architecture, --hosts=all every one.
"""

from __future__ import annotations

import fnmatch
import os
import platform
import sys
from collections import Counter
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _pytest.terminal import TerminalReporter

    from kvmneg.host.kvm import Kvm

TOP = Path(__file__).parent
sys.path.append(str(TOP.parent))  # behind everything: kvmneg stays the built one
from tests import summary  # noqa: E402 - needs the line above

MINIMUM_X86 = (
    "KVM_GET_API_VERSION", "KVM_CHECK_EXTENSION", "KVM_CREATE_VM", "KVM_CREATE_VCPU", "KVM_GET_SUPPORTED_CPUID",
    "KVM_SET_CPUID2",
    "KVM_GET_CPUID2",
    "KVM_SET_MSRS",
    "KVM_GET_EMULATED_CPUID", "KVM_GET_MSR_FEATURE_INDEX_LIST", "KVM_GET_MSRS",
)  # fmt: skip
MINIMUM_ARM64 = (
    "KVM_GET_API_VERSION", "KVM_CHECK_EXTENSION", "KVM_CREATE_VM", "KVM_ARM_PREFERRED_TARGET", "KVM_ARM_VCPU_INIT",
    "KVM_GET_REG_LIST", "KVM_GET_ONE_REG", "KVM_SET_ONE_REG", "KVM_CREATE_DEVICE",
)  # fmt: skip

# kvmneg's own plugin, which pytest loads by itself where the package is installed; and sub-runs, to test it
_OWN = (
    () if any(one.name == "kvmneg" for one in entry_points(group="pytest11")) else ("kvmneg.pytest_plugin",)
)
pytest_plugins = ("pytester", "tests.c_client", *_OWN)

# a terminal's width is what a test sets: shells export it, and so does pytest-xdist
os.environ.pop("COLUMNS", None)
os.environ.pop("PYTHONUNBUFFERED", None)  # a service has none: its standard output is buffered

_handles: list[Kvm] = []
_skips: list[tuple[str, str]] = []
_outcomes: Counter[str] = Counter()
_files: Counter[str] = Counter()
_parts: list[summary.Part] = []
_of_workers: Counter[tuple[str, int]] = Counter()  # ioctls, where pytest-xdist ran the tests in others


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--hosts", choices=("few", "all"), default="few", help="which emulated hosts to run in")
    parser.addoption("--long", action="store_true", help="more examples, longer soaks: hours, not minutes")


@pytest.fixture
def summary_parts() -> list[summary.Part]:
    """Where a test that ran others inside an emulated host puts what they did."""
    return _parts


def kvm_problem() -> str:
    """Why /dev/kvm cannot be used here, or "" where it can."""
    from kvmneg.errors import NoKvm
    from kvmneg.host.kvm import Kvm

    try:
        Kvm.open().close()
    except NoKvm as error:
        return error.message
    return ""


@pytest.fixture(scope="session", autouse=True)
def temporary_folder_of_inner_runs(tmp_path_factory: pytest.TempPathFactory) -> None:
    """A pytest that a test starts has a folder in this one's: it would close the common one to other users again."""
    os.environ["PYTEST_DEBUG_TEMPROOT"] = str(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="session", autouse=True)
def count_ioctls() -> Iterator[None]:
    """Keep every handle that a test makes, so that the summary can count its ioctls."""
    from kvmneg.host.kvm import Kvm

    original = Kvm.__init__

    def remember(self: Kvm, fd: int, path: str = "/dev/kvm") -> None:
        original(self, fd, path)
        _handles.append(self)

    Kvm.__init__ = remember  # type: ignore[method-assign]
    yield
    Kvm.__init__ = original  # type: ignore[method-assign]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        _outcomes[report.outcome] += 1
    if report.when == "call" and not report.skipped:
        _files[report.location[0]] += 1
    if report.skipped and isinstance(report.longrepr, tuple):
        _skips.append((report.nodeid, report.longrepr[2].removeprefix("Skipped: ")))


def _unlisted_skips() -> list[tuple[str, str]]:
    lines = (TOP / "allowed-skips.txt").read_text("utf-8").splitlines()
    allowed = [line for line in lines if line.strip() and not line.startswith("#")]
    # an emulated host has no compiler, and a VMM only where one is brought
    if summary.VARIABLE in os.environ:
        allowed += ["gcc is not installed", "qemu-system-x86_64 is not installed"]
    return [
        (node, why) for node, why in _skips if not any(fnmatch.fnmatch(why, pattern) for pattern in allowed)
    ]


def _ioctls() -> Counter[tuple[str, int]]:
    total: Counter[tuple[str, int]] = Counter(_of_workers)
    for handle in _handles:
        total.update(handle.log)
    return total


def _part() -> summary.Part:
    """What ran on this machine's own KVM."""
    return summary.Part("", summary.kind(), kvm_problem(), _ioctls(), dict(_outcomes), dict(_files))


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """What a worker of pytest-xdist did besides its tests' outcomes, which come with its reports."""
    for name, data in getattr(node, "workeroutput", {}).get("kvmneg_parts", ()):
        part = summary.read(data, name)
        if name:
            _parts.append(part)
        else:
            _of_workers.update(part.ioctls)


def _not_run(session: pytest.Session) -> list[str]:
    """The ioctls of the minimum set that no test made succeed, where the whole suite ran on a usable KVM."""
    config = session.config
    # -m hosts is a part too: it leaves this machine's KVM alone
    chosen = config.getoption("keyword") or config.getoption("markexpr")
    if chosen or config.args != config.getini("testpaths") or kvm_problem():
        return []
    succeeded = {ioctl for (ioctl, error) in _ioctls() if error == 0}
    minimum = MINIMUM_ARM64 if platform.machine() == "aarch64" else MINIMUM_X86
    return [ioctl for ioctl in minimum if ioctl not in succeeded]


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if hasattr(session.config, "workeroutput"):  # a worker: the one who started it sums up
        parts = [(part.name, part.to_json()) for part in (_part(), *_parts)]
        session.config.workeroutput["kvmneg_parts"] = parts
        return
    in_ci = os.environ.get("CI") and _unlisted_skips()
    if session.exitstatus == pytest.ExitCode.OK and (in_ci or _not_run(session)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
    session.config.stash[_session_key] = session
    if os.environ.get(summary.VARIABLE):
        Path(os.environ[summary.VARIABLE]).write_bytes(_part().to_json())


_session_key = pytest.StashKey[pytest.Session]()


def pytest_terminal_summary(terminalreporter: TerminalReporter, config: pytest.Config) -> None:
    terminalreporter.section("KVM")
    for line in summary.lines([_part(), *_parts]):
        terminalreporter.line(line)
    session = config.stash.get(_session_key, None)
    for ioctl in _not_run(session) if session else ():
        terminalreporter.line(f"  {ioctl} never succeeded, though KVM is usable", red=True)
    for node, why in _unlisted_skips():
        terminalreporter.line(
            f"skip not on tests/allowed-skips.txt: {node}: {why}", red=bool(os.environ.get("CI"))
        )
