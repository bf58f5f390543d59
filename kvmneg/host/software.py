# SPDX-License-Identifier: LGPL-2.1-or-later
"""The combo: everything that moves a measurement, read from /proc and /sys.

Kernel release, build and command line, microcode, BIOS and board, SMT, KVM's modules and their parameters,
CPU identity, lockdown, live patches, VMM builds, boot id. A file that does not exist (no DMI on this board,
no securityfs) is no entry; one that may not be read has the value "unreadable", so that a combo shows what
it does not know.

Some 60 small files are read in a third of a millisecond by os.open and os.read; open() would take three times
that.
"""

from __future__ import annotations

import os

from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

UNREADABLE = "unreadable"
_FILE_BYTES = 64 * 1024
_CHUNK_BYTES = 8 * 1024
_CPUINFO_BYTES = 64 * 1024 * 1024  # 1.5 KiB a CPU; reading stops here whatever the file says
_CPUS = 64 * 1024  # more than any kernel is built for (CONFIG_NR_CPUS)

# What makes one CPU another kind than its neighbour: (name here, field of /proc/cpuinfo).
_IDENTITY_X86 = (
    ("vendor", "vendor_id"), ("family", "cpu family"), ("model", "model"), ("stepping", "stepping"),
    ("name", "model name"), ("microcode", "microcode"),
)  # fmt: skip
_IDENTITY_ARM64 = (
    ("implementer", "CPU implementer"), ("variant", "CPU variant"), ("part", "CPU part"),
    ("revision", "CPU revision"),
)  # fmt: skip

_BIOS = ("bios_vendor", "bios_version", "bios_date")
_BOARD = ("board_vendor", "board_name", "board_version")
_SYSTEM = ("sys_vendor", "product_name", "product_version")


class Roots(NamedTuple):
    """Where the kernel's files are; a recorded tree in tests."""

    sys: str = "/sys"
    proc: str = "/proc"
    dev: str = "/dev"


class CpuClass(NamedTuple):
    """CPUs that are alike: their identity as /proc/cpuinfo has it, their numbers, and (x86) the flags all have."""

    identity: dict[str, str]
    cpus: tuple[int, ...]
    flags: str = ""


def read(path: str, limit: int = _FILE_BYTES) -> str | None:
    """A small file's text without white space around it.

    None where it does not exist, "unreadable" where it may not be read.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError:
        return UNREADABLE
    parts = []
    try:
        # sysfs gives its files whole, /proc/cpuinfo comes in pieces of a page at most
        while limit > 0 and (data := os.read(fd, min(limit, _CHUNK_BYTES))):
            parts.append(data)
            limit -= len(data)
    except OSError:
        return UNREADABLE
    finally:
        os.close(fd)
    return b"".join(parts).decode("utf-8", "replace").strip()


def cpu_classes(roots: Roots = Roots()) -> list[CpuClass]:  # noqa: B008 (immutable)
    """The kinds of CPU that are online, in the order of their first CPU; none without /proc/cpuinfo."""
    text = read(f"{roots.proc}/cpuinfo", _CPUINFO_BYTES)
    kinds: dict[tuple[str, ...], tuple[dict[str, str], list[int]]] = {}
    flags: dict[tuple[str, ...], str] = {}
    for block in (text or "").split("\n\n"):
        if not block.startswith("processor"):
            continue
        number = _field(block, "processor")
        table = _IDENTITY_X86 if "\nvendor_id" in block else _IDENTITY_ARM64
        values = tuple(_field(block, field) for _, field in table)
        if values not in kinds:
            names = (name for name, _ in table)
            kinds[values] = {name: value for name, value in zip(names, values, strict=True) if value}, []
            flags[values] = _field(block, "flags")
        elif (others := _field(block, "flags")) != flags[values]:
            flags[values] = common_flags((flags[values], others))
        kinds[values][1].append(int(number) if number.isdecimal() else 0)
    return [CpuClass(identity, tuple(cpus), flags[values]) for values, (identity, cpus) in kinds.items()]


def offline(roots: Roots = Roots()) -> str:  # noqa: B008
    """The CPUs that are there and not online, as the kernel lists them ("2-3"); "" where there are none."""
    folder = f"{roots.sys}/devices/system/cpu"
    present, online = (cpu_numbers(read(f"{folder}/{name}", 4096) or "") for name in ("present", "online"))
    if not online or not present > online:
        return ""
    from kvmneg.host.visit import cpulist  # on few hosts

    return cpulist(sorted(present - online))


def cpu_numbers(text: str) -> set[int]:
    """A list of CPUs ("0-3,8"); empty where it is none, or longer than any kernel's."""
    found: set[int] = set()
    for part in text.split(","):
        low, dash, high = part.partition("-")
        high = high if dash else low
        if not low.isdecimal() or not high.isdecimal() or int(high) >= _CPUS:
            return set()
        found.update(range(int(low), int(high) + 1))
    return found


