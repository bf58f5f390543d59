# SPDX-License-Identifier: LGPL-2.1-or-later
"""The combo, read from trees that are laid out by hand, and what counts as volatile."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from kvmneg import limits
from kvmneg.errors import NoKvm
from kvmneg.features.report import combo_digest
from kvmneg.host import software, volatile
from kvmneg.host.software import Roots
from kvmneg.host.volatile import Volatile

CPU = """processor\t: {number}
vendor_id\t: GenuineIntel
cpu family\t: 6
model\t\t: {model}
model name\t: Intel(R) Xeon(R) : made up
stepping\t: 7
microcode\t: {microcode}
cpu MHz\t\t: {mhz}
flags\t\t: fpu vme model stepping
"""
ARM_CPU = """processor\t: {number}
BogoMIPS\t: 50.00
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: {part}
CPU revision\t: 1
"""
FILES = {
    "proc/cpuinfo": CPU.format(number=0, model=85, microcode="0x5003707", mhz=2600),
    "proc/cmdline": "ro mitigations=auto\n",
    "proc/sys/kernel/osrelease": "6.1.0-56-amd64\n",
    "proc/sys/kernel/version": "#1 SMP Debian 6.1.192-2\n",
    "proc/sys/kernel/hostname": "node7\n",
    "proc/sys/kernel/random/boot_id": "3d6f0a3c-0000-4000-8000-000000000001\n",
    "sys/class/dmi/id/bios_vendor": "Acme\n",
    "sys/class/dmi/id/bios_version": "2.19\n",
    "sys/class/dmi/id/board_name": "X11\n",
    "sys/devices/system/cpu/smt/control": "on\n",
    "sys/devices/system/cpu/smt/active": "1\n",
    "sys/devices/system/cpu/online": "0\n",
    "sys/kernel/security/lockdown": "none [integrity] confidentiality\n",
    "sys/module/kvm/initstate": "live\n",
    "sys/module/kvm/srcversion": "0123456789ABCDEF0123456\n",
    "sys/module/kvm/parameters/ignore_msrs": "N\n",
    "sys/module/kvm_intel/initstate": "live\n",
    "sys/module/kvm_intel/parameters/nested": "Y\n",
    "sys/module/kvm_intel/parameters/vmentry_l1d_flush": "cond\n",
    "sys/module/kvmgt/parameters/other": "1\n",
    "dev/kvm": "",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for path, text in FILES.items():
        put(tmp_path, path, text)
    return tmp_path


def put(tree: Path, path: str, text: str) -> None:
    file = tree / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def roots(tree: Path) -> Roots:
    return Roots(str(tree / "sys"), str(tree / "proc"), str(tree / "dev"))


def test_the_whole_combo(tree: Path) -> None:
    vmms = [{"name": "qemu", "path": "/usr/bin/qemu", "version": "10.0.13", "build": "sha256:00"}]
    assert software.combo(vmms, roots=roots(tree)) == {
        "kernel": "6.1.0-56-amd64",
        "build": "#1 SMP Debian 6.1.192-2",
        "cmdline": "ro mitigations=auto",
        "microcode": "0x5003707",
        "bios": "Acme 2.19",
        "board": "X11",
        "smt": "on",
        "lockdown": "integrity",
        "boot": "3d6f0a3c-0000-4000-8000-000000000001",
        "cpus": [
            {
                "vendor": "GenuineIntel",
                "family": "6",
                "model": "85",
                "stepping": "7",
                "name": "Intel(R) Xeon(R) : made up",
                "microcode": "0x5003707",
            }
        ],
        "modules": {
            "kvm": "srcversion:0123456789ABCDEF0123456",
            "kvm.ignore_msrs": "N",
            "kvm_intel": "loaded",
            "kvm_intel.nested": "Y",
            "kvm_intel.vmentry_l1d_flush": "cond",
        },
        "livepatches": [],
        "vmms": vmms,
    }
    assert software.host_name(roots(tree)) == "node7"


def test_an_empty_machine(tmp_path: Path) -> None:
    combo = software.combo(roots=roots(tmp_path))
    assert combo == {"cpus": [], "modules": {}, "livepatches": [], "vmms": []}


def test_module_builds(tree: Path) -> None:
    """A GNU note: name size 4, description size 3, type 3, "GNU", the id (elf(5), NT_GNU_BUILD_ID)."""
    note = b"\4\0\0\0\3\0\0\0\3\0\0\0GNU\0\xab\xcd\xef"
    (tree / "sys/module/kvm/notes").mkdir()
    (tree / "sys/module/kvm/notes/.note.gnu.build-id").write_bytes(note)
    (tree / "sys/module/kvm_intel/initstate").unlink()
    found = software.modules(roots(tree))
    assert (found["kvm"], found["kvm_intel"]) == ("build-id:abcdef", "built-in")


def test_a_file_that_may_not_be_read(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user who is not root; root may read all of them, so the kernel's answer is made up."""
    real = os.open

    def refuse(path: str, flags: int) -> int:
        if path.endswith("ignore_msrs"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return real(path, flags)

    monkeypatch.setattr(os, "open", refuse)
    assert software.modules(roots(tree))["kvm.ignore_msrs"] == software.UNREADABLE


def test_what_fails_to_read_is_unreadable(tree: Path) -> None:
    """read(2) of a folder is EISDIR, for root too."""
    assert software.read(str(tree)) == software.UNREADABLE
    assert software.read(str(tree / "missing")) is None
    assert software.read(str(tree / "proc/cmdline/below-a-file")) is None


def test_reading_stops_at_the_limit(tree: Path) -> None:
    put(tree, "long", "x" * 20_000)
    assert software.read(str(tree / "long"), 9_000) == "x" * 9_000
    assert len(software.read(str(tree / "long")) or "") == 20_000


class TestCpuClasses:
    def test_alike_cpus_are_one(self, tree: Path) -> None:
        text = "\n".join(CPU.format(number=n, model=85, microcode="0x1", mhz=1000 + n) for n in range(40))
        put(tree, "proc/cpuinfo", text)
        (one,) = software.cpu_classes(roots(tree))
        assert one.cpus == tuple(range(40))

    def test_a_stepping_of_microcode_is_another(self, tree: Path) -> None:
        cpus = [CPU.format(number=n, model=85, microcode=f"0x{n % 2}", mhz=1) for n in range(4)]
        put(tree, "proc/cpuinfo", "\n".join(cpus))
        even, odd = software.cpu_classes(roots(tree))
        assert (even.cpus, odd.cpus) == ((0, 2), (1, 3))
        assert software.combo(roots=roots(tree))["microcode"] == "0x0,0x1"

    def test_big_and_little(self, tree: Path) -> None:
        text = "\n".join(
            ARM_CPU.format(number=n, part=part) for n, part in enumerate(["0xd05", "0xd05", "0xd41"])
        )
        put(tree, "proc/cpuinfo", text)
        little, big = software.cpu_classes(roots(tree))
        assert (little.cpus, big.cpus) == ((0, 1), (2,))
        assert big.identity == {"implementer": "0x41", "variant": "0x1", "part": "0xd41", "revision": "1"}
        assert "microcode" not in software.combo(roots=roots(tree))


class TestComboDigest:
    def test_survives_a_reboot(self, tree: Path) -> None:
        before = software.combo(roots=roots(tree))
        put(tree, "proc/sys/kernel/random/boot_id", "another")
        after = software.combo(roots=roots(tree))
        assert before != after
        assert combo_digest(before) == combo_digest(after)

    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("proc/sys/kernel/version", "#2"),
            ("proc/cmdline", "ro mitigations=off"),
            ("proc/cpuinfo", CPU.format(number=0, model=85, microcode="0x5003801", mhz=2600)),
            ("sys/class/dmi/id/bios_version", "2.20"),
            ("sys/devices/system/cpu/smt/control", "off"),
            ("sys/module/kvm_intel/parameters/nested", "N"),
            ("sys/kernel/livepatch/klp_kvm/enabled", "1"),
        ],
    )
    def test_differs_with_each_dimension(self, tree: Path, path: str, text: str) -> None:
        before = combo_digest(software.combo(roots=roots(tree)))
        put(tree, path, text)
        assert combo_digest(software.combo(roots=roots(tree))) != before


