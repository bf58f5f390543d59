# SPDX-License-Identifier: LGPL-2.1-or-later
"""Combos by their dimensions: what tells two apart, and which recorded one an asked one is. Pure.

Going back means that the whole combo is one that was measured: an old kernel with a new microcode is not the old
combo. Who asks for a kernel or a VMM names what changes, and everything else is taken as it is now. What only goes
with the kernel is not compared then: its build and its modules' builds, parameters that only one of the two has or
that only tune, live patches of the kernel that runs now.
"""

from __future__ import annotations

from kvmneg.errors import UsageError
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

_BOOT = "boot"  # another boot of the same combo is the same combo
_MODULES, _VMMS = "modules.", "vmms."
_BUILD, _LIVE_PATCH = "build", "livepatches."
# Parameters that time, trace or lay out memory and change nothing that is measured (arch/x86/kvm, virt/kvm): kernels
# change their defaults. Every other parameter counts.
_TUNING = (
    "kvm.halt_poll_ns", "kvm.lapic_timer_advance", "kvm.min_timer_period_us", "kvm.pi_inject_timer",
    "kvm.nx_huge_pages", "kvm.tdp_mmu", "kvm.eager_page_split", "kvm.flush_on_reuse", "kvm.report_ignored_msrs",
    "kvm.vector_hashing", "kvm_amd.pause_filter_", "kvm_amd.dump_invalid_vmcb", "kvm_intel.ple_",
    "kvm_intel.dump_invalid_vmcs",
)  # fmt: skip
# words of a command line that name the kernel's own files
_FILES = ("BOOT_IMAGE=", "initrd=")
_NAMED = 6  # names in a message


class Dimension(NamedTuple):
    """One input in which two combos differ: its value in one (now, or as asked) and in the recorded one, None: none."""

    name: str
    ours: str | None
    recorded: str | None

    def to_json(self) -> dict[str, Any]:
        return {"dimension": self.name, "asked": self.ours, "recorded": self.recorded}

    def describe(self) -> str:
        """Like "microcode is 0x2, recorded with 0x1"."""
        ours = "not there" if self.ours is None else self.ours or "empty"
        recorded = "without it" if self.recorded is None else f"with {self.recorded or 'an empty one'}"
        return f"{self.name} is {ours}, recorded {recorded}"


class Asked(NamedTuple):
    """The combo that somebody asks for: the kernel and the VMM builds that change, and any other dimension by name.

    `vmms` are names with a version ("qemu-10.0"): that many of its numbers have to match.
    """

    kernel: str | None = None
    vmms: tuple[str, ...] = ()
    others: tuple[tuple[str, str], ...] = ()

    def describe(self) -> str:
        """Like "kernel 6.1.0-50-cloud-amd64, qemu-10.0, microcode 0x1"."""
        parts = [f"kernel {self.kernel}"] if self.kernel else []
        return ", ".join([*parts, *self.vmms, *(f"{name} {value}" for name, value in self.others)])


def flat(value: object, prefix: str = "") -> dict[str, str]:
    """A tree of documents as dotted names: modules.kvm.ignore_msrs; lists by number, VMMs by name.

    A VMM of which there are several builds has its path in the names of all but the first.
    """
    rows: dict[str, str] = {}
    if isinstance(value, dict):
        for key, inner in value.items():
            rows |= flat(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list):
        seen: set[object] = set()
        for place, inner in enumerate(value):
            label: object = place
            if prefix == "vmms" and isinstance(inner, dict):
                label = inner.get("name", place)
                label = f"{label} in {inner.get('path', place)}" if label in seen else label
                seen.add(label)
            rows |= flat(inner, f"{prefix}.{label}")
    else:
        rows[prefix] = str(value)
    return rows


def dimensions(combo: Mapping[str, Any]) -> dict[str, str]:
    """A combo's dimensions, flat, as they are compared: without the boot, the command line without file names."""
    rows = flat({name: value for name, value in combo.items() if name != _BOOT})
    if "cmdline" in rows:
        kept = (word for word in rows["cmdline"].split() if not word.startswith(_FILES))
        rows["cmdline"] = " ".join(kept)
    return rows


