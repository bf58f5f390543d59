# SPDX-License-Identifier: LGPL-2.1-or-later
"""The files a command reads: reports, contracts (binary or JSON) and fences, told apart by their content."""

from __future__ import annotations

import errno
import os
import stat
import sys

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features.featureset import FeatureSet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.features.report import Report
    from kvmneg.policy.contract import Contract
    from kvmneg.policy.fence_text import Fence

_HINTS = {
    errno.ENOENT: "is the name right?",
    errno.EACCES: "it may not be read by this user",
    errno.EISDIR: "name a file in it",
}


_read: dict[str, bytes] = {}  # standard input and pipes, by name: they cannot be read again


def read(path: str, limit: int = limits.REPORT_BYTES) -> bytes:
    """A file's bytes ("-": standard input), at most one more than `limit`. Raises BadInput."""
    try:
        if path == "-":
            if path not in _read:
                _read[path] = sys.stdin.buffer.read(limit + 1)
            return _read[path]
        if path in _read:
            return _read[path]
        with open(path, "rb") as file:
            data = file.read(limit + 1)
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                _read[path] = data
            return data
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "")
        raise BadInput(f"cannot be read: {error.strerror}", file=path, hint=hint) from None
    except ValueError as error:  # a NUL in the name
        raise BadInput(f"cannot be read: {error}", file=repr(path)) from None


def report(path: str) -> Report:
    """A report file. Raises BadInput."""
    from kvmneg.features.report import Report

    data = read(path)
    try:
        if data.startswith(b"KVMNEGC\0"):
            raise BadInput("a contract, not a report", file=path)
        return Report.loads(data, file=path)
    except BadInput as error:
        error.hint = error.hint or "`kvmneg host --json` writes reports"
        raise


class Document:
    """A file of any kind: `kind` ("report", "contract", "fence"), what it offers or grants, whose it is."""

    __slots__ = ("accept", "contract", "fence", "granted", "kind", "path", "report")

    def __init__(
        self,
        path: str,
        *,
        report: Report | None = None,
        contract: Contract | None = None,
        fence: Fence | None = None,
    ) -> None:
        self.path = path
        self.report = report
        self.contract = contract
        self.fence = fence
        self.kind = "report" if report else "contract" if contract else "fence"
        part = contract or fence
        self.granted: FeatureSet = (
            part.granted if part else report.offer if report else FeatureSet.empty("x86_64")
        )
        self.accept: FeatureSet = report.accept if report else self.granted

    @property
    def title(self) -> str:
        """What people call it: the host of a report, the file of anything else."""
        return f"{self.report.host} ({self.path})" if self.report else self.path


def document(path: str) -> Document:
    """A report, a contract or a fence. Raises BadInput naming the file for anything else."""
    data = read(path)
    if data.startswith(b"KVMNEGC\0"):
        return Document(path, contract=binary_contract(data, path))
    if data.lstrip()[:1] in (b"{", b"["):
        return _json_document(data, path)
    from kvmneg.policy.fence_text import Fence

    return Document(path, fence=Fence.parse(fence_text(data, path), file=path))


def fence_text(data: bytes, path: str) -> str:
    """The text of a fence file. Raises BadInput where it is not UTF-8 or too large."""
    if len(data) > limits.FENCE_BYTES:
        raise BadInput(f"larger than {limits.FENCE_BYTES} bytes", file=path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise BadInput(
            "not a text", file=path, line=line, hint="a report, a contract or a fence is expected"
        ) from None


def binary_contract(data: bytes, path: str) -> Contract:
    """A contract's binary form. Raises BadInput."""
    from kvmneg.policy.contract import Contract

    if len(data) > limits.CONTRACT_BYTES:
        raise BadInput(f"larger than {limits.CONTRACT_BYTES} bytes", file=path)
    return Contract.from_binary(data, file=path)


def _json_document(data: bytes, path: str) -> Document:
    from kvmneg.features.report import Report, parse_json

    parsed = parse_json(data, file=path, limit=limits.REPORT_BYTES)
    found = parsed.get("format") if isinstance(parsed, dict) else None
    if isinstance(parsed, dict) and isinstance(found, str) and found.startswith("kvmneg.contract/"):
        return Document(path, contract=json_contract(parsed, path))
    if isinstance(parsed, dict) and isinstance(
        parsed.get("contract"), dict
    ):  # what `kvmneg negotiate --json` prints
        return Document(path, contract=json_contract(parsed["contract"], path))
    if isinstance(found, str) and found.startswith("kvmneg.study/"):
        raise BadInput("a study over several vendors: nothing is pinned or negotiated by it", file=path)
    return Document(path, report=Report.from_json(parsed, file=path))


def json_contract(document: object, path: str) -> Contract:
    """A contract from its JSON view. Raises BadInput, also where its digest does not fit the rest."""
    from kvmneg.policy.contract import Contract

    return Contract.from_json(document, file=path)
