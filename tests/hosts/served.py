# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inside a host: runs programs beside a kvmnegd of this host, and joins their sockets to ports of the emulator.

    python3 -m tests.hosts.served PLAN      a JSON object, of which all but `commands` may be left out:

    commands   lists of words, run one after the other; the first that fails is the last
    fence      the text of a fence, pinned before the first
    listen     {TCP port: NAME}: what a program here sends to 127.0.0.1:port leaves by the virtio-serial port NAME
    connect    {TCP port: NAME}: what comes in by the port NAME is given to the program that listens here

Each way takes one connection. A port cannot tell of the end of one: the programs know by what they are told.
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from kvmneg.client import Client
from kvmneg.errors import Unreachable

SOCKET, STATE = "/run/kvmneg/org.kvmneg", "/tmp/kvmneg-state"
SECONDS = 240.0
_CHUNK = 1 << 16


def daemon() -> subprocess.Popen[bytes]:
    """A kvmnegd that answers."""
    command = [sys.executable, "-m", "kvmneg.service.daemon", "--socket", SOCKET, "--state", STATE]
    process = subprocess.Popen(command)
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends and process.poll() is None:
        try:
            with Client(SOCKET) as client:
                client.get_info()
            return process
        except Unreachable:
            time.sleep(0.05)
    raise SystemExit(f"kvmnegd does not answer ({process.poll()})")


def port(name: str) -> int:
    """A virtio-serial port by its name, which the kernel may just be adding."""
    ends = time.monotonic() + SECONDS
    while time.monotonic() < ends:
        for entry in Path("/sys/class/virtio-ports").iterdir():
            try:
                if (entry / "name").read_text("ascii").strip() == name:
                    return os.open(f"/dev/{entry.name}", os.O_RDWR)
            except FileNotFoundError:
                continue
        time.sleep(0.02)
    raise SystemExit(f"there is no port {name}")


def accepted(number: int, name: str) -> None:
    """What comes to a TCP port, to a virtio-serial port, and back."""
    with socket.create_server(("127.0.0.1", number)) as server:
        connection, _ = server.accept()
    relay(connection, port(name))


def connected(number: int, name: str) -> None:
    """What comes to a virtio-serial port, to a TCP port, from its first byte on, and back."""
    fd = port(name)
    while not (data := os.read(fd, _CHUNK)):  # nobody holds the other end
        time.sleep(0.01)
    ends = time.monotonic() + SECONDS
    while True:
        try:
            connection = socket.create_connection(("127.0.0.1", number))
            break
        except ConnectionRefusedError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.02)
    connection.sendall(data)
    relay(connection, fd)


def relay(connection: socket.socket, fd: int) -> None:
    """Both ways, until the program here closes its end."""
    while True:
        for ready in select.select([connection, fd], [], [])[0]:
            data = connection.recv(_CHUNK) if ready is connection else os.read(fd, _CHUNK)
            if ready is fd:
                connection.sendall(data)
            elif data:
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
            else:
                return


def run(plan: dict[str, Any]) -> int:
    for verb, way in (("listen", accepted), ("connect", connected)):
        for number, name in plan.get(verb, {}).items():
            threading.Thread(target=way, args=(int(number), name), daemon=True).start()
    process = daemon()
    try:
        if "fence" in plan:
            with Client(SOCKET) as client:
                client.call("org.kvmneg.Fence.Pin", {"text": plan["fence"], "reason": "a way back"})
        for command in plan["commands"]:
            status = subprocess.run(command, check=False, timeout=SECONDS).returncode
            if status:
                return status
        return 0
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    raise SystemExit(run(json.loads(sys.argv[1])))