def between(ours: Mapping[str, Any], recorded: Mapping[str, Any]) -> list[Dimension]:
    """The dimensions in which two combos differ."""
    left, right = dimensions(ours), dimensions(recorded)
    names = dict.fromkeys((*left, *right))
    return [
        Dimension(name, left.get(name), right.get(name))
        for name in names
        if left.get(name) != right.get(name)
    ]


def for_people(names: Sequence[str]) -> list[str]:
    """The dimensions without builds of a kernel and its modules, where the kernel differs: they tell nothing then."""
    if "kernel" not in names:
        return list(names)
    return [
        name for name in names if name != _BUILD and not (name.startswith(_MODULES) and name.count(".") == 1)
    ]


class Search:
    """The asked combo, to be found among the recorded ones: `running` with the changes made.

    Raises UsageError for a change that names no dimension, or a kernel that several recorded ones begin with.
    """

    def __init__(self, running: Mapping[str, Any], asked: Asked, kernels: Sequence[str] = ()) -> None:
        self.asked = asked
        self._rows = dimensions(running)
        self._kernel = _release(asked.kernel, kernels) if asked.kernel else self._rows.get("kernel", "")
        self._other_kernel = self._kernel != self._rows.get("kernel", "")
        self._vmms = [_build(text) for text in asked.vmms]
        if self._other_kernel:
            self._rows["kernel"] = self._kernel
        for name, value in asked.others:
            if name not in self._rows and not name.startswith((_MODULES, _VMMS)):
                hint = f"there are {', '.join(name for name in self._rows if '.' not in name)}"
                raise UsageError(f"{name!r} is no dimension of a combo", hint=hint)
            self._rows[name] = value
        self._said = {name for name, _ in asked.others}

    @property
    def kernel(self) -> str:
        """The asked kernel's release, whole where it is a recorded one."""
        return self._kernel

    def differs(self, recorded: Mapping[str, Any]) -> list[Dimension]:
        """The dimensions in which a recorded combo is not the asked one; none where it is."""
        rows = dimensions(recorded)
        return [*self._plain(rows), *self._builds(rows)]

    def _plain(self, rows: Mapping[str, str]) -> Iterator[Dimension]:
        for name in dict.fromkeys((*self._rows, *rows)):
            ours, theirs = self._rows.get(name), rows.get(name)
            if ours == theirs or any(name.startswith(f"{_VMMS}{vmm}.") for vmm, _ in self._vmms):
                continue
            if name not in self._said and self._other_kernel and _follows(name, ours, theirs):
                continue
            yield Dimension(name, ours, theirs)

    def _builds(self, rows: Mapping[str, str]) -> Iterator[Dimension]:
        from kvmneg.policy.kernels import numbers  # with tables that most answers do without

        for vmm, version in self._vmms:
            name = f"{_VMMS}{vmm}.version"
            found, wanted = rows.get(name), numbers(version)
            if found is None or numbers(found)[: len(wanted)] != wanted:
                yield Dimension(name, version, found)


def _release(asked: str, kernels: Sequence[str]) -> str:
    """The recorded kernel that is meant: its whole release, or the beginning of just one ("6.1")."""
    if asked in kernels:
        return asked
    meant = {
        one for one in kernels if one.startswith(asked) and not one[len(asked) : len(asked) + 1].isdigit()
    }
    if len(meant) > 1:
        names = ", ".join(sorted(meant)[:_NAMED])
        raise UsageError(f"{asked} may be {names}", hint="name one of them whole, as `uname -r` does")
    return meant.pop() if meant else asked


def _build(text: str) -> tuple[str, str]:
    """("qemu", "10.0") of "qemu-10.0". Raises UsageError where there is no version."""
    name, dash, version = text.rpartition("-")
    if not (name and dash and version[:1].isdigit()):
        raise UsageError(f"{text!r} names no version", hint="like qemu-10.0")
    return name, version


def _follows(name: str, ours: str | None, theirs: str | None) -> bool:
    """Whether a dimension is the kernel's own, and says nothing where kernels differ."""
    if name == _BUILD:
        return True
    if name.startswith(_LIVE_PATCH):
        return theirs is None  # those of now end with this kernel; one that was measured with is asked for
    if not name.startswith(_MODULES):
        return False
    parameter = name[len(_MODULES) :]
    return "." not in parameter or None in (ours, theirs) or parameter.startswith(_TUNING)
