# SPDX-License-Identifier: LGPL-2.1-or-later
"""Build-time only: what bash or zsh completes, from the commands' own parsers. Prints the file; meson runs it.

generate.py bash|zsh kvmneg|kvmnegd NAMES...

Each of NAMES is a compiled catalogue's _ARCHITECTURE_names.py. Words that are known when this is built are completed
(commands, options, levels, features), and files; what only a daemon knows is not asked for at a press of a key.
"""

from __future__ import annotations

import argparse
import re
import runpy
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import shtab

if __name__ == "__main__":  # no bytecode beside the sources; kvmneg is not installed while it is being built
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from kvmneg.cli import COMMANDS, arguments, command_module
from kvmneg.policy import definitions
from kvmneg.policy.pinning import SOURCES
from kvmneg.service import options

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

# What an argument is, by what its help calls it. For what is not here nothing is completed.
_FILES = frozenset(("FILE", "PATH", "REPORT", "DIGEST|FILE", "FILE|DIGEST", "COMBO|OLD"))
_OF_METAVAR = {
    **dict.fromkeys(_FILES, shtab.FILE),
    "DIR": shtab.DIRECTORY,
    "F,…": {"bash": "_kvmneg_features", "zsh": "_kvmneg_features"},
    "SOURCE": {"bash": "_kvmneg_source_or_file", "zsh": "_kvmneg_source_or_file"},
}
_HOST_OR_FILE = {"bash": "_kvmneg_host_or_file", "zsh": "_kvmneg_host_or_file"}

# A list of names with commas between: the last of them is completed, behind those that stand there already. Words that
# are not files stand beside them where either may be given.
_FUNCTIONS = {
    "bash": """\
_kvmneg_features() {{
  local before= last=$1 IFS=' '
  case $1 in *,*) before=${{1%,*}}, last=${{1##*,}} ;; esac
  compgen -P "$before" -W '{features}' -- "$last"
}}
_kvmneg_source_or_file() {{
  local IFS=' '
  compgen -W '{sources}' -- "$1"
  compgen -f -- "$1"
}}
_kvmneg_host_or_file() {{
  compgen -W host -- "$1"
  compgen -f -- "$1"
}}""",
    "zsh": """\
_kvmneg_features() {{
  local -a names=({features})
  _sequence -s , compadd - $names
}}
_kvmneg_source_or_file() {{
  local -a names=({sources})
  _alternative 'sources:source:compadd -a names' 'files:file:_files'
}}
_kvmneg_host_or_file() {{
  _alternative 'hosts:host:(host)' 'files:file:_files'
}}""",
}

# Readline breaks words at : and =, which is not what they mean: "level:x86-64-v2" is one word, "--level=x86-64-v2" two.
# What stands before the last : is there already.
_WORDS = """
_{program}() {{
  local word glue=''
  local -a words=("${{COMP_WORDS[0]}}")
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD}}"; do
    if [[ $word == : ]]; then
      words[-1]+=:
      glue=yes
    elif [[ $glue == yes ]]; then
      words[-1]+=$word
      glue=''
    elif [[ $word == = && ${{words[-1]}} == --* ]]; then
      glue=option
    else
      words+=("$word")
      glue=''
    fi
  done
  [[ $glue == option ]] && words+=('')
  local -a COMP_WORDS=("${{words[@]}}")
  local COMP_CWORD=$((${{#words[@]}} - 1)) last=${{words[-1]}}
  _shtab_{program} "$@"
  if [[ $last == *:* && $COMP_WORDBREAKS == *:* ]]; then
    COMPREPLY=("${{COMPREPLY[@]#"${{last%"${{last##*:}}"}}"}}")
  fi
}}

complete -o bashdefault -F _{program} {program}
"""


def kvmneg() -> argparse.ArgumentParser:
    """One parser of all commands; the program itself makes only that of the one it runs."""
    parser = arguments.Parser(prog="kvmneg")
    parser.common()
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    commands = parser.add_subparsers(metavar="COMMAND")
    for name, (_module, what) in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        command.common()
        command_module(name).options(command)
    return parser


def kvmnegd() -> argparse.ArgumentParser:
    """A parser with the options of its help, in the place of getopt, which names them only."""
    parser = argparse.ArgumentParser(prog="kvmnegd", add_help=False)
    for name, value, what in re.findall(r"^  (--[a-z-]+)(?: ([A-Z]+))? +(.*)$", options.HELP, re.MULTILINE):
        if value:
            parser.add_argument(name, metavar=value, help=what)
        else:
            parser.add_argument(name, action="store_true", help=what)
    return parser


def annotate(parser: argparse.ArgumentParser) -> None:
    """Say what each argument is, in shtab's words."""
    for prog, action in actions(parser):
        choices = _choices(action)
        kind = _OF_METAVAR.get(str(action.metavar))
        if prog == "kvmneg compare" and action.metavar in ("A", "B"):
            kind = _HOST_OR_FILE
        if choices:
            action.choices = choices
        elif kind and not action.choices:
            action.complete = kind  # type: ignore[attr-defined]


def _choices(action: argparse.Action) -> tuple[str, ...]:
    """The words of an option that more than one table knows: of a VMM a version may follow."""
    if "--level" in action.option_strings:
        return definitions.available("levels")
    if "--vmm" in action.option_strings:
        return definitions.available("vmms")
    if "--bus" in action.option_strings:
        return ("system",)
    return ()


def actions(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.Action]]:
    """All arguments of a parser and of the parsers below it, each with its command."""
    for action in parser._actions:
        yield parser.prog, action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from actions(below)


def features(files: Iterable[str]) -> list[str]:
    """The features and controls of the compiled catalogues, by name."""
    tables: list[dict[str, Any]] = [runpy.run_path(file) for file in files]
    return sorted({row[0] for table in tables for row in (*table["FEATURES"], *table["CONTROLS"])})


def sources() -> list[str]:
    """What a fence can be made from, beside files."""
    kinds = {"level:NAME": "levels", "platform:NAME": "platforms"}
    return [
        source.replace("NAME", name)
        for source in SOURCES
        for name in (definitions.available(kinds[source]) if source in kinds else ("",))
    ]


def _mended(text: str) -> str:
    """What shtab leaves out for zsh: that a value may follow after "=", and that of several files each is one."""
    valued = re.sub(r'^( +(?:"\*")?"--[a-z-]+)(\[.*\]:)', r"\1=\2", text, flags=re.MULTILINE)
    return re.sub(r'^( +")\(\*\)::?', r"\1*:", valued, flags=re.MULTILINE)


def main() -> None:
    shell, program, *catalogues = sys.argv[1:]
    parser = {"kvmneg": kvmneg, "kvmnegd": kvmnegd}[program]()
    annotate(parser)
    functions = ""
    if program == "kvmneg":
        words = {"features": " ".join(features(catalogues)), "sources": " ".join(sources())}
        functions = _FUNCTIONS[shell].format_map(words)
    text = shtab.complete(parser, shell=shell, preamble={shell: functions})
    text = text + "\n" + _WORDS.format(program=program) if shell == "bash" else _mended(text)
    sys.stdout.buffer.write(text.encode("utf-8") + b"\n")


if __name__ == "__main__":
    main()
