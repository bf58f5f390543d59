# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a saved guest holds, kept beside its image, and whether it may be restored on a host. Pure.

    {"format": "kvmneg.image/1", "vm": UUID, "contract": kvmneg.contract/1, "holds": {word: value, …} or null,
     "bytes": size of the image when it was tagged, "sample": digest of parts of it}

`holds` are the words that the guest's VMM reported, null where it keeps to the contract. An image without such a
document is unknown: what a guest inside has seen cannot be read from it.
"""

from __future__ import annotations

from kvmneg.errors import BadInput
from kvmneg.features import words
from kvmneg.features.featureset import FeatureSet
from kvmneg.policy import contract_json, negotiation
from kvmneg.policy.contract import Contract
from kvmneg.records import NamedTuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kvmneg.features.difference import Blocker
    from kvmneg.features.report import Report

FORMAT = "kvmneg.image/1"


class Image(NamedTuple):
    """A tagged image: its VM, the contract, the set that counts, how large it was (bytes), a digest of parts of it.

    `sample` tells one guest's memory from another's of the same size; "" where none was taken.
    """

    vm: str
    contract: Contract
    holds: FeatureSet
    size: int
    sample: str = ""

    def to_json(self) -> dict[str, Any]:
        """The document that lies beside the image."""
        kept = self.holds == self.contract.granted
        return {
            "format": FORMAT,
            "vm": self.vm,
            "bytes": self.size,
            "contract": self.contract.to_json(),
            "holds": None if kept else self.holds.to_json(),
            "sample": self.sample or None,
        }

    @classmethod
    def from_json(cls, document: object, *, file: str = "image") -> Image:
        """Raises BadInput."""
        found = contract_json.fields(document, file)
        if found.get("format") != FORMAT:
            raise BadInput(f"not a document of format {FORMAT}", file=file)
        vm, size, holds = found.get("vm"), found.get("bytes"), found.get("holds")
        if not isinstance(vm, str) or type(size) is not int or size < 0:
            raise BadInput("vm or bytes is missing", file=file)
        sample = found.get("sample") or ""
        if not isinstance(sample, str):
            raise BadInput("sample is no text", file=file)
        contract = Contract.from_json(found.get("contract"), file=file)
        kept = contract.granted if holds is None else _set(contract, holds, file)
        return cls(vm, contract, kept, size, sample)


def _set(contract: Contract, holds: object, file: str) -> FeatureSet:
    if not isinstance(holds, dict):
        raise BadInput("holds is no object", file=file)
    return reported(contract.architecture, holds)


def reported(architecture: str, given: Mapping[str, str]) -> FeatureSet:
    """The set a VMM says it has set, word by word. Raises BadInput for an unknown word or no value."""
    values = {word: words.parse_value(words.check(word), text) for word, text in given.items()}
    return FeatureSet.of(architecture, values)


def judge(image: Image, report: Report, vmm: str | None = None) -> list[Blocker]:
    """Why the guest may not be restored on the host of a report; empty where it may. Judges the accept set.

    Raises UsageError for a VMM of an unknown name.
    """
    blockers = list(negotiation.check(image.contract, report, vmm))
    if image.holds != image.contract.granted:
        named = {(blocker.word, blocker.feature) for blocker in blockers}
        more = negotiation.accepts(image.holds, report, vmm, portable=image.contract.portable)
        blockers += [one for one in more if (one.word, one.feature) not in named]
    return blockers
