# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why KVM cannot be used: each cause has its own message and its own remedy."""

from __future__ import annotations

import errno
import grp
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from kvmneg.errors import KvmFault, NoKvm
from kvmneg.host.kvm import Kvm
from kvmneg.host.nokvm import explain, kind

INTEL = "processor\t: 0\nflags\t\t: fpu vmx aes\n"
AMD = "processor\t: 0\nflags\t\t: fpu svm aes\n"
NEITHER = "processor\t: 0\nflags\t\t: fpu aes\n"
x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="processor flags are x86's")


def missing(tmp_path: Path, cpuinfo: str, *modules: str) -> NoKvm:
    """explain(ENOENT) on a machine with this /proc/cpuinfo and these modules."""
    (tmp_path / "cpuinfo").write_text(cpuinfo, "ascii")
    for module in modules:
        (tmp_path / "module" / module).mkdir(parents=True)
    error = explain(
        "/dev/kvm", errno.ENOENT, cpuinfo=str(tmp_path / "cpuinfo"), modules=str(tmp_path / "module")
    )
    assert isinstance(error, NoKvm)
    assert "does not exist" in error.message
    return error


@x86
@pytest.mark.parametrize(("cpuinfo", "module"), [(INTEL, "kvm_intel"), (AMD, "kvm_amd")])
def test_module_not_loaded(tmp_path: Path, cpuinfo: str, module: str) -> None:
    assert f"modprobe {module}" in missing(tmp_path, cpuinfo).hint


@x86
def test_processor_without_virtualization(tmp_path: Path) -> None:
    hint = missing(tmp_path, NEITHER).hint
    assert "modprobe" not in hint
    assert "firmware" in hint
    assert "nested" in hint


def test_container_without_the_device(tmp_path: Path) -> None:
    """The kernel has KVM; only the node is missing."""
    assert "--device /dev/kvm" in missing(tmp_path, INTEL, "kvm_amd").hint


def test_node_of_a_group(tmp_path: Path) -> None:
    node = tmp_path / "kvm"
    node.touch()
    node.chmod(0o660)
    group = next((row for row in grp.getgrall() if row.gr_gid), None)
    if os.geteuid() != 0 or group is None:
        pytest.skip("needs root to give a file to another group")
    os.chown(node, 0, group.gr_gid)
    error = explain(str(node), errno.EACCES)
    assert f"usermod -aG {group.gr_name} root" in error.hint
    node.chmod(0o600)
    assert "chmod 0660" in explain(str(node), errno.EACCES).hint


def test_device_policy(tmp_path: Path) -> None:
    assert "DeviceAllow" in explain(str(tmp_path), errno.EPERM).hint


def test_busy() -> None:
    error = explain("/dev/kvm", errno.EBUSY)
    assert isinstance(error, NoKvm)
    assert "another hypervisor" in error.hint


def test_old_api() -> None:
    error = explain("/dev/kvm", errno.EPROTONOSUPPORT)
    assert isinstance(error, NoKvm)
    assert "version 12" in error.message


def test_out_of_descriptors_is_not_about_kvm() -> None:
    error = explain("/dev/kvm", errno.EMFILE)
    assert isinstance(error, KvmFault)
    assert error.fields["errno"] == errno.EMFILE


@pytest.mark.parametrize("make", [Path.touch, Path.mkdir, os.mkfifo])
def test_open_something_else(tmp_path: Path, make: object) -> None:
    """A file, a directory, a FIFO (which must not hang) where KVM should be."""
    path = tmp_path / "kvm"
    make(path)  # type: ignore[operator]
    with pytest.raises(NoKvm, match="is not KVM"):
        Kvm.open(str(path))


@pytest.mark.parametrize("path", ["/dev/null", "/dev/zero"])
def test_open_another_device(path: str) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(NoKvm, match=f"{path} is not KVM"):
        Kvm.open(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_open_nothing(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path / "absent" / "kvm"):
        with pytest.raises(NoKvm, match="does not exist") as error:
            Kvm.open(str(path))
        assert error.value.fields == {"path": str(path), "errno": errno.ENOENT}


def test_open_forbidden(tmp_path: Path) -> None:
    """As nobody, a node that only root may open: the message names nobody and the mode."""
    if os.geteuid() != 0:
        pytest.skip("needs root to become somebody else")
    node = Path("/tmp") / f"kvmneg-test-{os.getpid()}"
    node.touch(0o600)
    code = (
        # all imports first: nobody may not even see root's interpreter
        "import grp, pwd, stat, os, sys; from kvmneg.host.kvm import Kvm; from kvmneg.errors import NoKvm\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: Kvm.open(sys.argv[1])\n"
        "except NoKvm as error: print(error)\n"
    )
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, node], capture_output=True, text=True, check=True
        ).stdout
    finally:
        node.unlink()
    assert "may not be opened by nobody" in done
    assert "-rw-------" in done


def test_kind(tmp_path: Path) -> None:
    assert kind(str(tmp_path)) == ("arm64" if platform.machine() == "aarch64" else "unknown")
    (tmp_path / "kvm_amd").mkdir()
    assert kind(str(tmp_path)) == "kvm_amd"
