# SPDX-License-Identifier: LGPL-2.1-or-later
"""Hosts for tests: `host` is each host of the run in turn, `qemu_host` each one under QEMU."""

from __future__ import annotations

import time

import pytest

from tests.hosts import catalogue
from tests.hosts.machine import Machine

FEW = ("arm64-6.12", "amd-6.12")
MARGIN = 20.0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A host that hangs is told, with its log, before pytest's own limit, which ends the run and says only where."""
    limit = float(item.config.getini("faulthandler_timeout"))
    Machine.ends = time.monotonic() + limit - MARGIN


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "qemu_host" not in metafunc.fixturenames:
        return
    everything = metafunc.config.getoption("hosts") == "all"
    names = [host.name for host in catalogue.hosts() if host.emulator == "qemu"] if everything else FEW
    metafunc.parametrize("qemu_host", [catalogue.find(name) for name in names], ids=names)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("hosts") == "all":
        return
    left_out = [item for item in items if item.get_closest_marker("every_host")]
    items[:] = [item for item in items if item not in left_out]
    config.hook.pytest_deselected(items=left_out)
