# SPDX-License-Identifier: LGPL-2.1-or-later
"""A dump of record.py as the report that kvmneg would have made on that host.

    report.py dump.json HOST > report.json

kvmneg/data/recorded-host.json is made by it, from a host with `-cpu EPYC-Milan,+svm,+npt`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvmneg import __version__
from kvmneg.features.report import Report
from kvmneg.host import software, x86
from kvmneg.host.capabilities import name as capability_name
from kvmneg.host.kvm import CpuidEntry, Probe


def _number(text: str | int) -> int:
    return int(text, 0) if isinstance(text, str) else text


def entries(rows: list[list[Any]] | None) -> list[CpuidEntry]:
    """A CPUID table of the dump."""
    return [CpuidEntry(*map(_number, row)) for row in rows or []]


def probe_of(dump: dict[str, Any]) -> Probe:
    """The answers as Kvm.probe() would have given them."""
    system, vm = dump["capabilities"]["system"], dump["capabilities"]["vm"]
    numbers = {**system, **vm}
    return Probe(
        capabilities={capability_name(int(n)): (system.get(n, 0), vm.get(n, 0)) for n in numbers},
        supported=entries(dump["supported"]),
        emulated=entries(dump["emulated"]),
        hyperv=None if dump["hyperv"] is None else entries(dump["hyperv"]),
        feature_msrs={_number(i): _number(v) for i, v in dump["feature_msrs"] if v is not None},
        refused_msrs=tuple(_number(i) for i, v in dump["feature_msrs"] if v is None),
        xcomp_guest_supp=_number(dump["xcomp_guest_supp"]) if "xcomp_guest_supp" in dump else None,
        missing={},
    )


def tree_of(dump: dict[str, Any], folder: Path) -> software.Roots:
    """The dump's files laid out below `folder`."""
    for path, text in dump["files"].items():
        file = folder / path.lstrip("/")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text.encode("latin-1"))
    return software.Roots(str(folder / "sys"), str(folder / "proc"), str(folder / "dev"))


def report_of(dump: dict[str, Any], host: str) -> Report:
    """The whole report."""
    with TemporaryDirectory() as folder:
        combo = software.combo(roots=tree_of(dump, Path(folder)))
    probe = probe_of(dump)
    offer = x86.decoder().offer(probe)
    for word, key in (("tap:features", "tap_features"), ("vhost-net:features", "vhost_net_features")):
        if key in dump:
            offer[word] = _number(dump[key])
    made = dump["made"]
    measured = {
        "at": made["at"],
        "by": f"kvmneg {__version__}, from what KVM answered inside {made['emulator'].partition(' (')[0]} "
        f"(-accel tcg -cpu {made['cpu']}); not a CPU of that name",
        "host": host,
        "source": "recorded",
    }
    return Report(
        x86.ARCHITECTURE,
        measured=measured,
        combo=combo,
        identity=x86.identity(probe.supported),
        offer=offer,
        silicon=x86.silicon_of([entries(dump["raw"])]),
    )


if __name__ == "__main__":
    report = report_of(json.loads(Path(sys.argv[1]).read_text("utf-8")), sys.argv[2])
    sys.stdout.write(json.dumps(report.to_json(), indent=1) + "\n")
