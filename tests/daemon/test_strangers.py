# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmnegd as clients meet it that were not written here (the PyPI packages varlink and asyncvarlink), and those
that mean it ill: the transport's hostile list is in tests/hostile, here it meets real answers.
"""

# asyncvarlink reads annotations: they must not be strings here
import asyncio
import json
import socket
from typing import TYPE_CHECKING

import asyncvarlink
import asyncvarlink.serviceinterface
import pytest
import varlink

from kvmneg.service.interfaces import introspection

if TYPE_CHECKING:
    from .conftest import Daemon

VM = "0b9f3c1e-5f0b-4a49-9d0e-6a1f2b3c4d5e"
GET_HOST = b'{"method":"org.kvmneg.GetHost"}\0'


def test_varlink_reads_the_interfaces_and_runs_a_vm(daemon: "Daemon") -> None:
    with varlink.Client.new_with_address(f"unix:{daemon.socket}") as client:
        assert sorted(client.get_interfaces()) == sorted(introspection.INTERFACES)
        with client.open("org.kvmneg") as connection:
            assert connection.GetHost()["state"] == "floating"
            offer = connection.Negotiate({"level": "x86-64-v2", "optional": ["avx512f"]})
            assert "avx512f" in {row["feature"] for row in offer["notGranted"]}
            granted = connection.Begin(offer["digest"], VM)
            assert granted["generation"] == 0
            connection.Started(VM)
            connection.End(VM)
            with pytest.raises(varlink.VarlinkError) as caught:
                connection.Negotiate({"level": "x86-64-v4"})
            assert caught.value.error() == "org.kvmneg.Blocked"
            assert {row["cause"] for row in caught.value.parameters()["blockers"]} == {"silicon"}
        with client.open("org.kvmneg.Fence") as connection:
            assert connection.Get()["pinned"] is False


class Negotiator(asyncvarlink.VarlinkInterface, name="org.kvmneg"):
    @asyncvarlink.varlinkmethod
    def Started(self, *, vm: str) -> None: ...  # noqa: N802


def test_asyncvarlink_reads_the_interfaces_and_gets_errors(daemon: "Daemon") -> None:
    async def run() -> tuple[list[str], str]:
        transport, protocol = await asyncvarlink.connect_unix_varlink(
            asyncvarlink.VarlinkClientProtocol, daemon.socket
        )
        try:
            service = protocol.make_proxy(asyncvarlink.serviceinterface.VarlinkServiceInterface)
            info = await service.GetInfo()
            described = [
                (await service.GetInterfaceDescription(interface=name))["description"]
                for name in info["interfaces"]
            ]
            with pytest.raises(asyncvarlink.VarlinkErrorReply) as caught:
                await protocol.make_proxy(Negotiator).Started(vm=VM)
            return described, caught.value.name
        finally:
            transport.close()
            await asyncio.sleep(0)

    described, error = asyncio.run(run())
    assert described == [introspection.description(name) for name in introspection.INTERFACES]
    assert error == "org.kvmneg.InvalidRequest"  # no VM holds a contract


def connect(daemon: "Daemon") -> socket.socket:
    connected = socket.socket(socket.AF_UNIX)
    connected.settimeout(60)
    connected.connect(daemon.socket)
    return connected


def replies(connected: socket.socket, count: int) -> int:
    """Read that many replies; how many there were before the end of file."""
    seen = 0
    while seen < count:
        data = connected.recv(1 << 20)
        if not data:
            break
        seen += data.count(b"\0")
    return seen


@pytest.mark.parametrize(
    "garbage",
    [
        b"x" * (8 << 20),
        b"[" * 50_000 + b"\0",
        b'{"method":"org.kvmneg.Fence.History","parameters":{"limit":' + b"9" * 5000 + b"}}\0",
        b'{"method":"org.kvmneg.GetHost","more":1}\0',
        b'{"method":"org.kvmneg.GetHost","parameters":{"a":NaN}}\0',
        b"\xff\xfe\0",
    ],
    ids=["no NUL for 8 MiB", "50,000 nested arrays", "5,000 digits", "no boolean", "NaN", "no UTF-8"],
)
def test_garbage_closes_its_own_connection(daemon: "Daemon", garbage: bytes) -> None:
    with connect(daemon) as hostile, daemon.client() as other:
        try:
            hostile.sendall(garbage)
            while hostile.recv(1 << 16):
                pass
        except ConnectionError:
            pass  # closed in the middle of it
        assert other.get_host()["state"] == "floating"


def test_a_flood_and_a_pipeline_beside_a_second_client(daemon: "Daemon") -> None:
    """5,000 calls in one go get 5,000 replies; one-way calls get none; a peer that reads nothing costs its queue."""
    oneway = json.dumps({"method": "org.kvmneg.GetHost", "oneway": True}).encode() + b"\0"
    with connect(daemon) as flood, connect(daemon) as deaf, daemon.client() as other:
        deaf.setblocking(False)
        try:
            while deaf.send(GET_HOST * 100):
                pass
        except BlockingIOError:
            pass
        flood.sendall(oneway * 1000)
        assert other.get_host()["state"] == "floating"
        sent = [GET_HOST] * 5000
        flood.settimeout(0)
        data, seen = b"".join(sent), 0
        while data or seen < len(sent):
            try:
                data = data[flood.send(data) :] if data else data
            except BlockingIOError:
                flood.settimeout(60)
                seen += replies(flood, 1)
                flood.settimeout(0)
            if not data:
                flood.settimeout(60)
                seen += replies(flood, len(sent) - seen)
        assert seen == 5000
        assert other.negotiate({"max": True})["generation"] == 0
