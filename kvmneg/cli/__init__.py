# SPDX-License-Identifier: LGPL-2.1-or-later
"""The command line, kvmneg(1): one module for each command, and only the asked one is imported.

A command's module has `options(parser)`, which adds its options, and `run(arguments)`, which returns the exit
status. Errors of kvmneg's family leave by their own exit code; anything else is a bug: traceback and 70.
"""

from __future__ import annotations

import os
import sys

from kvmneg.errors import KvmnegError, StoreError, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType

SOCKET = "/run/kvmneg/org.kvmneg"
INTERNAL = 70
INTERRUPTED = 130
BROKEN_PIPE = 141

# command: (module, what it does)
COMMANDS = {
    "host": ("host", "what this host's KVM offers to guests"),
    "features": ("features", "the features kvmneg knows, and which of them this host has"),
    "explain": ("explain", "what a feature is, and who holds it back here and in a pool"),
    "negotiate": ("negotiate", "ask for a contract: what may this guest see?"),
    "check": ("check", "may a guest with these features, or this contract, come to this host?"),
    "baseline": ("baseline", "what all hosts of a pool offer, and who holds what back"),
    "compare": ("compare", "what differs between two reports, contracts or fences"),
    "fence": ("fence", "show, plan, pin, raise, lower or take down the fence; its history"),
    "contract": ("contract", "show a contract by its digest"),
    "vm": ("vm", "take an offer for a VM; say that the VM runs, is saved, moves, or is gone"),
    "guests": ("guests", "what the guests of this host hold; take an unknown one on, or waive it"),
    "image": ("image", "keep what a guest holds beside its saved image; may it be restored here?"),
    "rollback": (
        "rollback",
        "may this host go back to what it was, with its guests? to which combos is it to?",
    ),
    "history": ("history", "the combos this host was ever measured under"),
    "diff": ("diff", "what differs between two of these combos"),
    "migrate": ("migrate", "may a guest move to another host?"),
    "watch": ("watch", "follow generation and state"),
    "verify": ("verify", "run guests: do they see what they are to see, and nothing else?"),
    "import": ("importing", "turn another tool's output into a report"),
}
# Options that may stand before the command too; those with True take a value.
_GLOBAL = {"--socket": True, "--json": False, "--no-ask-password": False}


def command_module(command: str) -> ModuleType:
    """The module of a command."""
    from importlib import import_module

    return import_module(f"kvmneg.cli.{COMMANDS[command][0]}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status (kvmneg(1), EXIT STATUS)."""
    _open_what_is_closed()
    words = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in words
    try:
        status = _run(words)
        sys.stdout.flush()
    except KvmnegError as error:
        status = _fail(error, as_json)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = BROKEN_PIPE
        silence_output()
    except OSError as error:
        if error.filename is not None or not _output_is_full(error):
            status = _bug(error, as_json)
        else:
            silence_output()
            status = _fail(StoreError(f"cannot write the output: {error.strerror}"), False)
    except Exception as error:
        status = _bug(error, as_json)
    return status


def _run(words: list[str]) -> int:
    before: list[str] = []
    while words and words[0].startswith("-"):
        word = words.pop(0)
        name, equals, _value = word.partition("=")
        if word in ("-h", "--help"):
            _print_help()
            return 0
        if word == "--version":
            from kvmneg import __version__

            print(f"kvmneg {__version__}")
            return 0
        if name not in _GLOBAL or (equals and not _GLOBAL[name]):
            raise UsageError(
                f"unknown option {word}", hint="options of a command come after it; see kvmneg --help"
            )
        before.append(word)
        if _GLOBAL[name] and not equals:
            if not words:
                raise UsageError(f"{word} needs a value")
            before.append(words.pop(0))
    if not words:
        raise UsageError("no command", hint=f"one of {', '.join(COMMANDS)}; see kvmneg --help")
    command = words.pop(0)
    if command not in COMMANDS:
        raise UsageError(f"no command is called {command!r}", hint=f"there are {', '.join(COMMANDS)}")
    from kvmneg.cli.arguments import parser_of

    try:
        arguments = parser_of(command).parse_args([*before, *words])
    except SystemExit:
        return 0  # --help: mistakes are UsageError
    status: int = arguments.run(arguments)
    return status


def _print_help() -> None:
    from kvmneg.cli.output import Screen

    screen = Screen()
    screen.paragraph("usage: kvmneg [--socket PATH] [--json] [--no-ask-password] COMMAND …")
    screen.line()
    screen.paragraph("Negotiate which CPU and KVM features a guest may see, so that it can still move.")
    screen.line()
    for command, (_module, what) in COMMANDS.items():
        screen.words(command, what.split(" "), column=2 + max(map(len, COMMANDS)) + 2)
    screen.line()
    screen.paragraph("`kvmneg COMMAND --help` tells a command's options, kvmneg(1) the rest.")


def _open_what_is_closed() -> None:
    """Standard streams that the caller closed become /dev/null: no file or socket may get their numbers."""
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            nowhere = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is its own
            setattr(sys, name, os.fdopen(nowhere, "r" if name == "stdin" else "w", encoding="utf-8"))


def _fail(error: KvmnegError, as_json: bool) -> int:
    """Tell an error as the caller wants it; returns its exit code."""
    try:
        if as_json:
            from kvmneg.cli.output import print_json

            print_json(failure(error))
            sys.stdout.flush()
        else:
            sys.stdout.flush()
            _explain(error)
    except BrokenPipeError:
        silence_output()
    except OSError as full:
        silence_output()
        _explain_somehow(error, full)
    return error.exit_code


def _explain_somehow(error: KvmnegError, full: OSError) -> None:
    """A failure whose words found no room: what went wrong first, and why that is not where it belongs."""
    try:
        sys.stderr.write(f"kvmneg: {error.message}\nkvmneg: cannot write the output: {full.strerror}\n")
    except OSError:
        # No room on standard error either: the exit status is left, and it must survive the interpreter's own
        # attempt to write out what lies in the buffer (Python makes 120 of that).
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def failure(error: KvmnegError) -> dict[str, object]:
    """What `--json` prints for any failure: {"error": {"name", "message", "hint", …}, "blockers": […]}."""
    fields = {key: value for key, value in error.parameters().items() if key != "blockers"}
    blockers = [blocker.to_json() for blocker in getattr(error, "blockers", ())]
    name = fields.pop("varlink", None) or error.varlink  # of an error that only varlink has a name for
    return {"error": {"name": name, **fields}, "blockers": blockers}


def _explain(error: KvmnegError) -> None:
    from kvmneg.cli.output import Screen

    screen = Screen(sys.stderr)
    screen.line(f"kvmneg: {error.message}")
    screen.blockers(getattr(error, "blockers", ()))
    for row in error.fields.get("hosts") or ():
        screen.words("", f"{row['host']}: {row['because']}".split(" "), column=2)
    if error.fields.get("guests"):
        from kvmneg.cli.fence_levels import guest_cells

        screen.table([guest_cells(row) for row in error.fields["guests"]])
    if error.hint:
        screen.line(screen.dim(f"  {error.hint}"))


def _bug(error: Exception, as_json: bool) -> int:
    import traceback  # only for a bug

    traceback.print_exception(error)
    if as_json:
        _fail(
            KvmnegError(f"internal error: {error!r}", hint="this is a bug of kvmneg's; please report it"),
            True,
        )
    return INTERNAL


def _output_is_full(error: OSError) -> bool:
    import errno

    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def silence_output() -> None:
    """Nobody reads standard output any more: what is still buffered must not fail again at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(nowhere, 1)
    os.close(nowhere)
