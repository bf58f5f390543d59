# SPDX-License-Identifier: LGPL-2.1-or-later
"""Emulated hosts by hand.

    python -m tests.hosts list
    python -m tests.hosts build [HOST[:CPU] …]          fetch what a host needs, boot it, and make its snapshot;
                                                        "few": those of `make test`
    python -m tests.hosts run HOST [--cpu MODEL] -- COMMAND …
    python -m tests.hosts shell HOST
    python -m tests.hosts record HOST [--cpu MODEL]     write the host's report into tests/data/hosts

COMMAND runs in /job, where kvmneg/ and tests/ of this project are and PYTHONPATH points; `python3 -m pytest …`
and `python3 -m kvmneg.cli …` work. What it leaves in /job/out is put into --out. Exits as COMMAND does.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ..packages.errors import PackageError
from . import bochs, catalogue, machine, project, recording, start
from .errors import HostError
from .job import Job, Result


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tests.hosts", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("list")
    build = verbs.add_parser("build")
    build.add_argument("host", nargs="*")
    for name in ("run", "shell", "record"):
        verb = verbs.add_parser(name)
        verb.add_argument("host")
        verb.add_argument("--cpu", default="")
        verb.add_argument(
            "--qemu", default="", help="an unpacked QEMU of this version, not the installed one"
        )
        if name == "record":
            verb.add_argument("--to", type=Path, help="the report's file")
            verb.add_argument("--name", default="", help="the host's name in it")
        if name == "run":
            verb.add_argument("--seconds", type=float, default=120.0, help="the command's time limit")
            verb.add_argument("--boot", action="store_true", help="boot it, do not restore its snapshot")
            verb.add_argument("--out", type=Path, help="where files of /job/out are put")
            verb.add_argument(
                "--file", action="append", default=[], help="PATH or PATH=NAME: a file to have in /job"
            )
            verb.add_argument("--timing", action="store_true", help="say how long each step took")
            verb.add_argument("command", nargs="+")
    return parser.parse_args()


def _list() -> int:
    for host in catalogue.hosts():
        sys.stdout.write(
            f"{host.name:<14} {host.architecture}, Linux {host.kernel} of {host.suite}, {host.emulator}, {host.cpu}\n"
        )
    return 0


def _build(names: list[str]) -> int:
    if not names:
        names = [host.name for host in catalogue.hosts()]
    for name in catalogue.FEW if names == ["few"] else names:
        host, _, cpu = name.partition(":")
        built = start.Built(catalogue.find(host, cpu))
        if built.host.emulator == "qemu":
            start.snapshot(built)
        sys.stdout.write(f"{name}: Linux {built.kernel.release}\n")
    return 0


def _show(kind: str, data: bytes) -> None:
    stream = sys.stdout if kind == "out" else sys.stderr
    stream.buffer.write(data)
    stream.flush()


def _run(given: argparse.Namespace) -> int:
    times = [time.monotonic()]
    host = catalogue.find(given.host, given.cpu, given.qemu)
    files = project.files(host.architecture)
    for word in given.file:
        path, _, name = word.partition("=")
        files[name or Path(path).name] = Path(path).read_bytes()
    job = Job(given.command, files, project.ENVIRONMENT, given.seconds)
    if host.emulator == "bochs":
        return _leave(bochs.run(host, job, _show), given)
    built = start.Built(host)
    times.append(time.monotonic())
    with (start.booted if given.boot else start.restored)(built) as host_machine:
        times.append(time.monotonic())
        result = host_machine.run(job, _show)
    times.append(time.monotonic())
    if given.timing:
        steps = zip(("build", "boot", "job"), times, times[1:], strict=False)
        sys.stderr.write(", ".join(f"{name} {to - since:.2f} s" for name, since, to in steps) + "\n")
    return _leave(result, given)


def _leave(result: Result, given: argparse.Namespace) -> int:
    """Put the files where they are wanted; the exit status."""
    for name, content in result.files.items() if given.out else ():
        target = given.out / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    return result.status


def _shell(given: argparse.Namespace) -> int:
    built = start.Built(catalogue.find(given.host, given.cpu, given.qemu))
    with built.files() as files:
        return machine.interactive(built.host, files)


def main() -> int:
    sys.path.append(sys.path.pop(0))  # the current folder last: kvmneg is the built one
    given = _arguments()
    try:
        if given.verb == "list":
            return _list()
        if given.verb == "build":
            return _build(given.host)
        if given.verb == "record":
            host = catalogue.find(given.host, given.cpu, given.qemu)
            sys.stdout.write(f"{recording.write(host, given.to, given.name)}\n")
            return 0
        return _run(given) if given.verb == "run" else _shell(given)
    except (HostError, PackageError) as error:
        sys.stderr.write(f"{error}\n")
        return 125


if __name__ == "__main__":
    sys.exit(main())
