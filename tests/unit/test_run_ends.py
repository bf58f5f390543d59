# SPDX-License-Identifier: LGPL-2.1-or-later
"""What a run of the tests must have asked of this machine's KVM (tests/conftest.py): a whole one all, a part none."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from tests import conftest

if TYPE_CHECKING:
    from collections.abc import Callable

WHOLE: dict[str, Any] = {"keyword": "", "markexpr": ""}


@pytest.fixture
def not_run(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[..., list[str]]:
    """not_run(ioctls, words, **options): what such a run is told to lack, on a machine with a usable KVM."""

    def ask(ioctls: Counter[tuple[str, int]], words: list[str], **options: str) -> list[str]:
        monkeypatch.setattr(conftest, "kvm_problem", lambda: "")
        monkeypatch.setattr(conftest, "_ioctls", lambda: ioctls)
        config = request.config
        monkeypatch.setattr(config, "args", words)
        for name, value in (WHOLE | options).items():
            monkeypatch.setattr(config.option, name, value)
        return conftest._not_run(request.session)

    return ask


def test_a_whole_run_made_the_ioctls_succeed(not_run: Callable[..., list[str]]) -> None:
    made = {"KVM_GET_API_VERSION": 0, "KVM_CREATE_VM": 12}  # the other one failed
    lacking = not_run(Counter(made.items()), ["tests"])
    assert "KVM_GET_API_VERSION" not in lacking
    assert {"KVM_CREATE_VM", "KVM_CREATE_VCPU"} <= set(lacking)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        (["tests"], {"keyword": "fence"}),
        (["tests"], {"markexpr": "hosts"}),  # make test-hosts: the KVMs of other hosts
        (["tests/unit"], {}),
    ],
)
def test_a_part_need_not(
    not_run: Callable[..., list[str]], words: list[str], options: dict[str, str]
) -> None:
    assert not_run(Counter(), words, **options) == []
