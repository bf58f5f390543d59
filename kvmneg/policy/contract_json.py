# SPDX-License-Identifier: LGPL-2.1-or-later
"""Reading a contract's JSON view: words with their masks, the fence. Pure; kvmneg.policy.contract seals it."""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import BadInput
from kvmneg.features import words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def every_bit(word: str) -> int:
    """The mask of a whole word."""
    return (1 << words.width(word)) - 1


def fields(found: object, file: str) -> dict[str, Any]:
    """The document as an object. Raises BadInput."""
    if isinstance(found, dict):
        return found
    raise BadInput("not a contract", file=file)


def bound(values: object, masks: object) -> dict[str, tuple[int, int]]:
    """(value, mask) of each word of a document. Raises BadInput."""
    if not isinstance(values, dict) or not isinstance(masks, dict | None):
        raise BadInput("not a contract: words or masks is missing or no object")
    if len(values) > limits.WORDS:
        raise BadInput(f"more than {limits.WORDS} words")
    masks = masks or {}
    alone = sorted(set(masks) - set(values))
    if alone:
        raise BadInput(f"a mask without its word: {words.brief(alone[0])}")
    found: dict[str, tuple[int, int]] = {}
    for word, text in values.items():
        value = words.parse_value(words.check(word), text)
        mask = words.parse_value(word, masks[word]) if word in masks else every_bit(word)
        if value & ~mask or not mask:
            raise BadInput(f"{word} has bits that its mask does not bind")
        found[word] = value, mask
    return found


def fence(document: object) -> tuple[int, str]:
    """(generation, digest) of a document's fence, (0, "") for null. Raises BadInput."""
    if document is None:
        return 0, ""
    generation, digest = (
        (document.get("generation"), document.get("digest")) if isinstance(document, dict) else (0, "")
    )
    digits = digest.removeprefix("sha256:") if isinstance(digest, str) else ""
    if type(generation) is not int or not 0 < generation < 1 << 64:
        raise BadInput("not a contract: its fence has no generation")
    if len(digits) != 64 or not set(digits) <= set("0123456789abcdef"):
        raise BadInput("not a contract: its fence has no digest")
    return generation, str(digest)
