# SPDX-License-Identifier: LGPL-2.1-or-later
"""Running libvirts of three versions: their baselines of recorded hosts, two and three at a time, are ours.

`virsh cpu-baseline` of every pair of one vendor and of a fixed choice of triples, `hypervisor-cpu-baseline` of
every pair for TCG and, where it is usable, for KVM; the differences are libvirt_live_differences.txt. Each libvirtd
runs apart, from an unpacked package, for the few seconds that all questions take (libvirt_live.py).
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

from kvmneg.errors import NoKvm
from kvmneg.features.featureset import meet_all
from kvmneg.host.kvm import Kvm

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
    from tests.packages import errors, store
    from tests.packages.tree import Tree
    from tests.peers import libvirt_answers, libvirt_causes, libvirt_live
    from tests.peers.libvirt_answers import Live
    from tests.peers.libvirt_causes import Difference
else:
    _load("kvmneg_packages", HERE.parent / "packages/__init__.py")
    errors, store = (importlib.import_module(f"kvmneg_packages.{name}") for name in ("errors", "store"))
    _load("libvirt_data", HERE / "libvirt_data.py")
    libvirt_causes, libvirt_live, libvirt_answers = (
        _load(name, HERE / f"{name}.py") for name in ("libvirt_causes", "libvirt_live", "libvirt_answers")
    )

LIST = HERE / "libvirt_live_differences.txt"
# The newest is sid's, a new version every month: told apart by the first number.
SUITES = {"9.0": "bookworm", "11.3": "trixie", "12": "sid"}
VERSIONS = tuple(SUITES)
LEAST = 20  # features of any two hosts that were recorded


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Live]:
    """live(version) → that libvirt, asked once for all tests."""
    folder = os.environ.get("KVMNEG_PEER_DATA", "")
    if not folder:
        pytest.skip("KVMNEG_PEER_DATA is not set")
    if platform.machine() != "x86_64":
        pytest.skip("processor flags are x86's")
    if os.geteuid() != 0:
        pytest.skip("needs root: a libvirtd apart from this system's has namespaces of its own")

    @cache
    def ask(version: str) -> Live | str | libvirt_live.Ended:
        place = tmp_path_factory.mktemp("libvirt")
        found = _trees(version)
        try:
            if isinstance(found, str):
                return found
            return libvirt_answers.ask(version, found, Path(folder), place, kvm=_usable_kvm())
        except libvirt_live.Apart as error:
            return f"libvirtd cannot run apart here: {error}"
        except libvirt_live.Ended as error:
            return error  # and no test waits for it anew
        finally:
            shutil.rmtree(place, ignore_errors=True)

    def asked(version: str) -> Live:
        found = ask(version)
        if isinstance(found, str):
            pytest.skip(found)
        if isinstance(found, libvirt_live.Ended):
            raise found
        return found

    return asked


def _trees(version: str) -> list[Tree] | str:
    """libvirt, with the QEMU of its suite where it does not bring one; or why it cannot be had."""
    packages = store.Store()
    try:
        libvirt = packages.get(store.Wanted("libvirt-daemon-system", version, SUITES[version]), exact=True)
        if (libvirt.root / libvirt_live.EMULATOR.lstrip("/")).exists():
            return [libvirt]
        return [libvirt, packages.get(store.Wanted("qemu-system-x86", "", SUITES[version]))]
    except errors.NoTool as error:
        return str(error)
    except errors.Unreachable as error:
        return f"the mirror is not reachable: {error}"
    except errors.Missing as error:
        return f"the archive has no libvirt {version} any more: {error}"


def _usable_kvm() -> bool:
    try:
        Kvm.open().close()
    except NoKvm:
        return False
    return True


def _say(capsys: pytest.CaptureFixture[str], text: str) -> None:
    """A line for people in the middle of a run."""
    with capsys.disabled():
        sys.stdout.write(f"\n{text}\n")


@pytest.fixture(scope="module")
def listed() -> set[Difference]:
    return libvirt_causes.read(LIST)


@pytest.mark.parametrize("version", VERSIONS)
def test_baselines_are_libvirts_but_for_what_is_listed(
    version: str, live: Callable[[str], Live], listed: set[Difference], capsys: pytest.CaptureFixture[str]
) -> None:
    found = live(version)
    known = {line for line in listed if line.version == version}
    every: Counter[Difference] = Counter()
    for names, reply in found.baselines.items():
        theirs = libvirt_live.named(reply.xml())
        assert len(theirs) > LEAST, names
        every.update(libvirt_causes.differences(version, found.group(names), theirs, found.cpu_map))
    _say(
        capsys,
        f"libvirt {found.full}: {len(found.baselines)} baselines of recorded hosts,"
        f" {len(every)} differences in {every.total()} places, {len(known)} listed",
    )
    assert not every.keys() - known, f"not listed:{libvirt_causes.lines(every.keys() - known)}"
    assert not known - every.keys(), f"stale:{libvirt_causes.lines(known - every.keys())}"


@pytest.mark.parametrize("version", VERSIONS)
def test_baselines_with_this_host_differ_only_by_a_known_cause(
    version: str, live: Callable[[str], Live]
) -> None:
    """On CPUID, which both read by the instruction; MSRs they get by different ways."""
    found = live(version)
    own = found.hosts[libvirt_answers.OWN]
    misread = {
        name: (feature.word, feature.shift)
        for name, feature in libvirt_causes.compared(found.cpu_map)
        if feature.word.startswith("cpuid:")
        and (own.raw.get(feature.word, 0) & feature.mask == feature.mask) != (name in own.told)
    }
    # of a Haswell's, where they are broken, libvirt reads none (cpu_x86.c, x86DataFilterTSX)
    assert misread.keys() <= {"hle", "rtm"}
    for names, reply in found.with_own.items():
        theirs = libvirt_live.named(reply.xml())
        differing = libvirt_causes.differences(version, found.group(names), theirs, found.cpu_map, "cpuid:")
        unexplained = [
            one
            for one in differing
            if one.cause == libvirt_causes.UNEXPLAINED and (one.word, one.bit) not in misread.values()
        ]
        assert not unexplained, f"{names}:{libvirt_causes.lines(unexplained)}"


@pytest.mark.parametrize("version", VERSIONS)
def test_two_vendors_have_no_baseline_on_either_side(version: str, live: Callable[[str], Live]) -> None:
    found = live(version)
    assert len(found.mixed) == 24 * 6 + 24 + 6
    for names, reply in found.mixed.items():
        assert "CPU vendors do not match" in reply.error, names
        assert meet_all([host.offer for host in found.group(names)]).conflicts, names


@pytest.mark.parametrize("version", VERSIONS)
def test_a_hypervisors_baseline_is_the_hosts_without_what_its_qemu_lacks(
    version: str, live: Callable[[str], Live], listed: set[Difference], capsys: pytest.CaptureFixture[str]
) -> None:
    """libvirt disables what of the chosen model QEMU lacks (x86Decode, "blockers"): with that back, the same holds.

    So what QEMU lacks beside that model stays in libvirt's baseline, which is libvirt's error and depends on the
    machine: it is counted, not listed.
    """
    found = live(version)
    known = {line for line in listed if line.version == version}
    for kind, replies in found.hypervisor.items():
        dropped: set[str] = set()
        for names, reply in replies.items():
            cpu = reply.xml()
            blocked = libvirt_live.named(cpu, "disable") & libvirt_live.named(found.baselines[names].xml())
            model = found.models[kind][cpu.findtext("model", "")]
            assert not (blocked and model.usable), names
            assert model.blockers is None or blocked <= model.blockers, names
            dropped |= blocked
            theirs = libvirt_live.named(cpu) | blocked
            unlisted = libvirt_causes.differences(version, found.group(names), theirs, found.cpu_map) - known
            assert not unlisted, f"{names}:{libvirt_causes.lines(unlisted)}"
        _say(
            capsys,
            f"libvirt {found.full}, {kind}: {len(replies)} hypervisor baselines; QEMU lacks"
            f" {len(dropped)} of their features",
        )


def _within(pids: str) -> list[str]:
    """The processes of a PID namespace."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(process / "ns/pid") == pids:
                found.append(process.name)
        except OSError:
            continue  # it has just ended
    return found


