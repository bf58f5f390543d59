# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which recorded combo an asked one is: the whole of it has to match, and what does not is named."""

from __future__ import annotations

from typing import Any

import pytest

from kvmneg.errors import UsageError
from kvmneg.policy.combos import Asked, Search, between, for_people

OLD, NEW = "6.1.0-50-amd64", "6.12.107+deb13-amd64"


def combo(kernel: str = NEW, **changes: Any) -> dict[str, Any]:
    """A host as it is under one of two kernels; a nested parameter and a default of the kernel's own differ."""
    old = kernel == OLD
    base: dict[str, Any] = {
        "kernel": kernel,
        "build": f"#1 SMP {kernel}",
        "cmdline": f"BOOT_IMAGE=/vmlinuz-{kernel} ro quiet",
        "microcode": "0xa0011d5",
        "bios": "2.19",
        "smt": "on",
        "boot": f"of {kernel}",
        "cpus": [{"family": "25", "model": "1"}],
        "modules": {
            "kvm": f"build-id:{kernel}",
            "kvm.ignore_msrs": "N",
            "kvm.halt_poll_ns_shrink": "0" if old else "2",
            "kvm_amd": f"build-id:{kernel}",
            "kvm_amd.nested": "1",
            **({} if old else {"kvm_amd.vnmi": "Y"}),
        },
        "livepatches": [],
        "vmms": [{"name": "qemu", "path": "/usr/bin/qemu", "version": "10.0.13", "build": "sha256:a"}],
    }
    return {**base, **changes}


def modules(kernel: str, **changes: str) -> dict[str, str]:
    found: dict[str, str] = combo(kernel)["modules"]
    return {**found, **{name.replace("__", "."): value for name, value in changes.items()}}


def differing(asked: Asked, recorded: dict[str, Any], running: dict[str, Any] | None = None) -> list[str]:
    return [one.name for one in Search(running or combo(), asked).differs(recorded)]


def test_the_old_kernel_with_everything_else_as_it_was() -> None:
    """Its own build, file names, modules and the default of a parameter that only tunes go with it."""
    assert differing(Asked(kernel=OLD), combo(OLD)) == []
    assert differing(Asked(), combo(NEW, boot="another", cmdline="initrd=x ro quiet")) == []


@pytest.mark.parametrize(
    ("recorded", "dimension"),
    [
        (combo(OLD, microcode="0xa0011d1"), "microcode"),
        (combo(OLD, bios="2.18"), "bios"),
        (combo(OLD, smt="off"), "smt"),
        (combo(OLD, cmdline="ro quiet mitigations=off"), "cmdline"),
        (combo(OLD, cpus=[{"family": "25", "model": "17"}]), "cpus.0.model"),
        (combo(OLD, modules=modules(OLD, kvm_amd__nested="0")), "modules.kvm_amd.nested"),
        (combo(OLD, modules=modules(OLD, kvm__ignore_msrs="Y")), "modules.kvm.ignore_msrs"),
        (combo(OLD, livepatches=["fix_kvm"]), "livepatches.0"),
        (combo(OLD, lockdown="integrity"), "lockdown"),
        (combo(NEW), "kernel"),
    ],
)
def test_the_old_kernel_with_something_new_is_not_the_old_combo(
    recorded: dict[str, Any], dimension: str
) -> None:
    assert differing(Asked(kernel=OLD), recorded)[0] == dimension


def test_an_old_vmm_under_a_new_kernel_is_a_combo_of_its_own() -> None:
    """Each component goes back only where the pair of both was measured."""
    vmms = [{"name": "qemu", "path": "/usr/bin/qemu", "version": "7.2.22", "build": "sha256:b"}]
    assert differing(Asked(kernel=OLD), combo(OLD, vmms=vmms)) == ["vmms.qemu.version", "vmms.qemu.build"]
    assert differing(Asked(kernel=OLD, vmms=("qemu-7.2",)), combo(OLD, vmms=vmms)) == []
    assert differing(Asked(vmms=("qemu-7.2",)), combo(NEW, vmms=vmms)) == []
    assert differing(Asked(vmms=("qemu-7.2",)), combo(NEW)) == ["vmms.qemu.version"]
    assert differing(Asked(vmms=("qemu-7",)), combo(NEW, vmms=[])) == ["vmms.qemu.version"]
    assert "vmms.qemu.version" in differing(Asked(vmms=("qemu-7.20",)), combo(NEW, vmms=vmms))


def test_a_second_build_of_one_vmm_is_another_dimension() -> None:
    one, other = combo()["vmms"][0], {"name": "qemu", "path": "/opt/qemu", "version": "9.2"}
    assert differing(Asked(), combo(vmms=[one, other])) == [
        f"vmms.qemu in /opt/qemu.{name}" for name in ("name", "path", "version")
    ]


def test_any_dimension_can_be_asked_for() -> None:
    asked = Asked(kernel=OLD, others=(("microcode", "0xa0011d1"), ("modules.kvm_amd.nested", "0")))
    there = combo(OLD, microcode="0xa0011d1", modules=modules(OLD, kvm_amd__nested="0"))
    assert differing(asked, there) == []
    assert differing(asked, combo(OLD)) == ["microcode", "modules.kvm_amd.nested"]
    # a parameter that only tunes counts where somebody asks for it
    tuned = Asked(kernel=OLD, others=(("modules.kvm.halt_poll_ns_shrink", "2"),))
    assert differing(tuned, combo(OLD)) == ["modules.kvm.halt_poll_ns_shrink"]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UsageError, match="no dimension"):
        Search(combo(), Asked(others=(("microkode", "1"),)))
    for vmm in ("qemu", "-10", "qemu-x"):
        with pytest.raises(UsageError, match="no version"):
            Search(combo(), Asked(vmms=(vmm,)))


def test_a_kernel_is_named_by_the_beginning_of_one() -> None:
    kernels = (OLD, "6.12.0-amd64", NEW, "6.1.0-50-cloud-amd64")
    assert Search(combo(), Asked(kernel=OLD), kernels).kernel == OLD
    assert Search(combo(), Asked(kernel="6.12.107"), kernels).kernel == NEW
    assert Search(combo(), Asked(kernel="6.1.0-50-c"), kernels).kernel == "6.1.0-50-cloud-amd64"
    assert Search(combo(), Asked(kernel="6.2"), kernels).kernel == "6.2"
    with pytest.raises(UsageError, match=r"6\.1 may be 6\.1\.0-50-amd64, 6\.1\.0-50-cloud-amd64"):
        Search(combo(), Asked(kernel="6.1"), kernels)


def test_between_two_recorded_ones_everything_counts() -> None:
    assert [(one.name, one.ours, one.recorded) for one in between(combo(), combo(OLD))][:2] == [
        ("kernel", NEW, OLD),
        ("build", f"#1 SMP {NEW}", f"#1 SMP {OLD}"),
    ]
    assert "modules.kvm_amd.vnmi is Y, recorded without it" in [
        one.describe() for one in between(combo(), combo(OLD))
    ]
    assert between(combo(), combo(boot="another")) == []


def test_people_are_spared_what_a_kernel_brings_along() -> None:
    names = ["kernel", "build", "microcode", "modules.kvm", "modules.kvm_amd.nested", "vmms.qemu.build"]
    assert for_people(names) == ["kernel", "microcode", "modules.kvm_amd.nested", "vmms.qemu.build"]
    assert for_people(names[1:]) == names[1:]
