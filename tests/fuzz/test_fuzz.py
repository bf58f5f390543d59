# SPDX-License-Identifier: LGPL-2.1-or-later
"""The fuzzers of the reader of contracts and of the C client's replies: their corpus, and a number of runs.

With --long ten minutes each, side by side. What fails is in the folder that the message names; after it is mended it
goes into tests/fuzz/corpus.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CORPUS = Path(__file__).parent / "corpus"
TARGETS = {"contract": 16384, "reply": 8192}
"""Each with the longest input in bytes; real contracts have 7 to 13 KiB."""
RUNS, SECONDS = 20_000, 600
LIMITS = ("-rss_limit_mb=1024", "-malloc_limit_mb=64", "-timeout=60", "-print_final_stats=1")


def build(script: Path, folder: Path) -> Path:
    """The folder with the programs, as tools/fuzz.sh builds them."""
    for tool in ("clang", "pkg-config"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    command = [script, "build", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT / "tools/fuzz.sh", tmp_path_factory.mktemp("fuzz"))


def start(programs: Path, target: str, *arguments: str) -> subprocess.Popen[str]:
    """A fuzzer that puts what it finds into a new folder, beside its messages."""
    folder = programs / f"{target}-found"
    folder.mkdir()
    command = [
        programs / target, *LIMITS, f"-max_len={TARGETS[target]}", f"-dict={CORPUS.parent / target}.dict",
        f"-artifact_prefix={programs}/{target}-", *arguments, folder, CORPUS / target,
    ]  # fmt: skip
    with (programs / f"{target}.log").open("w") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, text=True)


def executed(programs: Path, target: str, process: subprocess.Popen[str]) -> int:
    """Waits; how many inputs it tried. A crash, a leak, too much time or memory fails."""
    code = process.wait()
    text = (programs / f"{target}.log").read_text(errors="replace")
    assert code == 0, text[-8000:]
    found = re.search(r"stat::number_of_executed_units: *(\d+)", text)
    assert found, text[-2000:]
    return int(found[1])


def test_fuzzers(programs: Path, pytestconfig: pytest.Config) -> None:
    """All of the corpus, then inputs made from it: the same ones each time, or with --long ten minutes of new ones."""
    long = pytestconfig.getoption("long")
    how = (f"-max_total_time={SECONDS}",) if long else (f"-runs={RUNS}", "-seed=1")
    running = {target: start(programs, target, *how) for target in TARGETS}
    try:
        tried = {target: executed(programs, target, process) for target, process in running.items()}
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    assert min(tried.values()) >= RUNS


FLAWS = {
    "contract": (
        "csrc/contract-check.c",
        "if (size < expected)",
        "if (size + 4 < expected)",
        "heap-buffer-overflow",
    ),
    "reply": ("client/client.c", "path[0] != '/' ||", "", "not so: "),
}
"""Of each target: a file, what is in it, what would be a mistake, and what is said of it."""


def test_a_mistake_is_found(tmp_path: Path) -> None:
    """A check less in the code: found in no more runs than the test above makes."""
    for folder in ("csrc", "client", "tools", "tests/fuzz"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for name, right, wrong, _said in FLAWS.values():
        text = (tmp_path / name).read_text()
        assert right in text
        (tmp_path / name).write_text(text.replace(right, wrong))
    programs = build(tmp_path / "tools/fuzz.sh", tmp_path / "programs")
    for target, (_name, _right, _wrong, said) in FLAWS.items():
        assert start(programs, target, f"-runs={RUNS}", "-seed=1").wait() != 0
        assert said in (programs / f"{target}.log").read_text(errors="replace")


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_is_small(target: str) -> None:
    files = list((CORPUS / target).iterdir())
    assert len(files) > 20
    assert sum(file.stat().st_size for file in files) < 400_000
    assert max(file.stat().st_size for file in files) <= TARGETS[target]
