# SPDX-License-Identifier: LGPL-2.1-or-later
"""The PyPI packages varlink and asyncvarlink as clients: two other readings of the same text."""

import asyncio
import sys

import asyncvarlink
import asyncvarlink.serviceinterface
import pytest
import varlink

from kvmneg import __version__
from kvmneg.service.interfaces import introspection

# --- varlink: reads the interface over the wire and makes methods of it


@pytest.fixture
def classic(served):
    with varlink.Client.new_with_address(f"unix:{served.path}") as client:
        yield client


def test_varlink_reads_every_interface(classic):
    info = classic.get_interfaces()
    assert sorted(info) == sorted(introspection.INTERFACES)
    for name in introspection.INTERFACES:
        assert classic.get_interface(name).get_description() == introspection.description(name)


def test_varlink_calls(classic, served, monkeypatch):
    """GetHost through the interface that the package has read, answered by the toy."""
    toy_methods = sys.modules["toy_server"].METHODS
    monkeypatch.setitem(toy_methods, "org.kvmneg.GetHost", {})
    monkeypatch.setitem(toy_methods, "org.kvmneg.Negotiate", {"request": "object"})
    host = {
        "host": {"format": "kvmneg.report/1"},
        "generation": 7,
        "state": "pinned",
        "fence": {"generation": 7},
    }
    served.toy._gethost = lambda *_: host
    served.toy._negotiate = lambda _c, given, _m: served.toy._refuse()
    with classic.open("org.kvmneg") as connection:
        assert connection.GetHost() == host
        with pytest.raises(varlink.VarlinkError) as error:
            connection.Negotiate({"level": "x86-64-v2"})
        assert error.value.error() == "org.kvmneg.Blocked"
        assert error.value.parameters() == {"message": "no", "hint": "ask otherwise", "blockers": []}
        assert connection.GetHost() == host


def test_varlink_oneway_and_more(classic, served, monkeypatch):
    toy_methods = sys.modules["toy_server"].METHODS
    monkeypatch.setitem(toy_methods, "org.kvmneg.Started", {"vm": "string"})
    monkeypatch.setitem(toy_methods, "org.kvmneg.Watch", {})
    started = []
    served.toy._started = lambda _c, given, _m: (started.append(given["vm"]), {})[1]
    state = {"generation": 1, "fenceDigest": "y", "state": "pinned", "hostDigest": "x"}

    def watch(connection, _given, more):
        assert more
        served.toy.watchers.add(connection, state)

    monkeypatch.setattr(served.toy, "_watch", watch)
    with classic.open("org.kvmneg") as connection:
        assert connection.Started("u", _oneway=True) is None
        states = connection.Watch(_more=True)
        assert next(states) == state
        served.wait(lambda: started == ["u"])
        with classic.open("org.varlink.service") as other:
            assert other.GetInfo()["version"] == __version__


# --- asyncvarlink: interfaces are Python classes


class Toy(asyncvarlink.VarlinkInterface, name="org.example.toy"):
    @asyncvarlink.varlinkmethod(return_parameter="text")
    def Echo(self, *, text: str) -> str: ...  # noqa: N802

    @asyncvarlink.varlinkmethod(return_parameter="count")
    def Count(self) -> int: ...  # noqa: N802

    @asyncvarlink.varlinkmethod
    def Refuse(self) -> None: ...  # noqa: N802

    @asyncvarlink.varlinkmethod(return_parameter="left")
    def Countdown(self, *, number: int) -> list[int]: ...  # noqa: N802


def over_asyncvarlink(path, use):
    async def run():
        transport, protocol = await asyncvarlink.connect_unix_varlink(
            asyncvarlink.VarlinkClientProtocol, path
        )
        try:
            return await use(protocol)
        finally:
            transport.close()
            await asyncio.sleep(0)

    return asyncio.run(run())


def test_asyncvarlink_calls(served):
    async def use(protocol):
        toy = protocol.make_proxy(Toy)
        return [await toy.Echo(text="é"), await toy.Count(), await toy.Count()]

    assert over_asyncvarlink(served.path, use) == [{"text": "é"}, {"count": 1}, {"count": 2}]


def test_asyncvarlink_gets_errors(served):
    async def use(protocol):
        with pytest.raises(asyncvarlink.VarlinkErrorReply) as error:
            await protocol.make_proxy(Toy).Refuse()
        return error.value

    error = over_asyncvarlink(served.path, use)
    assert error.name == "org.kvmneg.Blocked"
    assert error.parameters["hint"] == "ask otherwise"


def test_asyncvarlink_reads_every_interface(served):
    async def use(protocol):
        service = protocol.make_proxy(asyncvarlink.serviceinterface.VarlinkServiceInterface)
        info = await service.GetInfo()
        described = [await service.GetInterfaceDescription(interface=name) for name in info["interfaces"]]
        return info, described

    info, described = over_asyncvarlink(served.path, use)
    assert info == introspection.get_info()
    assert described == [
        {"description": introspection.description(name)} for name in introspection.INTERFACES
    ]
