# SPDX-License-Identifier: LGPL-2.1-or-later
"""A build with `meson setup -Db_sanitize=address,undefined`: both libraries, and the extension inside of Python.

What runs under AddressSanitizer and UBSan, and where:
  here          the tests of the extension (all of tests/kvm that goes through Python: measuring, applying, proof
                guests, `kvmneg verify`; the clamp; reading contracts), and examples/minivmm.c with both libraries
                and a daemon
  tests/kvm     its C programs: failing ioctls and allocations, applying, proof guests; leaks too, as in those below
  tests/unit    reader.c: the reader of contracts; the arm64 build, under qemu-user (without leaks)
  tests/ipc, tests/daemon  client_driver.c: libkvmneg-client
  tests/fuzz    the reader, the clamp and the client, by inputs that a fuzzer makes
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.served import daemon_in

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
VM = "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11"
REQUEST = '{"request": {"max": true}}'
# Python leaves memory to the end of its process; leaks of the library are looked for by the C programs.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1"}
UNIT = ("clamp", "contract_reader", "nokvm", "rates")
COMPILED = ("test_faults.py", "test_library.py", "test_x86_guest_faults.py")
"""Of tests/kvm: C programs, which have sanitizers of their own; also two tests in test_x86_apply.py."""


def done(*command: str | Path, **environment: str) -> str:
    """What a command printed; its errors where it fails."""
    result = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, **environment}
    )
    assert result.returncode == 0, (result.stdout + result.stderr)[-8000:]
    return result.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The build directory, with a copy of the package around the sanitized extension in package/."""
    import kvmneg

    bin_ = Path(sys.executable).parent
    for tool in ("gcc", "pkg-config"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    for tool in ("meson", "ninja"):
        if not (bin_ / tool).exists() and not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    if subprocess.run(["pkg-config", "--exists", "json-c"], check=False).returncode:
        pytest.skip("libjson-c-dev is not installed")
    folder = tmp_path_factory.mktemp("sanitized")
    path = f"{bin_}:{os.environ['PATH']}"
    options = ("-Db_sanitize=address,undefined", "-Dbuildtype=debugoptimized", "-Dclient=enabled")
    done("meson", "setup", *options, folder, ROOT, PATH=path)
    done("ninja", "-C", folder, PATH=path)
    package = Path(kvmneg.__file__).parent
    shutil.copytree(package, folder / "package/kvmneg", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (extension,) = (folder / "kvmneg").glob("*.so")
    assert b"__asan_" in extension.read_bytes()
    shutil.copy(extension, folder / "package/kvmneg")
    return folder


def preloaded() -> str:
    """The sanitizers' libraries, which have to be there before those that need them."""
    names = ("libasan.so", "libubsan.so")
    return " ".join(done("gcc", f"-print-file-name={name}").strip() for name in names)


def test_the_extension(built: Path) -> None:
    """Its tests once more, in a Python that has the sanitizers."""
    environment = {
        **OPTIONS,
        "LD_PRELOAD": preloaded(),
        "PYTHONMALLOC": "malloc",
        "PYTHONPATH": str(built / "package"),
    }
    where = "import kvmneg._libkvmneg; print(kvmneg._libkvmneg.__file__)"
    assert done(sys.executable, "-P", "-c", where, **environment).startswith(str(built))
    files = [ROOT / "tests/kvm", *(ROOT / f"tests/unit/test_{name}.py" for name in UNIT)]
    compiled = [f"--ignore={ROOT / 'tests/kvm' / name}" for name in COMPILED]
    without = (
        "not sanitized and not each_ioctl_fails and not change_of_a_byte and not coverage and not damage"
    )
    command = (
        sys.executable,
        "-P",
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        without,
        *compiled,
        *files,
    )
    found = re.search(r"^(\d+) passed", done(*command, **environment), re.MULTILINE)
    assert found and int(found[1]) >= 30


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[str]:
    """The socket of a kvmnegd of this host."""
    with daemon_in(tmp_path) as path:
        yield path


def minivmm(built: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """examples/minivmm.c with both libraries, leaks included."""
    libraries = (f"-L{built / 'csrc'}", f"-L{built / 'client'}", "-lkvmneg-client", "-lkvmneg")
    headers = (f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'client'}")
    program = folder / "minivmm"
    done("gcc", "-std=gnu11", *SANITIZERS, *headers, ROOT / "examples/minivmm.c", "-o", program, *libraries)
    environment = {**os.environ, "LD_LIBRARY_PATH": f"{built / 'csrc'}:{built / 'client'}"}
    return subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, timeout=120, env=environment
    )


def clean(result: subprocess.CompletedProcess[str]) -> bool:
    """Whether no sanitizer said anything; all the same what the program found."""
    return not re.search(r"Sanitizer|runtime error", result.stderr)


def test_minivmm_without_a_daemon(built: Path, tmp_path: Path) -> None:
    result = minivmm(built, tmp_path, VM, REQUEST, "--socket", str(tmp_path / "nobody"))
    assert result.returncode == 1 and clean(result), result.stderr


@pytest.mark.kvm
def test_minivmm(built: Path, tmp_path: Path, daemon: str) -> None:
    """Negotiates, applies, runs a guest and reports; what it says of this KVM, another test judges."""
    result = minivmm(built, tmp_path, VM, REQUEST, "--socket", daemon, "--anyway")
    assert clean(result) and result.returncode in (0, 1), result.stderr
    assert "words looked at by the guest" in result.stdout, result.stderr
