# SPDX-License-Identifier: LGPL-2.1-or-later
"""examples/minivmm.c, built as a VMM's author builds it: alone in a folder, by pkg-config, on what was installed."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvmneg.client import Client
from kvmneg.features.report import Report
from kvmneg.policy import grade
from kvmneg.policy.contract import Contract
from tests.served import daemon_in

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "examples/minivmm.c"
VM = "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11"
V1 = '{"request": {"level": "x86-64-v1"}}' if os.uname().machine == "x86_64" else '{"request": {"max": true}}'
WARNINGS = ("-std=gnu11", "-Wall", "-Wextra", "-Werror", "-O1")


def done(*command: str | Path, **options: object) -> str:
    """What a command printed; its errors where it fails."""
    result = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert result.returncode == 0, result.stdout + result.stderr
    return str(result.stdout)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make install DESTDIR=…` puts there for C users."""
    meson = Path(sys.executable).parent / "meson"
    tools = {"gcc": shutil.which("gcc"), "pkg-config": shutil.which("pkg-config"), "meson": meson.exists()}
    for tool, there in tools.items():
        if not there:
            pytest.skip(f"{tool} is not installed")
    if subprocess.run(["pkg-config", "--exists", "json-c"], check=False).returncode:
        pytest.skip("libjson-c-dev is not installed")
    folder = tmp_path_factory.mktemp("installed")
    path = f"{meson.parent}:{os.environ['PATH']}"
    options = ("--prefix=/usr", "-Dclient=enabled", "-Dpython.install_env=prefix")
    done(meson, "setup", *options, folder / "build", ROOT, env={**os.environ, "PATH": path})
    install = (meson, "install", "-C", folder / "build", "--destdir", folder / "root", "--tags", "devel")
    done(*install, env={**os.environ, "PATH": path})
    return folder / "root"


@pytest.fixture(scope="module")
def minivmm(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command of the program, alone in its folder."""
    folder = tmp_path_factory.mktemp("clean")
    for path in (SOURCE, *SOURCE.parent.glob("*.h")):
        shutil.copy(path, folder)
    (packages,) = {path.parent for path in installed.rglob("libkvmneg-client.pc")}
    environment = {
        "PATH": os.environ["PATH"],
        "PKG_CONFIG_PATH": str(packages),
        "PKG_CONFIG_SYSROOT_DIR": str(installed),
    }
    asked = ("pkg-config", "--cflags", "--libs", "libkvmneg-client", "libkvmneg")
    flags = done(*asked, env=environment).split()
    done("gcc", *WARNINGS, "minivmm.c", "-o", "minivmm", *flags, cwd=folder, env=environment)
    return ["env", f"LD_LIBRARY_PATH={packages.parent}", str(folder / "minivmm")]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[str]:
    """The socket of a kvmnegd of this host."""
    with daemon_in(tmp_path) as path:
        yield path


def test_installed_for_c(installed: Path) -> None:
    """Libraries with their links, headers, pkg-config files; the client's needs the other."""
    there = {path.name for path in installed.rglob("*")}
    for name in ("libkvmneg", "libkvmneg-client"):
        assert {f"{name}.so", f"{name}.so.0", f"{name}.so.0.0.0", f"{name}.pc", f"{name[3:]}.h"} <= there
    (package,) = installed.rglob("libkvmneg-client.pc")
    assert re.search(r"^Requires: *libkvmneg$", package.read_text(), re.MULTILINE)
    (library,) = installed.rglob("libkvmneg-client.so.0.0.0")
    needed = re.findall(r"NEEDED.*\[(.*)\]", done("readelf", "-d", library))
    assert set(needed) - {"libc.so.6"} == {"libkvmneg.so.0", "libjson-c.so.5"}
    (core,) = installed.rglob("libkvmneg.so.0.0.0")
    assert re.findall(r"NEEDED.*\[(.*)\]", done("readelf", "-d", core)) == ["libc.so.6"]  # no JSON


def test_it_fits_a_page() -> None:
    pages = {path.name: len(path.read_text().splitlines()) for path in SOURCE.parent.glob("*.[ch]")}
    assert {"minivmm.c", "minivmm-move-arm64.c"} <= pages.keys()
    assert max(pages.values()) < 300


def test_without_a_daemon_or_a_request(minivmm: list[str], tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*minivmm, *arguments], capture_output=True, text=True, check=False)

    nobody = run(VM, V1, "--socket", str(tmp_path / "nobody"))
    assert (nobody.returncode, nobody.stderr) == (1, "minivmm: negotiate: No such file or directory\n")
    assert run(VM).returncode == run(VM, V1, "--what").returncode == 2


@pytest.mark.kvm
def test_a_guest_under_its_contract(minivmm: list[str], daemon: str) -> None:
    """What the guest sees is what was promised, but for words that this KVM was measured not to keep to."""
    command = [*minivmm, VM, V1, "--socket", daemon, "--anyway"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    with Client(daemon) as client:
        report = Report.from_json(client.get_host()["host"])
        digest = result.stdout.split()[1].rstrip(",")
        found = client.get_contract(digest)
    assert found["path"] is None, result.stderr  # it said that the VM is gone
    contract = Contract.from_json(found["contract"])
    wrong = set(re.findall(r"^(\S+): promised", result.stdout, re.MULTILINE))
    told = re.search(
        r"^(\d+) words looked at by the guest, (\d+) not as promised$", result.stdout, re.MULTILINE
    )
    assert told, result.stderr
    assert int(told[1]) > 20
    assert int(told[2]) == len(wrong)
    assert wrong <= set(grade.broken(contract.granted, report))
    assert result.returncode == (1 if wrong else 0)
    if contract.grade == "enforced":
        assert result.stderr == ""
    else:
        assert "minivmm: the vCPU: " in result.stderr


@pytest.mark.kvm
def test_it_stops_where_kvm_does_not_keep_to_the_contract(minivmm: list[str], daemon: str) -> None:
    command = [*minivmm, VM, V1, "--socket", daemon]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    with Client(daemon) as client:
        enforced = (
            client.get_contract(result.stdout.split()[1].rstrip(","))["contract"]["grade"] == "enforced"
        )
    assert result.returncode == (0 if enforced else 1), result.stderr
    assert ("words looked at" in result.stdout) == enforced  # no guest ran that sees something else


@pytest.mark.kvm
def test_a_no(minivmm: list[str], daemon: str) -> None:
    request = '{"request": {"require": ["no-such-feature"]}}'
    command = [*minivmm, VM, request, "--socket", daemon]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("minivmm: org.kvmneg.InvalidRequest: ")
    assert "no-such-feature" in result.stderr
