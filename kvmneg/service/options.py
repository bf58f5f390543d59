# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line of kvmnegd(8). By getopt: argparse would be a tenth of the time to the first reply."""

from __future__ import annotations

import getopt
import os
import sys

from kvmneg import __version__
from kvmneg.errors import UsageError
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.service.settings import Settings

DEFAULT_SOCKET = "/run/kvmneg/org.kvmneg"
DEFAULT_STATE = "/var/lib/kvmneg"
DEFAULT_KVM = "/dev/kvm"
DEFAULT_CONFIG = "/etc/kvmneg/kvmneg.toml"

_TAKE_VALUES = ("socket=", "state=", "kvm=", "report=", "bus=", "config=")

HELP = f"""\
usage: kvmnegd [--socket PATH] [--state DIR] [--kvm PATH | --report FILE] [--bus ADDRESS] [--config FILE]
       kvmnegd --check [--config FILE]

negotiates what virtual machines may see of this host's KVM

  --socket PATH  serve here ({DEFAULT_SOCKET}); an inherited socket comes first
  --state DIR    keep fence and grants here ({DEFAULT_STATE})
  --kvm PATH     measure this KVM ({DEFAULT_KVM})
  --report FILE  serve a recorded report and measure nothing
  --bus ADDRESS  serve D-Bus there too, and ask polkit; "system" is the system's bus
  --config FILE  read settings here ({DEFAULT_CONFIG}); options come first
  --check        only say whether that file can be used
  --help         show this and exit
  --version      show the version and exit
"""


class Options(NamedTuple):
    """What kvmnegd was started with.

    `report` is None where a KVM is measured, `bus` without D-Bus, `settings` where there is no file.
    """

    socket: str = DEFAULT_SOCKET
    state: str = DEFAULT_STATE
    kvm: str = DEFAULT_KVM
    report: str | None = None
    bus: str | None = None
    config: str = DEFAULT_CONFIG
    check: bool = False
    settings: Settings | None = None


def parse(words: list[str]) -> Options:
    """The options of a command line, and below them the settings of the file. --help and --version print and exit.

    Raises UsageError; BadInput of the file.
    """
    try:
        given, rest = getopt.gnu_getopt(words, "", [*_TAKE_VALUES, "check", "help", "version"])
    except getopt.GetoptError as error:
        raise UsageError(str(error), hint="see kvmnegd --help") from None
    if rest:
        raise UsageError(f"{rest[0]!r} is no option", hint="see kvmnegd --help")
    values = {option.removeprefix("--"): value for option, value in given}
    for name, text in (("help", HELP), ("version", f"kvmnegd {__version__}\n")):
        if name in values:
            sys.stdout.write(text)
            sys.exit(0)
    check = values.pop("check", None) is not None
    empty = [name for name, value in values.items() if not value]
    if empty:
        raise UsageError(f"--{empty[0]} needs a value", hint="see kvmnegd --help")
    if "kvm" in values and "report" in values:
        raise UsageError("--kvm and --report exclude each other", hint="a recorded report measures nothing")
    settings = _settings(values, check=check)
    if settings is not None:
        found = {"socket": settings.socket, "state": settings.state}
        values = {name: value for name, value in found.items() if value} | values
    return Options(**values, check=check, settings=settings)


def _settings(values: dict[str, str], *, check: bool) -> Settings | None:
    """Those of the file; where it was named it has to be there."""
    file = values.get("config", DEFAULT_CONFIG)
    if "config" not in values and not os.path.lexists(file):
        return None
    from kvmneg.service import settings  # tomllib costs 5 ms: for who has a file

    found = settings.load(file, groups=check)
    if found is None and "config" in values:
        raise UsageError(f"there is no file {file}", hint="see kvmneg.toml(5)")
    return found
