# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a VMM asks for: everything, a level with features on top, or exactly a list."""

from __future__ import annotations

from kvmneg import limits
from kvmneg.errors import LimitExceeded, UsageError
from kvmneg.features.words import X86_64

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

DEFAULT_LEVEL = "x86-64-v1"
_FIELDS = ("max", "level", "require", "optional", "exact", "vmm", "requireEnforced", "tscKhz")


class Request:
    """One request. Exactly one of three modes holds:

    - `maximum`: all that host and fence allow, and `require` on top (which max alone would leave out),
    - `level` (x86-64-v1 where none is named) plus `require` and, where there is one, `optional`,
    - `exact`: these features and nothing else.

    `vmm` names what will run the guest ("qemu", "qemu-10.0", "firecracker"; kvmneg.policy.vmm), None: KVM's set counts.

    `tsc_khz` pins the guest's TSC to a rate in kHz, without which no guest is told that its TSC is invariant.

    With `require_enforced` the answer is no where the contract would not be graded "enforced".

    Raises UsageError where modes exclude each other, LimitExceeded (REQUEST_FEATURES).
    """

    __slots__ = (
        "default", "exact", "level", "maximum", "optional", "require", "require_enforced", "tsc_khz", "vmm",
    )  # fmt: skip

    def __init__(
        self,
        *,
        maximum: bool = False,
        level: str | None = None,
        require: tuple[str, ...] = (),
        optional: tuple[str, ...] = (),
        exact: tuple[str, ...] | None = None,
        vmm: str | None = None,
        require_enforced: bool = False,
        tsc_khz: int | None = None,
    ) -> None:
        modes = {"max": maximum, "level": level is not None, "exact": exact is not None}
        chosen = [name for name, on in modes.items() if on]
        if len(chosen) > 1:
            raise UsageError(f"{' and '.join(chosen)} exclude each other", hint="ask for one of them")
        if (require or optional) and exact is not None:
            raise UsageError(
                "exact means nothing else", hint="put every feature into exact, or ask for a level"
            )
        if maximum and optional:
            raise UsageError(
                "max already holds everything there is", hint="leave optional out, or ask for a level"
            )
        if tsc_khz is not None and not 0 < tsc_khz <= limits.TSC_KHZ:
            raise UsageError(f"a TSC rate is 1 to {limits.TSC_KHZ} kHz, not {tsc_khz}")
        count = len(require) + len(optional) + len(exact or ())
        if count > limits.REQUEST_FEATURES:
            raise LimitExceeded("REQUEST_FEATURES", limits.REQUEST_FEATURES, f"{count} features were named")
        self.maximum = maximum
        self.exact = exact
        # where nothing was named: on arm64, which has no levels, all that host and fence allow
        self.default = not chosen
        self.level = level if chosen else DEFAULT_LEVEL
        self.require = require
        self.optional = optional
        self.vmm = vmm
        self.require_enforced = require_enforced
        self.tsc_khz = tsc_khz

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Request:
        """From the wire's Request (org.kvmneg); absent and null are the same.

        Raises UsageError (a field of another type or name, modes that exclude each other), LimitExceeded.
        """
        unknown = set(document) - set(_FIELDS)
        if unknown:
            raise UsageError(f"a request has no {min(unknown)!r}", hint=f"it has {', '.join(_FIELDS)}")
        maximum, level = document.get("max"), document.get("level")
        if not isinstance(maximum, bool | None) or not isinstance(level, str | None):
            raise UsageError("max is a boolean and level a name")
        vmm = document.get("vmm")
        if not isinstance(vmm, str | None):
            raise UsageError("vmm is a name")
        enforced = document.get("requireEnforced")
        if not isinstance(enforced, bool | None):
            raise UsageError("requireEnforced is a boolean")
        khz = document.get("tscKhz")
        if khz is not None and type(khz) is not int:
            raise UsageError("tscKhz is a whole number")
        return cls(
            maximum=bool(maximum),
            level=level,
            require=_names(document, "require") or (),
            optional=_names(document, "optional") or (),
            exact=_names(document, "exact"),
            vmm=vmm,
            require_enforced=bool(enforced),
            tsc_khz=khz,
        )

    def to_json(self) -> dict[str, Any]:
        """The wire's Request, what is empty left out."""
        document: dict[str, Any] = {}
        if self.maximum:
            document["max"] = True
        if self.level is not None and not self.default:
            document["level"] = self.level
        for name in ("require", "optional"):
            if getattr(self, name):
                document[name] = list(getattr(self, name))
        if self.exact is not None:
            document["exact"] = list(self.exact)
        if self.vmm is not None:
            document["vmm"] = self.vmm
        if self.require_enforced:
            document["requireEnforced"] = True
        if self.tsc_khz is not None:
            document["tscKhz"] = self.tsc_khz
        return document

    def describe(self, architecture: str = X86_64) -> str:
        """The name a blocker gives as the one who wants a feature."""
        if self.default and architecture != X86_64:
            return "the request"
        if self.maximum:
            return "max"
        return "exact" if self.exact is not None else str(self.level)


def _names(document: Mapping[str, Any], key: str) -> tuple[str, ...] | None:
    names = document.get(key)
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{key} is a list of feature names")
    return tuple(names)
