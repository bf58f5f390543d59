# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reports of emulated hosts, for tests that need many hosts and no emulator: `python -m tests.hosts record`.

They stand in tests/data/hosts as HOST.CPU.json, those of a QEMU that is not the installed one (record HOST --qemu
VERSION) as HOST.CPU.qemu-VERSION.json, each with how it was made. What KVM offers depends on the emulated
CPU, so none is what a real CPU of that name has. kvmneg/data/recorded-host.json, which `make run` shows where there
is no KVM, is made by `record amd-6.1 --cpu EPYC-Milan --name recorded-milan --to kvmneg/data/recorded-host.json`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from kvmneg.features.report import Report

from . import bochs, catalogue, machine, project, start
from .catalogue import Host
from .errors import HostError
from .job import Job

FOLDER = project.ROOT / "tests/data/hosts"
COMMAND = ("python3", "-m", "kvmneg.cli", "host", "--json")
SECONDS = 300.0


def path(host: Host) -> Path:
    """Where a host's report stands."""
    return FOLDER / f"{'.'.join(host.parts())}.json"


def record(host: Host, name: str = "") -> dict[str, Any]:
    """The report of the host, as kvmneg makes it there, with how it was made; `name` is the host's in it.

    Raises HostError.
    """
    result = start.run(host, Job(COMMAND, project.files(host.architecture), project.ENVIRONMENT, SECONDS))
    if result.status:
        raise HostError("job", f"kvmneg host: {result.stderr.decode('utf-8', 'replace').strip()}")
    report: dict[str, Any] = json.loads(result.stdout)
    by = f"{report['measured']['by']}, inside {_emulator(host)}; not a CPU of that name"
    report["measured"] |= {"by": by, "host": name or _name(host), "source": "recorded"}
    return report


def write(host: Host, target: Path | None = None, name: str = "") -> Path:
    """Record a host and put the report in its place, or another."""
    report = record(host, name)
    target = target or path(host)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return target


def unlike(host: Host, found: Report) -> dict[str, tuple[int, int | None]]:
    """The words of the host's recorded report that the same host's is now without, or has otherwise.

    Each with both values; none where the kernel is another one by now. kvmneg may have learnt to ask for more since.
    """
    recorded = Report.loads(path(host).read_bytes())
    if recorded.combo["kernel"] != found.combo["kernel"]:
        return {}
    now = found.offer_words
    return {
        word: (value, now.get(word)) for word, value in recorded.offer_words.items() if now.get(word) != value
    }


def by_this_emulator(host: Host) -> bool:
    """Whether the recorded report was made in an emulator of the installed one's version, whose CPUs are the same."""
    recorded = Report.loads(path(host).read_bytes()).measured["by"]
    versions = [re.search(r"version (\d+\.\d+)", text) for text in (recorded, _emulator(host))]
    return len({found and found[1] for found in versions}) == 1


def _name(host: Host) -> str:
    """What the host is called in its report: two CPUs under one kernel are two hosts."""
    return host.name if catalogue.find(host.name) == host else "-".join(host.parts())


def _emulator(host: Host) -> str:
    if host.emulator == "bochs":
        return f"{bochs.version()} (cpu: model={host.cpu})"
    return f"{machine.emulator_name(host).partition(' (')[0]} (-accel tcg -cpu {machine.cpu(host)})"
