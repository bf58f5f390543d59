# SPDX-License-Identifier: LGPL-2.1-or-later
"""A report from a file in the place of a measurement: to try kvmnegd where there is no KVM."""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features.report import Report


class RecordedMeasurer:
    """Always measures what the file says. Raises BadInput where it cannot be read or is no report."""

    def __init__(self, file: str) -> None:
        try:
            with open(file, "rb") as opened:
                self._report = Report.loads(opened.read(limits.REPORT_BYTES + 1), file=file)
            # whatever wrote the file: here it is not measured
            self._report.measured["source"] = "recorded"
        except OSError as error:
            raise BadInput(f"cannot read it: {error.strerror}", file=file) from None

    def measure(self) -> Report:
        return self._report

    def changed(self, *, fresh: bool = False) -> bool:
        return False
