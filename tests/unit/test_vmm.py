# SPDX-License-Identifier: LGPL-2.1-or-later
"""Looking up VMM builds, on scripts that stand for the binaries."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from kvmneg import limits
from kvmneg.errors import StoreError
from kvmneg.host import vmm
from kvmneg.service.watching.vmms import VmmLookup


@pytest.fixture
def bin_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "vmms.json")


def install(folder: Path, name: str, text: str, mode: int = 0o755) -> Path:
    """As a package manager does: a new file under the old name."""
    new = folder / f".{name}.new"
    new.write_text(f"#!/bin/sh\n{text}\n")
    new.chmod(mode)
    return new.rename(folder / name)


def test_nothing_is_started_before_refresh(bin_folder: Path, cache: str) -> None:
    started = bin_folder / "started"
    install(bin_folder, "firecracker", f"touch {started}; echo Firecracker v1.7.0")
    assert vmm.known(cache, ()) == []
    assert not started.exists()


VERSIONS = {
    "firecracker": (
        "firecracker",
        "1.7.0",
        "Firecracker v1.7.0\n\nSupported snapshot data format versions: v1.0.0",
    ),
    "qemu-kvm": ("qemu", "9.1.0", "QEMU emulator version 9.1.0 (qemu-kvm-9.1.0-15.el9)\nCopyright"),
    "libvirtd": ("libvirt", "9.0.0", "libvirtd (libvirt) 9.0.0"),
    "cloud-hypervisor": ("cloud-hypervisor", "38.0", "cloud-hypervisor v38.0"),
    "crosvm": ("crosvm", "0.1.0-f8a", "crosvm 0.1.0-f8a"),
}


@pytest.mark.parametrize("binary", VERSIONS)
def test_versions(bin_folder: Path, cache: str, binary: str) -> None:
    name, version, prints = VERSIONS[binary]
    path = install(bin_folder, binary, f"cat <<'END'\n{prints}\nEND")
    build = "sha256:" + hashlib.sha256(path.read_bytes()).hexdigest()
    expected = [{"name": name, "path": str(path), "version": version, "build": build}]
    assert vmm.refresh(cache, ()) == expected
    assert vmm.known(cache, ()) == expected


def test_a_binary_is_asked_once(bin_folder: Path, cache: str, tmp_path: Path) -> None:
    install(bin_folder, "firecracker", f"echo asked >> {tmp_path}/log; echo Firecracker v1.7.0")
    vmm.refresh(cache, ())
    vmm.refresh(cache, ())
    assert (tmp_path / "log").read_text() == "asked\n"


def test_a_replaced_binary_is_not_known_until_refresh(bin_folder: Path, cache: str) -> None:
    install(bin_folder, "firecracker", "echo Firecracker v1.7.0")
    vmm.refresh(cache, ())
    install(bin_folder, "firecracker", "echo Firecracker v1.8.0")
    assert vmm.known(cache, ()) == []
    assert [build["version"] for build in vmm.refresh(cache, ())] == ["1.8.0"]
    (bin_folder / "firecracker").unlink()
    assert vmm.refresh(cache, ()) == []
    assert json.loads(Path(cache).read_text())["builds"] == {}


def test_one_binary_by_many_names(bin_folder: Path, cache: str, tmp_path: Path) -> None:
    path = install(bin_folder, "firecracker", "echo Firecracker v1.7.0")
    (tmp_path / "link").symlink_to(bin_folder)
    found = vmm.refresh(cache, (str(bin_folder), str(tmp_path / "link")))
    assert [build["path"] for build in found] == [str(path)]


@pytest.mark.parametrize("mode", [0o644, 0o775, 0o757])
def test_what_is_not_safe_to_start_is_not_started(bin_folder: Path, cache: str, mode: int) -> None:
    install(bin_folder, "firecracker", "echo Firecracker v1.7.0", mode)
    assert vmm.refresh(cache, ()) == []


def test_a_relative_path_is_nobodys(bin_folder: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(bin_folder, "firecracker", "echo Firecracker v1.7.0")
    monkeypatch.chdir(bin_folder)
    monkeypatch.setenv("PATH", ".:")
    assert vmm.refresh(cache, ()) == []


def test_one_that_hangs_is_ended_with_its_children(
    bin_folder: Path, cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(vmm, "_VERSION_SECONDS", 0.3)
    install(bin_folder, "firecracker", f"sleep 60 & echo $! > {tmp_path}/child; wait")
    (found,) = vmm.refresh(cache, ())
    assert found["version"] == ""
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        if not _runs(child):
            break
        time.sleep(0.02)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state not in "ZX"


def test_one_that_never_stops_printing(bin_folder: Path, cache: str) -> None:
    install(bin_folder, "firecracker", "echo Firecracker v1.7.0; while :; do echo more; done")
    assert [build["version"] for build in vmm.refresh(cache, ())] == ["1.7.0"]


def test_it_gets_no_input_and_no_environment(
    bin_folder: Path, cache: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SECRET", "1")
    install(
        bin_folder, "firecracker", f'cat > {tmp_path}/input; echo "$SECRET" > {tmp_path}/secret; echo v1.0'
    )
    vmm.refresh(cache, ())
    assert ((tmp_path / "input").read_text(), (tmp_path / "secret").read_text()) == ("", "\n")


def test_one_that_fails_to_start(bin_folder: Path, cache: str) -> None:
    path = bin_folder / "firecracker"
    path.write_bytes(b"\x7fELF not really")
    path.chmod(0o755)
    assert vmm.refresh(cache, ()) == []


def test_at_most_so_many(tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(limits, "VMM_BUILDS", 3)
    folders = [tmp_path / str(n) for n in range(5)]
    for folder in folders:
        folder.mkdir()
        install(folder, "firecracker", "echo Firecracker v1.7.0")
    found = vmm.refresh(cache, [str(folder) for folder in folders])
    assert [build["path"] for build in found] == [str(folder / "firecracker") for folder in folders[:3]]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"format": "kvmneg.vmm-builds/2", "builds": {}}',
        '{"format": "kvmneg.vmm-builds/1", "builds": []}',
        '{"format": "kvmneg.vmm-builds/1", "builds": {"/bin/x": {"name": 1}}}',
        "[" * 100_000,
    ],
)
def test_a_broken_cache_is_made_again(bin_folder: Path, cache: str, text: str) -> None:
    install(bin_folder, "firecracker", "echo Firecracker v1.7.0")
    Path(cache).write_text(text)
    assert vmm.known(cache, ()) == []
    assert len(vmm.refresh(cache, ())) == 1


def test_a_cache_that_cannot_be_written(bin_folder: Path, tmp_path: Path) -> None:
    install(bin_folder, "firecracker", "echo Firecracker v1.7.0")
    with pytest.raises(StoreError, match="cannot be written"):
        vmm.refresh(str(tmp_path / "no" / "folder.json"), ())


def test_the_installed_qemu(cache: str) -> None:
    """The version is what the binary's own first line says."""
    architecture = {"x86_64": "x86_64", "aarch64": "aarch64"}[os.uname().machine]
    path = Path(f"/usr/bin/qemu-system-{architecture}")
    if not path.exists():
        pytest.skip("no QEMU installed")
    first_line = subprocess.run(
        [path, "--version"], capture_output=True, text=True, check=True
    ).stdout.splitlines()[0]
    found = [build for build in vmm.refresh(cache, ("/usr/bin",)) if build["path"] == os.path.realpath(path)]
    assert [build["name"] for build in found] == ["qemu"]
    assert f"version {found[0]['version']}" in first_line


