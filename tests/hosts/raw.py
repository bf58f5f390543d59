# SPDX-License-Identifier: LGPL-2.1-or-later
"""What an x86 KVM answered, undecoded: written inside a host, read by tests of the decoder.

python -m tests.hosts run amd-6.1 -- python3 -m tests.hosts.raw > tests/unit/data/dump-amd-6.1.json
"""

from __future__ import annotations

import json
import os
import re
import sys
from typing import Any, cast

from kvmneg.host import capabilities
from kvmneg.host.kvm import Kvm
from kvmneg.host.tables import CpuidEntry, Probe, Tsc


def answers(probe: Probe) -> dict[str, Any]:
    """One probe as JSON: capabilities by number on both descriptors, tables as rows of registers."""
    known = [(number, probe.capabilities.get(capabilities.name(number))) for number in range(256)]
    return {
        "made": {"kernel": os.uname().release, "build": os.uname().version},
        "capabilities": {
            kind: {str(number): both[place] for number, both in known if both[place]}
            for place, kind in enumerate(("system", "vm"))
        },
        "supported": _rows(probe.supported),
        "emulated": _rows(probe.emulated),
        "hyperv": _rows(probe.hyperv),
        "feature_msrs": [
            *([hex(index), hex(value)] for index, value in probe.feature_msrs.items()),
            *([hex(index), None] for index in probe.refused_msrs),
        ],
        "xcomp_guest_supp": None if probe.xcomp_guest_supp is None else hex(probe.xcomp_guest_supp),
        "state_msrs": None if probe.state_msrs is None else list(map(hex, probe.state_msrs)),
        "mce_cap": None if probe.mce_cap is None else hex(probe.mce_cap),
        "tsc": probe.tsc,
    }


def _rows(entries: list[CpuidEntry] | None) -> list[list[str | int]] | None:
    """function, index, flags, eax, ebx, ecx, edx."""
    if entries is None:
        return None
    return [[hex(entry[0]), entry[1], entry[2], *map(hex, entry[3:])] for entry in entries]


def _number(text: str | int) -> int:
    return int(text, 0) if isinstance(text, str) else text


def _entries(rows: list[list[Any]] | None) -> list[CpuidEntry]:
    return [CpuidEntry(*map(_number, row)) for row in rows or []]


def probe_of(dump: dict[str, Any]) -> Probe:
    """The answers as Kvm.probe() gave them."""
    system, vm = dump["capabilities"]["system"], dump["capabilities"]["vm"]
    found = {capabilities.name(int(n)): (system.get(n, 0), vm.get(n, 0)) for n in {**system, **vm}}
    xcomp = dump.get("xcomp_guest_supp")
    # dumps made before these were asked for do not have them: their reports do not name them either
    msrs, mce, tsc = (dump.get(key) for key in ("state_msrs", "mce_cap", "tsc"))
    return Probe(
        capabilities=cast("Any", found),  # of which the decoder only asks get()
        supported=_entries(dump["supported"]),
        emulated=_entries(dump["emulated"]),
        hyperv=None if dump["hyperv"] is None else _entries(dump["hyperv"]),
        feature_msrs={_number(i): _number(v) for i, v in dump["feature_msrs"] if v is not None},
        refused_msrs=tuple(_number(i) for i, v in dump["feature_msrs"] if v is None),
        xcomp_guest_supp=None if xcomp is None else _number(xcomp),
        missing={},
        state_msrs=None if msrs is None else tuple(map(_number, msrs)),
        mce_cap=None if mce is None else _number(mce),
        tsc=None if tsc is None else Tsc(*tsc),
    )


def main() -> None:
    with Kvm.open() as kvm:
        text = json.dumps(answers(kvm.probe()), indent=1)
    # a row of registers in one line: a table people can read and diff
    text = re.sub(r"\[\s+([^][{}]*?)\s+\]", lambda row: f"[{' '.join(row[1].split())}]", text)
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