@pytest.mark.parametrize("killed", [False, True])
def test_a_session_leaves_nothing_and_touches_nothing(
    killed: bool, live: Callable[[str], Live], tmp_path: Path
) -> None:
    version = live("11.3").version
    trees = _trees(version)
    assert isinstance(trees, list)
    devices = [Path("/dev/null"), *(path for path in [Path("/dev/kvm")] if path.exists())]

    def outside() -> tuple[object, ...]:
        modes = [(stat.st_mode, stat.st_uid, stat.st_gid) for stat in map(os.stat, devices)]
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in mounts if str(tmp_path) in line], modes, Path("/run/libvirt").exists()

    before = outside()
    with libvirt_live.Session([tree.root for tree in trees], tmp_path, kvm=False) as session:
        (reply,) = session.ask(["version --daemon"])
        assert "11.3" in reply.text
        child = Path(f"/proc/{session.pid}/task/{session.pid}/children").read_text().split()[0]
        pids = os.readlink(f"/proc/{child}/ns/pid")
        assert len(_within(pids)) >= 2, "the init and libvirtd"
        if killed:
            os.kill(session.pid, signal.SIGKILL)
    end = time.monotonic() + 10
    while _within(pids) and time.monotonic() < end:
        time.sleep(0.01)
    assert _within(pids) == []
    assert outside() == before


