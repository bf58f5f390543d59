# SPDX-License-Identifier: LGPL-2.1-or-later
"""Why KVM cannot be used here, exactly, and what to do about it."""

from __future__ import annotations

import errno
import os

from kvmneg.errors import KvmFault, KvmnegError, NoKvm

# The module that drives KVM, by the flag with which /proc/cpuinfo tells that the processor can.
_VENDOR_MODULES = {"vmx": "kvm_intel", "svm": "kvm_amd"}
_MODULES = (*_VENDOR_MODULES.values(), "kvm_pvm")


def kind(modules: str = "/sys/module") -> str:
    """Which KVM this is: its vendor module ("kvm_intel", "kvm_amd", "kvm_pvm"), "arm64", or "unknown".

    More than one, joined by "+", where several are loaded; only one of them drives /dev/kvm.
    """
    found = [module for module in _MODULES if os.path.isdir(f"{modules}/{module}")]
    if found:
        return "+".join(found)
    return "arm64" if os.uname().machine == "aarch64" else "unknown"


def explain(
    path: str, error: int, *, cpuinfo: str = "/proc/cpuinfo", modules: str = "/sys/module"
) -> KvmnegError:
    """The error to raise when kvmneg_open() of `path` failed with the positive errno `error`."""
    if error in (errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOTDIR):
        what = "does not exist" if error in (errno.ENOENT, errno.ENOTDIR) else "has no driver behind it"
        return NoKvm(f"{path} {what}", hint=_missing(path, error, cpuinfo, modules), path=path, errno=error)
    if error in (errno.EACCES, errno.EPERM):
        return NoKvm(
            f"{path} may not be opened by {_user()}", hint=_forbidden(path, error), path=path, errno=error
        )
    if error == errno.EBUSY:
        return busy(path)
    if error in (errno.ENOTTY, errno.EISDIR):
        hint = "it must be the character device that KVM makes, usually /dev/kvm (major 10, minor 232)"
        return NoKvm(f"{path} is not KVM", hint=hint, path=path, errno=error)
    if error == errno.EPROTONOSUPPORT:
        hint = "every kernel since 2.6.22 has API 12; this is another one's, or a stand-in's"
        return NoKvm(f"{path} does not speak KVM's API version 12", hint=hint, path=path, errno=error)
    return KvmFault(f"open({path})", error)


def busy(path: str) -> NoKvm:
    """KVM is there and the processor's virtualization is taken: EBUSY from open(2) or from KVM_CREATE_VM."""
    return NoKvm(
        f"{path} is busy",
        hint="another hypervisor has the processor's virtualization (VirtualBox, VMware, Xen?): stop its "
        "guests, or unload its module",
        path=path,
        errno=errno.EBUSY,
    )


def _missing(path: str, error: int, cpuinfo: str, modules: str) -> str:
    loaded = [module for module in _MODULES if os.path.isdir(f"{modules}/{module}")]
    if loaded and error == errno.ENOENT:
        return (
            f"the kernel has {loaded[0]}, so the device is only missing here: give the container {path} "
            "(--device /dev/kvm), or run: mknod /dev/kvm c 10 232"
        )
    if os.uname().machine == "aarch64":
        return (
            "on arm64 KVM is part of the kernel and needs a boot at EL2, which firmware or hypervisor decide"
        )
    for flag, module in _VENDOR_MODULES.items():
        if flag in _cpu_flags(cpuinfo):
            return f"load the driver: modprobe {module} (if it refuses, dmesg says why)"
    return (
        "this processor shows neither VMX nor SVM: switch virtualization on in the firmware's setup, or, "
        "in a virtual machine, nested virtualization in the hypervisor below"
    )


def _cpu_flags(cpuinfo: str) -> frozenset[str]:
    """The flags of the first processor; none where the file cannot be read."""
    try:
        with open(cpuinfo, encoding="ascii", errors="replace") as lines:
            for line in lines:
                if line.startswith("flags"):
                    return frozenset(line.partition(":")[2].split())
    except OSError:
        pass
    return frozenset()


def _forbidden(path: str, error: int) -> str:
    import stat  # only on the way out

    try:
        node = os.stat(path)
    except OSError:
        return f"a folder above {path} may not be entered"
    if error == errno.EPERM:
        return (
            "a device policy forbids it: DeviceAllow=/dev/kvm rw in a unit, --device /dev/kvm for a container"
        )
    group = _group(node.st_gid)
    user = _user()
    if node.st_gid != 0 and node.st_mode & 0o060 == 0o060:
        return f"run as root: usermod -aG {group} {user}  (then log in again)"
    mode = stat.filemode(node.st_mode)
    return (
        f"its mode is {mode}, group {group}: only root gets in. As root: chgrp kvm {path}; "
        f"chmod 0660 {path}; usermod -aG kvm {user}  (then log in again)"
    )


def _user() -> str:
    import pwd  # only on the way out

    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"uid {os.geteuid()}"


def _group(gid: int) -> str:
    import grp  # only on the way out

    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"gid {gid}"
