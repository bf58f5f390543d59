# SPDX-License-Identifier: LGPL-2.1-or-later
"""This project's tests, run by pytest inside a host."""

from __future__ import annotations

import os
import shlex
from typing import NamedTuple

from .. import summary
from . import project, recording, start
from .catalogue import Host
from .errors import HostError
from .job import Job, Result

SECONDS = 600.0
_SUMMARY = "/job/out/summary.json"
_REPORT_FIRST = f'{shlex.join(recording.COMMAND)} >out/report.json && exec "$@"'


class Inside(NamedTuple):
    """What became of it: `part` for the summary, None where pytest came to no end."""

    result: Result
    part: summary.Part | None

    def tail(self, size: int = 6000) -> str:
        """The end of what pytest printed."""
        return (self.result.stdout + self.result.stderr).decode("utf-8", "replace")[-size:]


def run(
    host: Host,
    *words: str,
    seconds: float = SECONDS,
    extra: dict[str, bytes] | None = None,
    report: bool = False,
) -> Inside:
    """`pytest WORDS` in /job of a host. `extra` are more files. A skip is judged there as it is here.

    `report`: the host is measured first, which is in `result.files["report.json"]`; one boot under Bochs takes minutes.

    A host whose kernel panics is tried once more, and its part says so: an emulator errs by chance (machine.py keeps
    clear of one such error), and what our own calls do to a kernel, they do again. Raises HostError where the host,
    not a test, fails.
    """
    environment = {**project.ENVIRONMENT, summary.VARIABLE: _SUMMARY, "CI": os.environ.get("CI", "")}
    environment["PATH"] = "/job/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    # No cache: it goes with the host. Plain assertions are rewritten as outside.
    argv = ["python3", "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    if report:
        argv = ["sh", "-c", _REPORT_FIRST, "sh", *argv]
    files = {**project.files(host.architecture), **(extra or {})}
    job = Job(argv, files, environment, seconds)
    try:
        result, again = start.run(host, job), ""
    except HostError as error:
        if not error.panicked:
            raise
        result, again = start.run(host, job), " (second try: its kernel had panicked)"
    data = result.files.get("summary.json")
    part = summary.read(data, host.name) if data else None
    return Inside(result, part._replace(kind=part.kind + again) if part else None)