class TestVolatile:
    """`msrs` stands for KVM's feature MSRs."""

    def make(self, tree: Path) -> tuple[Volatile, dict[str, Any]]:
        msrs: dict[str, Any] = {"values": {0x10A: 1}}

        def read(path: str) -> object:
            if isinstance(msrs["values"], NoKvm):
                raise msrs["values"]
            return dict(msrs["values"])

        inputs = Volatile(str(tree / "dev/kvm"), roots(tree), read)
        inputs.mark()
        return inputs, msrs

    def test_before_the_first_mark(self, tree: Path) -> None:
        assert Volatile(str(tree / "dev/kvm"), roots(tree), lambda path: None).changed()

    def test_nothing_happened(self, tree: Path) -> None:
        inputs, _ = self.make(tree)
        assert not inputs.changed(fresh=True)

    @pytest.mark.parametrize(
        ("path", "text"),
        [
            ("sys/module/kvm_intel/parameters/vmentry_l1d_flush", "always\n"),
            ("sys/devices/system/cpu/smt/control", "off\n"),
            ("sys/devices/system/cpu/online", "0-1\n"),
            ("sys/devices/system/cpu/cpu0/microcode/version", "0x2\n"),
            ("sys/kernel/livepatch/klp_kvm/enabled", "1\n"),
            ("sys/kernel/security/lockdown", "none integrity [confidentiality]\n"),
            ("sys/module/kvm_intel/initstate", "going\n"),
            ("sys/module/kvm_amd/initstate", "live\n"),
            ("proc/sys/kernel/random/boot_id", "5f0b4a49-9d0e-4a1f-8b3c-4d5e0b9f3c1e\n"),
            ("dev/net/tun", ""),
            ("dev/vhost-net", ""),
        ],
    )
    def test_each_file(self, tree: Path, path: str, text: str) -> None:
        inputs, _ = self.make(tree)
        put(tree, path, text)
        assert inputs.changed(fresh=True)
        inputs.mark()
        assert not inputs.changed(fresh=True)

    def test_a_parameter_nobody_may_write_is_not_watched(self, tree: Path) -> None:
        """It changes with its module only, which has a new inode then: nothing to read at every call."""
        file = tree / "sys/module/kvm_intel/parameters/nested"
        file.chmod(stat.S_IRUSR)
        inputs, _ = self.make(tree)
        file.chmod(stat.S_IRUSR | stat.S_IWUSR)
        file.write_text("N")
        assert not inputs.changed(fresh=True)

    def test_a_reloaded_module(self, tree: Path) -> None:
        inputs, _ = self.make(tree)
        (tree / "sys/module/kvm_intel").rename(tree / "unloaded")
        assert inputs.changed(fresh=True)
        inputs.mark()
        (tree / "unloaded/parameters").mkdir(exist_ok=True)
        (tree / "sys/module/kvm").rename(tree / "old")
        put(tree, "sys/module/kvm/parameters/ignore_msrs", "N\n")
        assert inputs.changed(fresh=True)

    def test_another_device(self, tree: Path) -> None:
        inputs, _ = self.make(tree)
        put(tree, "dev/other", "")
        (tree / "dev/other").rename(tree / "dev/kvm")
        assert inputs.changed(fresh=True)

    def test_feature_msrs(self, tree: Path) -> None:
        inputs, msrs = self.make(tree)
        msrs["values"] = {0x10A: 9}
        assert inputs.changed(fresh=True)

    def test_kvm_goes_away(self, tree: Path) -> None:
        inputs, msrs = self.make(tree)
        msrs["values"] = NoKvm("gone")
        assert inputs.changed(fresh=True)

    def test_a_suspend(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs, _ = self.make(tree)
        slept = volatile._slept()
        monkeypatch.setattr(volatile, "_slept", lambda: slept + 3_000_000_000)
        assert inputs.changed(fresh=True)

    def test_how_old_an_answer_may_be(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        now = 1000.0
        monkeypatch.setattr("kvmneg.host.volatile.time.monotonic", lambda: now)
        inputs, msrs = self.make(tree)
        msrs["values"] = {}
        now += limits.VOLATILE_SECONDS * 0.9
        assert not inputs.changed()
        now += limits.VOLATILE_SECONDS * 0.2
        assert inputs.changed()
        msrs["values"] = {0x10A: 1}
        now += limits.VOLATILE_SECONDS * 2
        assert inputs.changed(), "a change that was seen stays until it was measured"
