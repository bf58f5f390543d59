# SPDX-License-Identifier: LGPL-2.1-or-later
"""The host that tests run on: asked of the daemon where there is one, else measured here, or read from a report."""

from __future__ import annotations

import os

from kvmneg.client import DEFAULT_SOCKET, Client
from kvmneg.errors import BadInput, Blocked, NotPermitted, Unreachable, UsageError
from kvmneg.features.difference import Blocker
from kvmneg.features.report import Report
from kvmneg.policy import grade, negotiation
from kvmneg.policy.contract import Contract

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from kvmneg.testing.needs import Needs


class Held:
    """A contract that a test's VM holds. `path` is the file with its binary form, what a VMM opens.

    `vm` is the UUID under which the daemon knows the VM; "" where there is no daemon. A context manager: at its end
    the daemon hears that the VM is gone.
    """

    __slots__ = ("_client", "contract", "path", "vm")

    def __init__(self, contract: Contract, path: str, vm: str = "", client: Client | None = None) -> None:
        self.contract = contract
        self.path = path
        self.vm = vm
        self._client = client

    def __enter__(self) -> Held:
        return self

    def __exit__(self, *_: object) -> None:
        if self._client is not None:
            self._client.end(self.vm)
            self._client = None


class Host:
    """One host. `report` is kvmneg.report/1, `source` where it is from, as a sentence ends.

    Answers are kept: a thousand tests with one need ask once.
    """

    def __init__(self, report: Report, source: str, client: Client | None = None) -> None:
        self.report = report
        self.source = source
        self._client = client
        self._answers: dict[Needs, Contract | Blocked] = {}

    @classmethod
    def find(cls, socket: str | None = None, report: str | None = None) -> Host:
        """The host of a report file; else of the daemon on `socket`, of the one on the usual socket, or this one.

        Raises BadInput, Unreachable and NotPermitted where one was named, NoKvm, KvmFault.
        """
        if report is not None:
            return cls(_read(report), f"from {report}")
        if socket is not None or os.path.exists(DEFAULT_SOCKET):
            client = Client(socket or DEFAULT_SOCKET)
            try:
                found = client.get_host()
                return cls(Report.from_json(found["host"]), f"from kvmnegd on {client.path}", client)
            except (Unreachable, NotPermitted):
                client.close()
                if socket is not None:
                    raise
        from kvmneg.host import measure  # loads the extension; nothing above needs it

        return cls(measure.measure(), "measured here")

    def close(self) -> None:
        """Leave the daemon."""
        if self._client is not None:
            self._client.close()

    @property
    def grade(self) -> str:
        """How far KVM keeps to a contract over all that it offers: enforced, partial, unverified."""
        return grade.of(self.report.offer, self.report)

    def properties(self) -> Mapping[str, str]:
        """What two runs are compared by, for logs and JUnit.

        The same kvm-offer: KVM gives guests the same. The same kvm-combo: by the same software on the same machine.
        kvm-digest is the daemon's hostDigest, the whole report's, which is another after each boot.
        """
        return {
            "kvm-host": self.report.host,
            "kvm-digest": self.report.digest(),
            "kvm-offer": self.report.offer.digest(),
            "kvm-combo": self.report.combo_digest(),
            "kvm-kernel": str(self.report.combo.get("kernel", "")),
            "kvm-grade": self.grade,
        }

    def contract(self, needs: Needs) -> Contract:
        """What a guest with these needs would get here. Raises Blocked, UsageError, and what the daemon does."""
        if needs not in self._answers:
            try:
                self._answers[needs] = self._negotiate(needs)
            except Blocked as no:
                self._answers[needs] = no
            except UsageError as error:
                self._answers[needs] = self._foreign(needs, error)
        answer = self._answers[needs]
        if isinstance(answer, Blocked):
            raise answer
        return answer

    def _negotiate(self, needs: Needs) -> Contract:
        request = needs.request(self.report.architecture)
        if self._client is None:
            return negotiation.negotiate(request, self.report).contract
        document: Any = self._client.negotiate(request.to_json())["contract"]
        return Contract.from_json(document, file="the daemon's answer")

    def _foreign(self, needs: Needs, error: UsageError) -> Blocked:
        """The no to a test of another architecture's features. Raises `error` where it is none of them either."""
        here, there = self.report.architecture, needs.meant_for(self.report.architecture)
        if not there:
            raise error
        blocker = Blocker.of_architecture(there, here, f"host {self.report.host}")
        return Blocked(f"it is for {there}", [blocker])

    def hold(self, needs: Needs, folder: str) -> Held:
        """A contract for one VM: begun and started at the daemon, else a file in `folder`. Raises as `contract`."""
        contract = self.contract(needs)
        if self._client is None:
            path = os.path.join(folder, contract.digest.removeprefix("sha256:"))
            with open(path, "wb") as file:
                file.write(contract.binary())
            return Held(contract, path)
        from uuid import uuid4  # 3 ms, for tests with a daemon only

        vm = str(uuid4())
        path = str(self._client.begin(contract.digest, vm)["path"])
        held = Held(contract, path, vm, self._client)
        try:
            self._client.started(vm)
        except BaseException:
            held.__exit__()
            raise
        return held


def _read(file: str) -> Report:
    try:
        with open(file, "rb") as opened:
            return Report.loads(opened.read(), file=file)
    except OSError as error:
        raise BadInput(f"cannot read it: {error.strerror}", file=file) from None
