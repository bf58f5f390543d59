# SPDX-License-Identifier: LGPL-2.1-or-later
"""libkvmneg's reader of contracts: it takes what kvmneg.policy.contract takes and nothing else, whatever the damage."""

from __future__ import annotations

import errno
import json
import shutil
import struct
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

import arm64_reports as hosts
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kvmneg._libkvmneg import lib

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features import words
from kvmneg.features.report import Report
from kvmneg.host.apply import Applied
from kvmneg.policy import negotiation, pool
from kvmneg.policy.contract import Contract
from kvmneg.policy.fence_text import Fence
from kvmneg.policy.request import Request
from tests.fuzz.seeds import few

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
READER = [ROOT / "csrc" / name for name in ("contract.c", "contract-check.c", "sha256.c", "words.c")]
WRAP = [f"-Wl,--wrap={name}" for name in ("calloc", "realloc", "read")]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g"]
HEADER, ENTRY_SIZES = 160, (48, 24, 24, 64, 24, 4)


def x86() -> bytes:
    """Of a recorded AMD host, under a fence, with a pinned TSC."""
    report = Report.loads((ROOT / "tests/data/hosts/amd-6.12.max.json").read_bytes(), file="recorded")
    fence = Fence(pool.baseline([report]), 3)
    return negotiation.negotiate(Request(maximum=True), report, fence).contract.binary()


def arm64() -> bytes:
    """With every section that arm64 has, and every rule of the portable state."""
    changes = {"PFR0": 0x1101_0001_1111_1112, "VLS": 0b11, "ZFR0": 1, "INIT": 0b10100}
    new, old = hosts.new(**changes), hosts.new("old", PSCI=0x1_0001, **changes)
    fence = Fence(pool.baseline([new, old]), 4, registers=tuple(old.registers[:-2]))
    return negotiation.negotiate(Request(maximum=True), new, fence).contract.binary()


CONTRACTS = {"x86": x86, "arm64": arm64}