def test_stamps_change_with_what_is_installed(bin_folder: Path, cache: str, tmp_path: Path) -> None:
    def look() -> object:
        return vmm.stamps(cache, vmm.known(cache, ()), ())

    empty = look()
    assert look() == empty
    binary = install(bin_folder, "firecracker", "echo Firecracker v1.7.0")
    installed = look()
    assert installed != empty and not vmm.settled(cache, ())
    vmm.refresh(cache, ())
    known = look()
    assert known != installed and vmm.settled(cache, ()) and look() == known
    builds = vmm.known(cache, ())
    before = vmm.stamps(cache, builds, ())
    with binary.open("a") as file:  # in place: its folder does not show it
        file.write("# longer\n")
    assert vmm.stamps(cache, builds, ()) != before and not vmm.settled(cache, ())
    vmm.refresh(cache, ())
    before = look()
    binary.unlink()
    assert look() != before and vmm.settled(cache, ())


def test_a_daemon_forgets_a_build_that_was_replaced(bin_folder: Path, tmp_path: Path) -> None:
    """Looked at like any input that changes by itself; the new version is the look-up's to find."""
    cache = str(tmp_path / "vmm-builds.json")
    install(bin_folder, "firecracker", "echo Firecracker v1.7.0")
    vmm.refresh(cache, ())
    measurer = SimpleNamespace(vmms=(), changed=lambda *, fresh: False, mark=lambda: None)
    measurer.take = lambda: [build["path"] for build in measurer.vmms]
    lookup = VmmLookup(str(tmp_path), cast("Any", measurer))
    path = str(bin_folder / "firecracker")
    assert path in cast("Any", lookup.measure())
    assert not lookup.changed(fresh=True)
    install(bin_folder, "firecracker", "echo Firecracker v1.8.0")
    assert not lookup.changed(), "looked at a moment ago"
    assert lookup.changed(fresh=True) and lookup.changed()
    assert path not in cast("Any", lookup.measure())
    assert not lookup.changed(fresh=True)
    vmm.refresh(cache, ())  # as the child does
    assert lookup.changed(fresh=True)
    assert path in cast("Any", lookup.measure())