def common_flags(lines: Iterable[str]) -> str:
    """The flags that are in all lines, in the first one's order."""
    first, *others = lines
    kept = set(first.split()).intersection(*(line.split() for line in others))
    return " ".join(flag for flag in first.split() if flag in kept)


def _field(block: str, name: str) -> str:
    """The value of one line of /proc/cpuinfo ("model\\t\\t: 1"), "" where the block has no such line."""
    start = 0
    while (start := block.find(name, start)) >= 0:
        end = block.find(":", start)
        if (start == 0 or block[start - 1] == "\n") and block[start:end].rstrip() == name:
            line_end = block.find("\n", end)
            return block[end + 1 : line_end if line_end >= 0 else None].strip()
        start += len(name)
    return ""


def modules(roots: Roots = Roots()) -> dict[str, str]:  # noqa: B008
    """KVM's modules and their parameters, as the combo has them.

    "kvm_amd" → what identifies its build: the GNU build id, srcversion, "built-in" or "loaded".
    "kvm_amd.nested" → "1"; "unreadable" for a parameter that only root may read.
    """
    found = {}
    for module in module_names(roots):
        folder = f"{roots.sys}/module/{module}"
        found[module] = _module_build(folder)
        for name in sorted(listing(f"{folder}/parameters")):
            value = read(f"{folder}/parameters/{name}", 4096)
            if value is not None:
                found[f"{module}.{name}"] = value
    return found


def listing(folder: str) -> list[str]:
    """The names in a folder; none where it does not exist or may not be read."""
    try:
        return os.listdir(folder)
    except OSError:
        return []


def module_names(roots: Roots) -> list[str]:
    """kvm and its vendor modules (kvm_intel, kvm_amd, kvm_pvm, …), loaded or built in."""
    return sorted(name for name in listing(f"{roots.sys}/module") if name == "kvm" or name.startswith("kvm_"))


def _module_build(folder: str) -> str:
    try:
        with open(f"{folder}/notes/.note.gnu.build-id", "rb") as file:
            note = file.read(_FILE_BYTES)
        return "build-id:" + note[16:].hex()  # behind Elf64_Nhdr and the name "GNU\0"
    except OSError:
        pass
    source = read(f"{folder}/srcversion")
    if source:
        return f"srcversion:{source}"
    # built-in code has no initstate (kernel/module/sysfs.c)
    return "loaded" if os.path.exists(f"{folder}/initstate") else "built-in"


def _lockdown(roots: Roots) -> str | None:
    """The lockdown mode: the word in brackets of "[none] integrity confidentiality"."""
    text = read(f"{roots.sys}/kernel/security/lockdown")
    if text is None or "[" not in text:
        return text
    return text.partition("[")[2].partition("]")[0]


def _dmi(roots: Roots, names: Sequence[str]) -> str | None:
    """Fields of the board's DMI table, those that exist, joined by spaces."""
    found = [read(f"{roots.sys}/class/dmi/id/{name}") for name in names]
    return " ".join(text for text in found if text) or None


def combo(
    vmms: Sequence[Mapping[str, str]] = (),
    *,
    roots: Roots = Roots(),  # noqa: B008
    classes: Sequence[CpuClass] | None = None,
) -> dict[str, Any]:
    """The whole combo (kvmneg.report/1, "combo"). `vmms` as kvmneg.host.vmm.known() gives them."""
    classes = cpu_classes(roots) if classes is None else classes
    microcode = dict.fromkeys(one.identity["microcode"] for one in classes if "microcode" in one.identity)
    found: dict[str, Any] = {
        "kernel": read(f"{roots.proc}/sys/kernel/osrelease"),
        "build": read(f"{roots.proc}/sys/kernel/version"),
        "cmdline": read(f"{roots.proc}/cmdline"),
        "microcode": ",".join(microcode) or None,
        "bios": _dmi(roots, _BIOS),
        "board": _dmi(roots, _BOARD),
        "system": _dmi(roots, _SYSTEM),
        "smt": read(f"{roots.sys}/devices/system/cpu/smt/control"),
        "lockdown": _lockdown(roots),
        "boot": read(f"{roots.proc}/sys/kernel/random/boot_id"),
        "cpus": [one.identity for one in classes],
        "modules": modules(roots),
        "livepatches": sorted(listing(f"{roots.sys}/kernel/livepatch")),
        "vmms": [dict(vmm) for vmm in vmms],
    }
    return {name: value for name, value in found.items() if value is not None}


def host_name(roots: Roots = Roots()) -> str:  # noqa: B008
    """The host's name (uname nodename)."""
    return read(f"{roots.proc}/sys/kernel/hostname") or ""
