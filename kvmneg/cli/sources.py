# SPDX-License-Identifier: LGPL-2.1-or-later
"""Where a command gets its facts: a report file, this host, or the daemon."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from typing import Any

    from kvmneg.cli.arguments import Parser
    from kvmneg.cli.output import Screen
    from kvmneg.features.report import Report
    from kvmneg.policy.contract import Contract

KVM = "/dev/kvm"


def add_report(parser: Parser, instead_of: str) -> None:
    """The option --report."""
    from kvmneg.cli.arguments import file_name

    parser.add_argument(
        "--report", metavar="FILE", type=file_name, help=f"judge this report instead of {instead_of}"
    )


def add_report_or_kvm(parser: Parser, what: str) -> None:
    """The options --report and --kvm, of commands that measure this host; one of them at most."""
    from kvmneg.cli.arguments import file_name

    group = parser.add_mutually_exclusive_group()
    group.add_argument("--report", metavar="FILE", type=file_name, help=what)
    group.add_argument("--kvm", metavar="PATH", default=KVM, help=f"KVM's device ({KVM})")


def report_or_host(arguments: argparse.Namespace) -> Report:
    """The report of --report, or this host measured now. Raises BadInput, NoKvm, KvmFault."""
    if arguments.report:
        from kvmneg.cli import files

        return files.report(arguments.report)
    from kvmneg.host.measure import measure

    return measure(arguments.kvm)


def call(arguments: argparse.Namespace, method: str, **parameters: Any) -> dict[str, Any]:
    """One call to the daemon, parameters that are None left out. Raises Unreachable and what it answers."""
    from kvmneg.client import Client

    given = {key: value for key, value in parameters.items() if value is not None}
    with Client(arguments.socket) as client:
        if _may_ask(arguments):
            from kvmneg.cli import permission  # somebody is there to be asked

            return permission.call(client, method, given)
        found: dict[str, Any] = client.call(method, given)
        return found


def _may_ask(arguments: argparse.Namespace) -> bool:
    """Whether polkit may ask a person: one at a terminal, who is not root, and did not say that it may not."""
    import os

    return getattr(arguments, "ask_password", False) and os.geteuid() != 0 and os.isatty(0)


def daemon_report(arguments: argparse.Namespace) -> Report:
    """The daemon's report of its host. Raises Unreachable, NoKvm, KvmFault."""
    from kvmneg.features.report import Report

    return Report.from_json(call(arguments, "org.kvmneg.GetHost")["host"], file="the daemon's report")


def contract_of_digest(arguments: argparse.Namespace, digest: str) -> tuple[Contract, dict[str, Any]]:
    """A contract that the daemon knows, and its reply. Raises Unreachable, NoSuchContract."""
    from kvmneg.cli import files

    answer = call(arguments, "org.kvmneg.GetContract", digest=full_digest(digest))
    return files.json_contract(answer["contract"], "the daemon's contract"), answer


def is_digest(text: str) -> bool:
    """Whether a text is a digest: 64 hexadecimal digits, "sha256:" before them or not."""
    digits = text.removeprefix("sha256:")
    return len(digits) == 64 and set(digits) <= set("0123456789abcdef")


def full_digest(text: str) -> str:
    """A digest as the daemon writes it."""
    return "sha256:" + text.removeprefix("sha256:")


def label(screen: Screen, report: Report) -> None:
    """Say on the screen what a report is, where it is not this host as KVM answers now."""
    source = report.measured.get("source", "")
    if source != "kvm" and source:
        what = "RECORDED REPORT" if source == "recorded" else f"IMPORTED ({source})"
        when = f", {report.measured['at']}" if report.measured.get("at") else ""
        screen.paragraph(f"{what} ({report.host}{when}), not this host", style="warn")
        if report.measured.get("note"):
            screen.paragraph(str(report.measured["note"]), indent=2, style="warn")


def snake(document: dict[str, Any]) -> dict[str, Any]:
    """A reply's fields as documents spell them: fenceDigest becomes fence_digest."""
    return {
        "".join(f"_{c.lower()}" if c.isupper() else c for c in key): value for key, value in document.items()
    }


def fence_source(source: str) -> tuple[str | None, str | None]:
    """(what the daemon resolves, None), or (None, the text of a file). Raises BadInput, UsageError."""
    if source in ("host", "baseline") or source.startswith(("level:", "platform:")):
        return source, None
    from kvmneg.cli import files
    from kvmneg.policy.fence_text import Fence

    found = files.document(source)
    if found.fence is not None:
        return None, files.fence_text(files.read(source), source)
    return None, Fence(found.granted).text()
