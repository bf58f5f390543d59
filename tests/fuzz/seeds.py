# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where the corpus began: `python tests/fuzz/seeds.py FOLDER` writes FOLDER/contract and FOLDER/reply.

Contracts of recorded hosts, whole and cut down to a few entries of each section, with good digests; replies as the
daemon writes them. `tools/fuzz.sh merge` keeps those that reach different code.
"""

from __future__ import annotations

import json
import struct
import sys
from hashlib import sha256
from pathlib import Path

from kvmneg.features.report import Report
from kvmneg.policy import negotiation, pool
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request

HOSTS = Path(__file__).resolve().parents[1] / "data/hosts"
RECORDED = ("amd-6.12.max", "intel-6.12.corei7_icelake_u", "arm64-6.12.max", "arm64-6.1.neoverse-n1")
HEADER, ENTRY_SIZES = 160, (48, 24, 24, 64, 24, 4)
FLAGS = 5
BLOCKER = {"feature": "avx2", "word": "cpuid:0x7.0.ebx", "bit": 5, "wantedBy": "the request",
           "missingOn": "host node7", "cause": "kvm", "because": "KVM does not offer it"}  # fmt: skip


def contract(name: str) -> bytes:
    """What a recorded host grants at most, under a fence of its own."""
    report = Report.loads((HOSTS / f"{name}.json").read_bytes(), file=name)
    fence = Fence(pool.baseline([report]), 3)
    return negotiation.negotiate(Request(maximum=True), report, fence).contract.binary()


def few(binary: bytes, entries: int) -> bytes:
    """The first so many entries of each section and the last one; all flags, and the capability that they repeat."""
    counts = struct.unpack_from("<6I", binary, 104)
    kept, body, at = [], b"", HEADER
    for section, (count, size) in enumerate(zip(counts, ENTRY_SIZES, strict=True)):
        rows = [binary[at + i * size : at + (i + 1) * size] for i in range(count)]
        at += count * size
        if section != FLAGS:
            rows = [
                row
                for i, row in enumerate(rows)
                if i < entries or i == count - 1 or row.startswith(b"arm:vcpu-features\0")
            ]
        kept.append(len(rows))
        body += b"".join(rows)
    head = bytearray(binary[:HEADER])
    struct.pack_into("<I", head, 16, HEADER + len(body))
    head[32:64] = bytes(32)
    struct.pack_into("<6I", head, 104, *kept)
    head[32:64] = sha256(head + body).digest()
    return bytes(head + body)


def replies(binary: bytes) -> list[dict[str, object]]:
    """One of each method, refusals, and what varlink itself may answer."""
    digest = "sha256:" + binary[32:64].hex()
    grant = {"digest": digest, "generation": 7, "path": "/run/kvmneg/contracts/x", "expiresInSeconds": 600}
    offer = {"contract": {"words": {"cpuid:0x1.0.ecx": "0x1"}}, "digest": digest, "generation": 7}
    blocked = {
        "message": "no\u0085: \x1b[2J\n",
        "hint": None,
        "blockers": [BLOCKER, {**BLOCKER, "bit": None}],
    }
    return [
        {},
        {"parameters": {**offer, "notGranted": [BLOCKER], "scope": ["judged: é", "not judged"]}},
        {"parameters": grant, "continues": False},
        {"error": "org.kvmneg.Blocked", "parameters": blocked},
        {"error": "org.varlink.service.InvalidParameter", "parameters": {"parameter": "request"}},
        {"error": "org.kvmneg.Forbidden", "parameters": {"message": "é\x7f", "hint": "ask", "blockers": []}},
        {"error": 5, "parameters": []},
    ]


def main(folder: Path) -> None:
    (folder / "contract").mkdir(parents=True, exist_ok=True)
    (folder / "reply").mkdir(parents=True, exist_ok=True)
    for name in RECORDED:
        binary = contract(name)
        for entries in (1, 4, 10_000):
            (folder / "contract" / f"{name}-{entries}").write_bytes(few(binary, entries))
    header = struct.pack("<8s6I", b"KVMNEGC", 1, 1, HEADER, HEADER, 0, 0).ljust(HEADER, b"\0")
    bare = header[:32] + sha256(header).digest() + header[64:]
    (folder / "contract" / "bare").write_bytes(bare)
    for number, reply in enumerate(replies(bare)):
        text = json.dumps(reply, ensure_ascii=bool(number % 2)).encode()
        for piece in (0, 3):
            (folder / "reply" / f"{number}-{piece}").write_bytes(bytes([piece]) + text + b"\0")
    (folder / "reply" / "cut").write_bytes(b'\0{"parameters":')


if __name__ == "__main__":
    main(Path(sys.argv[1]))
