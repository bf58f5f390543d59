# SPDX-License-Identifier: LGPL-2.1-or-later
"""Puts strategies.py and arm64_reports.py where the tests here can import them, and reads the recorded reports."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from kvmneg.features.report import Report

HERE = Path(__file__).parent

# No test here is timed: a busy machine is no failure.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("untimed"), max_examples=5000)


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("long" if config.getoption("long") else "untimed")


def _load(name: str) -> None:
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


_load("strategies")
_load("arm64_reports")


def _report(name: str) -> Report:
    return Report.loads((HERE / "data" / f"{name}.json").read_bytes(), file=name)


@pytest.fixture(scope="session")
def intel() -> Report:
    """Ice Lake under Linux 6.12, silicon measured."""
    return _report("intel-ice-lake")


@pytest.fixture(scope="session")
def amd() -> Report:
    """Milan under Linux 6.12, silicon not measured."""
    return _report("amd-milan")


@pytest.fixture(scope="session")
def software() -> Report:
    """A KVM without VMX and SVM: no XSAVE, no SSE3."""
    return _report("software-kvm")
