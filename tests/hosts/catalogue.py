# SPDX-License-Identifier: LGPL-2.1-or-later
"""Which hosts there are: a kernel of Debian's, an architecture, an emulator and the CPUs it can be.

Debian keeps one version of each kernel line in a suite, so a host is named by its line ("6.12"); what a test
expects of it goes by what was probed, never by this name.
"""

from __future__ import annotations

from typing import NamedTuple

from .errors import HostError

# The kernel lines and the suites that carry them. "newest" is any 7.x: backports are ahead of sid.
LINES = {
    "5.10": ("5.10", "bullseye"),
    "6.1": ("6.1", "bookworm"),
    "6.12": ("6.12", "trixie"),
    "6.16": ("6.16", "trixie-backports"),
    "6.18": ("6.18", "trixie-backports"),
    "newest": ("7", "trixie-backports"),
}
INTEL_LINES = ("6.1", "6.12")
# Bochs' names of the CPUs that have VMX with EPT.
INTEL_MODELS = (
    "corei7_sandy_bridge_2600k",
    "corei7_haswell_4770",
    "corei7_skylake_x",
    "corei7_icelake_u",
    "tigerlake",
)


# Those that `make test` runs in, as `tests.hosts build` takes them: HOST, or HOST:CPU.
FEW = ("arm64-6.12", "amd-6.12", "arm64-6.12:neoverse-n1", "arm64-newest:neoverse-n1")


class Host(NamedTuple):
    """One host: `cpu` is the emulator's name of the CPU, `emulator_version` "" for the installed one."""

    name: str
    architecture: str
    line: str
    suite: str
    emulator: str
    cpu: str
    emulator_version: str = ""

    @property
    def kernel(self) -> str:
        """The wanted version: "6.12" is any 6.12.x."""
        return LINES[self.line][0]

    def parts(self) -> tuple[str, ...]:
        """What tells it from others, in names of files: its name, its CPU, and its QEMU unless it is the usual one."""
        return self.name, self.cpu, *([f"qemu-{self.emulator_version}"] if self.emulator_version else [])

    def describe(self) -> str:
        name, *rest = self.parts()
        return f"{name} ({', '.join(rest)})"


def hosts() -> list[Host]:
    """Every host with its default CPU."""
    arm64 = [Host(f"arm64-{line}", "arm64", line, suite, "qemu", "max") for line, (_, suite) in LINES.items()]
    amd = [Host(f"amd-{line}", "amd64", line, suite, "qemu", "max") for line, (_, suite) in LINES.items()]
    intel = [
        Host(f"intel-{line}", "amd64", line, LINES[line][1], "bochs", "corei7_haswell_4770")
        for line in INTEL_LINES
    ]
    return [*arm64, *amd, *intel]


def find(name: str, cpu: str = "", emulator_version: str = "") -> Host:
    """The host of that name, with another CPU or another QEMU if one is named. Raises HostError."""
    for host in hosts():
        if host.name == name:
            return host._replace(cpu=cpu or host.cpu, emulator_version=emulator_version)
    raise HostError("packages", f"no host {name}; there are: {', '.join(host.name for host in hosts())}")