@pytest.mark.parametrize("version", VERSIONS)
def test_a_lost_bit_would_show(version: str, live: Callable[[str], Live]) -> None:
    """The comparison sees one bit: without SSE2 in libvirt's answer, or with it where a host has none."""
    found = live(version)
    names, reply = next(iter(found.baselines.items()))
    theirs = libvirt_live.named(reply.xml())
    hosts = found.group(names)
    right = libvirt_causes.differences(version, hosts, theirs, found.cpu_map)
    wrong = libvirt_causes.differences(version, hosts, theirs - {"sse2"}, found.cpu_map)
    assert [(one.word, one.bit) for one in wrong - right] == [("cpuid:0x1.0.edx", 26)]
    assert "avx512f" not in theirs
    more = libvirt_causes.differences(version, hosts, theirs | {"avx512f"}, found.cpu_map)
    assert [(one.sign, one.cause) for one in more - right] == [("-", libvirt_causes.UNEXPLAINED)]


@pytest.mark.parametrize(
    "text",
    [
        "11.3 + cpuid:0x7.0.edx 10 polarity\n",
        "11.3 + cpuid:0x7.0.edx 10 polarity nobody: cpu_x86.c: why\n",
        "11.3 + cpuid:0x7.0.edx 10 polarity libvirt: nothing\n",
        "11.3 = cpuid:0x7.0.edx 10 polarity libvirt: cpu_x86.c: why\n",
        "11.3 + cpuid:0x7.0.edx x polarity libvirt: cpu_x86.c: why\n",
        "11.3 + cpuid:0x7.0.edx 10 unexplained libvirt: cpu_x86.c: why\n",
        "11.3 + cpuid:0x7.0.* 10 polarity libvirt: cpu_x86.c: why\n",
        "11.3 + cpuid:0x7.0.edx 10 polarity libvirt: cpu_x86.c: why\n" * 2,
    ],
)
def test_a_malformed_line_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"list\.txt:[12]"):
        libvirt_causes.read(path)


def test_every_listed_difference_is_of_a_version_that_is_asked(listed: set[Difference]) -> None:
    assert {line.version for line in listed} == set(VERSIONS)