@pytest.fixture(params=sorted(CONTRACTS))
def binary(request: pytest.FixtureRequest) -> bytes:
    """A real contract of each architecture."""
    return CONTRACTS[request.param]()


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """build(name, *flags) → reader.c with the reader and nothing else of libkvmneg."""
    folder = tmp_path_factory.mktemp("reader")
    stub = folder / "internal.c"  # the two functions of system.c that it needs
    stub.write_text(
        '#include <stdlib.h>\n#include <unistd.h>\n#include "internal.h"\n'
        "void *kvmneg_internal_table(size_t header, size_t count, size_t item) "
        "{ return calloc(1, header + count * item); }\n"
        "int kvmneg_close(int fd) { close(fd); return -1; }\n",
        "ascii",
    )

    def make(name: str, *flags: str) -> Path:
        if not shutil.which("gcc"):
            pytest.skip("gcc is not installed")
        if (folder / name).exists():
            return folder / name
        command = ["gcc", "-std=gnu11", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc'}", *WRAP, *flags]
        sources = [ROOT / "tests/unit/reader.c", stub, *READER]
        done = subprocess.run(
            [*command, *sources, "-o", folder / name], capture_output=True, text=True, check=False, cwd=folder
        )
        assert done.returncode == 0, done.stderr
        return folder / name

    return make


def run(program: Path, *arguments: str | Path) -> list[str]:
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, cwd=program.parent
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout.split()


def sealed(data: bytes | bytearray) -> bytes:
    zeroed = bytearray(data)
    zeroed[32:64] = bytes(32)
    zeroed[32:64] = sha256(zeroed).digest()
    return bytes(zeroed)


def sections(binary: bytes) -> list[tuple[int, int]]:
    """(start, number of entries) of each section."""
    counts = struct.unpack_from("<6I", binary, 104)
    starts, at = [], HEADER
    for count, size in zip(counts, ENTRY_SIZES, strict=True):
        starts.append((at, count))
        at += count * size
    return starts


def test_every_change_of_a_byte_to_any_other(
    build: Callable[..., Path], binary: bytes, tmp_path: Path
) -> None:
    """With two entries of each section; the test below has every entry, and with --long this for every entry."""
    file = tmp_path / "contract"
    file.write_bytes(small := few(binary, 1))
    assert Contract.from_binary(small).binary() == small
    program = build("reader-O2", "-O2")
    tried, taken = map(int, run(program, "mutate", file, "all"))
    assert tried == len(small) * 255
    assert 0 < taken < tried / 2
    assert run(program, "truncate", file) == [str(len(small))]


@pytest.mark.parametrize("flags", [["-O2"], ["-O1", *SANITIZERS]], ids=["plain", "sanitized"])
def test_every_change_of_a_byte_and_every_length(
    build: Callable[..., Path], flags: list[str], binary: bytes, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    """Refused with the digest as it was; with a good one refused, or the contract that those bytes are."""
    file = tmp_path / "contract"
    file.write_bytes(binary)
    program = build("reader-O2" if flags == ["-O2"] else "reader", *flags)
    how = {1: ("bits", "all"), 2: ("one", "bits")}[min(len(flags), 2)][bool(pytestconfig.getoption("long"))]
    tried, taken = map(int, run(program, "mutate", file, how))
    assert tried == len(binary) * {"all": 255, "bits": 8, "one": 1}[how]
    assert 0 < taken < tried / 2  # values may change under their masks; most else may not
    assert run(program, "truncate", file) == [str(len(binary))]


def test_opening(build: Callable[..., Path], binary: bytes, tmp_path: Path) -> None:
    """By path, descriptor and memory; what goes wrong is an errno, and errno itself stays."""
    file = tmp_path / "contract"
    file.write_bytes(binary)
    bad, no_memory, none = -errno.EBADMSG, -errno.ENOMEM, -errno.ENOENT
    assert list(map(int, run(build("reader", "-O1", *SANITIZERS), "open", file))) == [
        0, 0, bad, bad, none, bad, -errno.EISDIR, no_memory, no_memory, 0, -errno.EIO, none, 77,
    ]  # fmt: skip


def test_digests_are_sha256(build: Callable[..., Path]) -> None:
    """Of every length around the ends of blocks, whole and with 32 bytes taken as zeros."""
    found = run(build("reader", "-O1", *SANITIZERS), "digests")
    expected = []
    for size in range(301):
        data = bytes((i * 7 + size) & 0xFF for i in range(size))
        half = size // 2
        zeroed = data[:half] + bytes(32) + data[half + 32 :] if size >= 160 else data
        expected += [sha256(data).hexdigest(), sha256(zeroed).hexdigest()]
    assert found == expected


def test_words_are_written_as_in_documents(build: Callable[..., Path]) -> None:
    """At the ends of what leaves, subleaves, indices, ids and names may be: no longer than their room."""
    numbers = (0, 9, 10, 0x4000_0001, 0xFFFF_FFFF)
    expected = [
        words.cpuid_word(leaf, subleaf, register, ("cpuid", "hyperv")[place % 2])
        for leaf, subleaf in zip(numbers, reversed(numbers), strict=True)
        for place, register in enumerate(words.REGISTERS)
    ]
    for number, other in zip(numbers, reversed(numbers), strict=True):
        expected += [words.msr_word(number), f"arm64:{number << 32 | other:#x}"]
    expected += ["kvm:", "kvm:" + 36 * "x", "arm:vcpu-features"]
    assert run(build("reader", "-O1", *SANITIZERS), "words") == expected


def test_the_fuzzers_corpus(build: Callable[..., Path]) -> None:
    """Taken or refused as the other reader does."""
    files = sorted((ROOT / "tests/fuzz/corpus/contract").iterdir())
    found = run(build("reader", "-O1", *SANITIZERS), "look", *files)
    assert found == [str(int(verdict(file.read_bytes()) == "taken")) for file in files]
    assert set(found) == {"0", "1"}


Counts = tuple[list[int], list[int]]


def reached(folder: Path, program: str) -> dict[str, Counts]:
    """Of each file of the reader: how many lines, then branches, were not run and were."""
    found: dict[str, Counts] = {}
    for source in READER:
        text = subprocess.run(
            ["gcov", "--json-format", "--stdout", "--branch-probabilities", f"{program}-{source.stem}.gcda"],
            capture_output=True, check=True, cwd=folder,
        ).stdout  # fmt: skip
        for file in json.loads(text)["files"]:
            if Path(file["file"]).name != source.name:
                continue  # inline functions of headers
            counts = found[source.name] = ([0, 0], [0, 0])
            for line in file["lines"]:
                counts[0][line["count"] > 0] += 1
                for branch in line["branches"]:
                    counts[1][branch["count"] > 0] += 1
    return found


def test_coverage(build: Callable[..., Path], tmp_path: Path) -> None:
    """What the tests here and the corpus reach of the reader: 95 % of each file's lines and 85 % of its branches.

    gcov comes with gcc: without it this fails.
    """
    program = build("covered", "-O0", "--coverage")
    for name, contract in CONTRACTS.items():
        file = tmp_path / name
        file.write_bytes(contract())
        for arguments in (["mutate", file, "one"], ["open", file]):
            run(program, *arguments)
        for number, (_what, damaged, _offset) in enumerate(damages(contract())):
            (tmp_path / f"{name}{number}").write_bytes(damaged)
            run(program, "open", tmp_path / f"{name}{number}")
    run(program, "look", *(ROOT / "tests/fuzz/corpus/contract").iterdir())
    run(program, "digests")
    run(program, "words")
    found = reached(program.parent, "covered")
    assert set(found) == {source.name for source in READER}
    assert sum(sum(lines) for lines, _ in found.values()) > 250
    for name, (lines, branches) in found.items():
        assert lines[1] / sum(lines) >= 0.95, (name, lines)
        assert branches[1] / sum(branches) >= 0.85, (name, branches)


def verdict(data: bytes) -> str:
    """What both readers say: taken or refused; they have to agree."""
    try:
        ours: Contract | None = Contract.from_binary(data)
    except BadInput:
        ours = None
    try:
        theirs: Applied | None = Applied.of(data)
    except BadInput:
        theirs = None
    assert (ours is None) == (theirs is None), data.hex()
    if ours is None or theirs is None:
        return "refused"
    assert theirs.binary() == ours.binary() == data
    assert {word: value for word, value, _mask in theirs.words()} == ours.words()
    return "taken"


def test_both_readers_agree_on_what_they_read(binary: bytes) -> None:
    """Words, masks, portable state, header; written again the bytes are the same."""
    contract, held = Contract.from_binary(binary), Applied.of(binary)
    document = contract.to_json()
    masks = document.get("masks", {})
    for word, value, mask in held.words():
        assert int(document["words"][word], 16) == value
        assert mask == int(masks[word], 16) if word in masks else mask in ((1 << 32) - 1, (1 << 64) - 1), word
    assert len(list(held.words())) == len(document["words"])
    assert Contract.from_json(document).binary() == held.binary() == binary
    info = held.info()
    assert "sha256:" + info["digest"].hex() == contract.digest
    assert (info["fence_generation"], "sha256:" + info["fence"].hex()) == contract.fence
    rules = ("carry", "drop-if", "drop-if-timer-off", "refuse")
    assert [(row[0], rules[row[1] - 1], row[2]) for row in held.portable()] == [
        (entry.register, entry.rule, entry.value) for entry in contract.portable
    ]
    if contract.architecture == "arm64":
        assert info["vcpu_features"] == contract.granted.value("arm:vcpu-features")


def test_both_readers_agree_on_damage(binary: bytes) -> None:
    """Each bit of the header, and of the first and last two entries of each section, the digest repaired."""
    places = [*range(32), *range(64, HEADER)]
    for (at, count), size in zip(sections(binary), ENTRY_SIZES, strict=True):
        places += range(at, at + min(count, 2) * size)
        places += range(at + max(count - 2, 2) * size, at + count * size)
    found = {"taken": 0, "refused": 0}
    for place in places:
        for bit in range(8):
            changed = bytearray(binary)
            changed[place] ^= 1 << bit
            found[verdict(sealed(changed))] += 1
    assert found["taken"] > 100 and found["refused"] > 1000


Damage = tuple[str, bytes, int]


class Damages(list[Damage]):
    """(what the error says, a contract with a good digest, the offset it names)."""

    def __init__(self, binary: bytes) -> None:
        super().__init__()
        self.binary = binary

    def change(self, what: str, offset: int, *edits: tuple[int, bytes]) -> None:
        changed = bytearray(self.binary)
        for at, data in edits:
            changed[at : at + len(data)] = data
        self.append((what, sealed(changed), offset))

    def twice(self, at: int, size: int, offset: int = 0) -> None:
        """The first entry of a section again, instead of the second."""
        self.change("place", at + size + offset, (at + size, self.binary[at : at + size]))


ONE = struct.pack("<I", 1)


def damages(binary: bytes) -> Damages:
    """One of each kind."""
    found = Damages(binary)
    found.change("begins", 0, (0, b"X"))
    found.change("version", 8, (8, struct.pack("<I", 2)))
    found.change("architecture", 12, (12, struct.pack("<I", 3)))
    found.change("size is not", 16, (16, struct.pack("<I", len(binary) + 8)))
    found.change("another size", 20, (20, struct.pack("<I", 168)))
    found.change("grade", 24, (24, struct.pack("<I", 3)))
    found.change("reserved", 28, (28, ONE))
    found.change("generation", 72, (64, bytes(8)))
    found.change("reserved", 128, (159, b"\1"))
    for section, limit in enumerate(limits.CONTRACT_ENTRIES):
        at = 104 + 4 * section
        if struct.unpack_from("<I", binary, at)[0]:
            found.change("limit", at, (at, struct.pack("<I", limit + 1)))
        else:
            found.change("does not have", at, (at, ONE))
    name, names = sections(binary)[3]
    found.change("name", name, (name, b"K"))
    found.change("name", name, (name + 36, b"x"))
    found.change("action", name + 40, (name + 40, ONE))
    found.change("reserved", name + 44, (name + 44, ONE))
    found.change("does not bind", name + 48, (name + 56, bytes(8)), (name + 48, b"\1"))
    found.change("binds nothing", name + 56, (name + 48, bytes(16)))
    if names > 1:
        found.twice(name, 64)
    (of_x86 if struct.unpack_from("<I", binary, 12) == (1,) else of_arm64)(found)
    return found


def of_x86(found: Damages) -> None:
    (cpuid, _), (msr, _), _, (name, _), _, _ = sections(found.binary)
    found.change("space", cpuid + 8, (cpuid + 8, struct.pack("<I", 2)))
    found.change("reserved", cpuid + 12, (cpuid + 12, ONE))
    found.twice(cpuid, 48)
    found.change("does not bind", cpuid + 16, (cpuid + 16, b"\1" + bytes(31)))
    found.change("binds nothing", cpuid + 32, (cpuid + 16, bytes(32)))
    found.change("reserved", msr + 4, (msr + 4, ONE))
    found.twice(msr, 24)
    found.change("does not bind", msr + 8, (msr + 8, b"\1" + bytes(15)))
    found.change("binds nothing", msr + 16, (msr + 8, bytes(16)))
    found.change("more bits", name + 56, (name + 56, b"\xff" * 8))
    unset = b"arm:vcpu-features".ljust(40, b"\0") + bytes(8) + ONE + bytes(4) + ONE + bytes(4)
    found.change("fewer flags", 124, (name, unset))


def of_arm64(found: Damages) -> None:
    _, _, (register, _), _, (state, _), (flag, _) = sections(found.binary)
    found.twice(register, 24)
    found.change("does not bind", register + 8, (register + 8, b"\1" + bytes(15)))
    found.change("binds nothing", register + 16, (register + 8, bytes(16)))
    found.change("kind", state, (state, bytes(4)))
    found.change("rule", state + 4, (state + 4, struct.pack("<I", 5)))
    found.twice(state, 24, 8)
    found.change("does not use", state + 16, (state + 4, ONE), (state + 16, ONE))
    found.change("not a flag", flag, (flag, struct.pack("<I", 31)))


def test_an_error_says_where(binary: bytes) -> None:
    """Each kind of damage with its offset; the other reader refuses it too."""
    for what, damaged, offset in damages(binary):
        with pytest.raises(BadInput, match=what) as caught:
            Applied.of(damaged)
        assert caught.value.fields["offset"] == offset, what
        assert verdict(damaged) == "refused"
    altered = bytearray(binary)
    altered[-1] ^= 1
    with pytest.raises(BadInput, match="digest") as caught:
        Applied.of(bytes(altered))
    assert caught.value.fields["offset"] == 32


def test_sizes(binary: bytes) -> None:
    for data, offset in (
        (b"", 0),
        (binary[:159], 159),
        (binary[:-1], len(binary) - 1),
        (binary + b"\0", len(binary)),
        (bytes(limits.CONTRACT_BYTES + 1), limits.CONTRACT_BYTES),
    ):
        with pytest.raises(BadInput) as caught:
            Applied.of(data)
        assert caught.value.fields["offset"] == offset
        assert verdict(data) == "refused"


def test_limits_are_the_headers() -> None:
    assert limits.CONTRACT_BYTES == lib.KVMNEG_CONTRACT_BYTES_MAX
    assert limits.CONTRACT_ENTRIES == (
        lib.KVMNEG_CONTRACT_CPUIDS_MAX,
        lib.KVMNEG_CONTRACT_MSRS_MAX,
        lib.KVMNEG_CONTRACT_REGISTERS_MAX,
        lib.KVMNEG_CONTRACT_CAPABILITIES_MAX,
        lib.KVMNEG_CONTRACT_REGISTERS_MAX,
        lib.KVMNEG_CONTRACT_FLAGS_MAX,
    )


@given(st.data())
def test_both_readers_agree_on_several_changes(data: st.DataObject) -> None:
    """Fields rather than bytes: numbers at the edge of what they may be, entries that trade places."""
    binary = bytearray(CONTRACTS[data.draw(st.sampled_from(sorted(CONTRACTS)))]())
    numbers = st.sampled_from((0, 1, 2, 3, 4, 5, 0x13, 0xFF, 0xFFFF_FFFF, 0x8000_0000))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(binary) // 4 - 1)) * 4
        struct.pack_into("<I", binary, at, data.draw(numbers))
    verdict(sealed(binary))
