# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of kvmnegd(8). By getopt: argparse would be a tenth of the time to the first reply."""

from __future__ import annotations

import getopt
import sys
from typing import NamedTuple

from kvmneg import __version__
from kvmneg.errors import UsageError

DEFAULT_SOCKET = "/run/kvmneg/org.kvmneg"
DEFAULT_STATE = "/var/lib/kvmneg"
DEFAULT_KVM = "/dev/kvm"

HELP = f"""\
usage: kvmnegd [--socket PATH] [--state DIR] [--kvm PATH | --report FILE] [--bus ADDRESS]

negotiates what virtual machines may see of this host's KVM

  --socket PATH  serve here ({DEFAULT_SOCKET}); an inherited socket comes first
  --state DIR    keep fence and grants here ({DEFAULT_STATE})
  --kvm PATH     measure this KVM ({DEFAULT_KVM})
  --report FILE  serve a recorded report and measure nothing
  --bus ADDRESS  serve D-Bus there too, and ask polkit; "system" is the system's bus
  --help         show this and exit
  --version      show the version and exit
"""


class Options(NamedTuple):
    """What kvmnegd was started with; `report` is None where a KVM is measured, `bus` without D-Bus."""

    socket: str = DEFAULT_SOCKET
    state: str = DEFAULT_STATE
    kvm: str = DEFAULT_KVM
    report: str | None = None
    bus: str | None = None


def parse(words: list[str]) -> Options:
    """The options of a command line. Raises UsageError; --help and --version print and exit."""
    takes = [f"{name}=" for name in Options._fields]
    try:
        given, rest = getopt.gnu_getopt(words, "", [*takes, "help", "version"])
    except getopt.GetoptError as error:
        raise UsageError(str(error), hint="see kvmnegd --help") from None
    if rest:
        raise UsageError(f"{rest[0]!r} is no option", hint="see kvmnegd --help")
    values = {option.removeprefix("--"): value for option, value in given}
    for name, text in (("help", HELP), ("version", f"kvmnegd {__version__}\n")):
        if name in values:
            sys.stdout.write(text)
            sys.exit(0)
    empty = [name for name, value in values.items() if not value]
    if empty:
        raise UsageError(f"--{empty[0]} needs a value", hint="see kvmnegd --help")
    if "kvm" in values and "report" in values:
        raise UsageError("--kvm and --report exclude each other", hint="a recorded report measures nothing")
    return Options(**values)
