# SPDX-License-Identifier: LGPL-2.1-or-later
"""A daemon on a real KVM whose module goes and comes back, and whose parameters are written: in an emulated host only.

On any other machine that is somebody's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg.client import Client
from kvmneg.errors import NoKvm
from tests import summary
from tests.daemon.conftest import Daemon
from tests.daemon.test_again import until, watches

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(
        summary.VARIABLE not in os.environ or os.geteuid() != 0 or not Path("/modules").is_dir(),
        reason="needs root in an emulated host",
    ),
]
VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
BUSYBOX = "/usr/bin/busybox"


def vendor() -> str:
    return next(name for name in ("kvm_amd", "kvm_intel") if Path("/sys/module", name).is_dir())


def load(name: str) -> None:
    files = list(Path("/modules").iterdir())  # 05-kvm-amd.ko
    (file,) = [one for one in files if one.stem.replace("-", "_").endswith(f"_{name}")]
    subprocess.run([BUSYBOX, "insmod", str(file)], check=True)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """One that watches."""
    found = Daemon(tmp_path, "--kvm", "/dev/kvm").start()
    try:
        watches(found)
        until(lambda: settled(found))
        yield found
    finally:
        found.end(signal.SIGKILL)


def settled(daemon: Daemon) -> bool:
    """Guests have run for this combo: the report moves no more by itself."""
    return (Path(daemon.state) / "proofs.json").exists()


def unload(name: str) -> None:
    """A module is in use while somebody asks KVM: another test's daemon or its guests, for a moment."""
    for _ in range(100):
        if subprocess.run([BUSYBOX, "rmmod", name], check=False, capture_output=True).returncode == 0:
            return
        time.sleep(0.1)
    subprocess.run([BUSYBOX, "rmmod", name], check=True)


def until_told(events: Iterator[dict[str, Any]], state: str) -> None:
    for event in events:
        if event["state"] == state:
            return


def test_a_module_that_goes_and_comes_back(daemon: Daemon) -> None:
    name = vendor()
    with daemon.client() as client, Client(daemon.socket, timeout=120) as watching:
        digest = client.negotiate({"max": True})["digest"]
        events = watching.watch()
        assert next(events)["state"] == "floating"
        unload(name)
        try:
            until_told(events, "unmeasured")
            with pytest.raises(NoKvm):
                client.negotiate({"max": True})
            with pytest.raises(NoKvm):
                client.begin(digest, VM)
        finally:
            load(name)
        until_told(events, "floating")
        assert client.begin(digest, VM)["digest"] == digest
        client.end(VM)
    told = daemon.errors.read_text()
    assert "this host cannot be measured any more" in told and "this host is measured again" in told
    assert "VM that nobody negotiated for" not in told  # of the children that measured
    assert "internal error" not in told


def test_a_parameter_that_is_written(daemon: Daemon) -> None:
    """No event tells of it: whoever asks is answered by a measurement that knows it."""
    file = Path("/sys/module/kvm/parameters/ignore_msrs")
    before = file.read_text()
    with daemon.client() as client:
        first = client.get_host()["host"]["combo"]["modules"]
        try:
            file.write_text("N" if before.startswith("Y") else "Y")
            digest = client.negotiate({"max": True})["digest"]
            client.begin(digest, VM)
            second = client.get_host()["host"]["combo"]["modules"]
        finally:
            file.write_text(before)
        assert first != second
        client.end(VM)
