# SPDX-License-Identifier: LGPL-2.1-or-later
"""libkvmneg-client against servers that behave, and that do not; built with the sanitizers, leaks included."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
import socket
import struct
import subprocess
import threading
import time
from base64 import b64decode
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kvmneg import limits
from kvmneg.client import Client
from kvmneg.features.report import Report
from kvmneg.policy.negotiation import negotiate
from kvmneg.policy.request import Request
from tests.c_client import CLIENT, LIBRARY

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "kvmneg/data/recorded-host.json"
SOURCES = sorted(CLIENT.glob("*.c"))
DIGEST = "sha256:" + "0123456789abcdef" * 4
VM = "3e4c2f6a-9d3b-4c1e-8a57-2f0d6b1c9e11"
REQUEST = '{"request":{"level":"x86-64-v2","optional":["avx2"]}}'
OFFER = {"contract": {"words": {}}, "digest": DIGEST, "generation": 7, "notGranted": [], "scope": ["é", "b"]}
GRANT = {"digest": DIGEST, "generation": 7, "path": "/run/x", "expiresInSeconds": 600}
BLOCKER = {
    "feature": "avx2",
    "word": "cpuid:0x7.0.ebx",
    "bit": 5,
    "wantedBy": "the request",
    "missingOn": "host node7",
    "cause": "kvm",
    "because": "KVM does not offer it",
}
BLOCKER_LINE = "avx2 (cpuid:0x7.0.ebx bit 5), wanted by the request: KVM does not offer it [kvm]\n"
BROUGHT = "(the file)"  # stands for the fixture of that name
REPLY_MAX = 1024 * 1024
CONTAINERS_MAX = 16 * 1024
DEPTH_MAX = 32


class Script:
    """A server that takes one call on each connection and writes what it is told to, whatever that is."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.calls: list[bytes] = []
        self.answer: Callable[[socket.socket], None] = lambda connection: None
        self.read_first = True
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(path)
        self.listener.listen(8)
        self.thread = threading.Thread(target=self._serve)
        self.thread.start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            with connection:
                received = b""
                while self.read_first and not received.endswith(b"\0"):
                    data = connection.recv(65536)
                    if not data:
                        break
                    received += data
                self.calls.append(received)
                try:
                    self.answer(connection)
                except OSError:
                    pass  # the client left, as it may

    def replies(self, data: bytes | dict[str, Any]) -> None:
        raw = data if isinstance(data, bytes) else json.dumps(data, ensure_ascii=False).encode() + b"\0"
        self.answer = lambda connection: connection.sendall(raw)

    def close(self) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)  # wakes accept()
        self.thread.join(20)
        self.listener.close()
        assert not self.thread.is_alive()


def contract(capabilities: int, msrs: int = 3, leaves: int = 3) -> bytes:
    """A contract in its binary form (kvmneg.policy.contract): each capability makes its size 1 more, modulo 3."""
    body = b"".join(struct.pack("<4I4I4I", leaf, 0, 0, 0, *(1,) * 8) for leaf in range(leaves))
    body += b"".join(struct.pack("<IIQQ", index, 0, 1, 1) for index in range(msrs))
    names = (f"kvm:{number:03}".encode() for number in range(capabilities))
    body += b"".join(struct.pack("<40sIIQQ", name, 0, 0, 1, 1) for name in names)
    head = struct.pack("<8s6I", b"KVMNEGC", 1, 1, 160 + len(body), 160, 0, 0)
    rest = struct.pack("<Q32s6I32s", 0, b"", leaves, msrs, 0, capabilities, 0, 0, b"")
    return head + hashlib.sha256(head + bytes(32) + rest + body).digest() + rest + body


@pytest.fixture
def brought(tmp_path: Path) -> str:
    """A file with a contract."""
    path = tmp_path / "brought"
    path.write_bytes(contract(0))
    return str(path)


@pytest.fixture
def script(tmp_path: Path) -> Iterator[Script]:
    server = Script(str(tmp_path / "script"))
    yield server
    server.close()


def codes(given: dict[str, str]) -> str:
    """The errno's name: "EBADMSG", or "" of a success."""
    return errno.errorcode.get(-int(given["r"]), "")


# --- what it says and hears


def test_an_offer(script: Script, c_client: Callable[..., dict[str, str]]) -> None:
    script.replies({"parameters": {**OFFER, "notGranted": [BLOCKER]}})
    given = c_client(script.path, "negotiate", REQUEST)
    assert codes(given) == ""
    assert (given["digest"], given["generation"]) == (DIGEST, "7")
    assert (given["not_granted"], given["not_granted_count"]) == (BLOCKER_LINE, "1")
    assert given["scope"] == "é\nb\n"
    assert json.loads(given["reply"])["parameters"]["contract"] == {"words": {}}
    sent = json.loads(script.calls[0].removesuffix(b"\0"))
    assert sent == {"method": "org.kvmneg.Negotiate", "parameters": json.loads(REQUEST)}


def test_a_grant(script: Script, c_client: Callable[..., dict[str, str]]) -> None:
    script.replies({"parameters": GRANT})
    given = c_client(script.path, "begin-unopened", DIGEST, VM)
    assert (codes(given), given["path"], given["expires_in_seconds"]) == ("", "/run/x", "600")
    assert json.loads(script.calls[0].removesuffix(b"\0"))["parameters"] == {"digest": DIGEST, "vm": VM}
    assert codes(c_client(script.path, "begin-only", DIGEST, VM)) == ""


def test_the_contract_of_a_grant(
    script: Script, c_client: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    """The file is opened and checked; one with another digest is not the one that was granted."""
    binary = negotiate(Request(), Report.loads(RECORDED.read_bytes())).contract.binary()
    digest, path = "sha256:" + binary[32:64].hex(), tmp_path / "contract"
    path.write_bytes(binary)
    script.replies({"parameters": GRANT | {"digest": digest, "path": str(path)}})
    assert bytes.fromhex(c_client(script.path, "begin", digest, VM)["contract"]) == binary
    for changed, code in ((binary[:-1], "EBADMSG"), (b"", "EBADMSG"), (None, "ENOENT")):
        path.unlink()
        if changed is not None:
            path.write_bytes(changed)
        assert codes(c_client(script.path, "begin", digest, VM)) == code
        path.touch()
    path.write_bytes(binary)
    script.replies({"parameters": GRANT | {"path": str(path)}})
    given = c_client(script.path, "begin", DIGEST, VM)
    assert (codes(given), set(given)) == ("EBADE", {"r", "descriptors"})


@pytest.mark.parametrize(("pid", "sent"), [("0", {}), ("4711", {"pid": 4711})])
def test_who_keeps_a_grant(
    script: Script, c_client: Callable[..., dict[str, str]], pid: str, sent: dict[str, int]
) -> None:
    script.replies({"parameters": GRANT})
    assert codes(c_client(script.path, "begin-unopened", DIGEST, VM, pid)) == ""
    call = json.loads(script.calls[0].removesuffix(b"\0"))
    assert call == {"method": "org.kvmneg.Begin", "parameters": {"digest": DIGEST, "vm": VM, **sent}}


@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_guest_that_comes(
    script: Script, c_client: Callable[..., dict[str, str]], tmp_path: Path, more: int
) -> None:
    """Its contract goes to the daemon in Base64, whatever its size leaves over; the reply is as a grant's."""
    binary = contract(more)
    digest, comes, kept = "sha256:" + binary[32:64].hex(), tmp_path / "comes", tmp_path / "kept"
    comes.write_bytes(binary)
    kept.write_bytes(binary)
    script.replies({"parameters": GRANT | {"digest": digest, "path": str(kept)}})
    given = c_client(script.path, "receive", str(comes), VM)
    assert (codes(given), given["digest"], given["generation"]) == ("", digest, "7")
    assert bytes.fromhex(given["contract"]) == binary
    c_client(script.path, "receive", str(comes), VM, "qemu-10.0", "4711")
    bare, full = (json.loads(call.removesuffix(b"\0")) for call in script.calls)
    assert bare["method"] == "org.kvmneg.Guests.Receive"
    assert set(bare["parameters"]) == {"binary", "vm"}
    assert b64decode(bare["parameters"]["binary"], validate=True) == binary
    assert full["parameters"] == {**bare["parameters"], "vmm": "qemu-10.0", "pid": 4711}
    script.replies({"parameters": GRANT | {"path": str(kept)}})  # another guest's
    assert codes(c_client(script.path, "receive", str(comes), VM)) == "EBADE"
    kept.write_bytes(binary[:-1])
    script.replies({"parameters": GRANT | {"digest": digest, "path": str(kept)}})
    assert codes(c_client(script.path, "receive", str(comes), VM)) == "EBADMSG"


def test_a_contract_that_does_not_fit_a_call(
    script: Script, c_client: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    """Neither one whose Base64 is too long by itself, nor one that leaves no room for the rest of the call."""
    script.replies({})
    path, room = tmp_path / "contract", limits.CALL_BYTES // 4 * 3
    for capabilities, code in ((180, "EBADMSG"), (189, "EMSGSIZE"), (190, "EMSGSIZE")):
        binary = contract(capabilities, 1024, 256)
        assert (len(binary) <= room) == (capabilities < 190)
        path.write_bytes(binary)
        script.calls.clear()
        assert codes(c_client(script.path, "receive", str(path), VM)) == code
        assert len(script.calls) == (code == "EBADMSG")  # what was sent, to which {} is no grant


@pytest.mark.parametrize("method", ["started", "end"])
@pytest.mark.parametrize("reply", [{}, {"parameters": None}, {"parameters": {"new": [1]}, "new": 2}])
def test_what_is_told(
    script: Script, c_client: Callable[..., dict[str, str]], method: str, reply: dict[str, Any]
) -> None:
    """No parameters, null and fields of a later version are all a success."""
    script.replies(reply)
    assert codes(c_client(script.path, method, VM)) == ""
    sent = json.loads(script.calls[0].removesuffix(b"\0"))
    assert sent == {"method": f"org.kvmneg.{method.capitalize()}", "parameters": {"vm": VM}}


def test_any_method(script: Script, c_client: Callable[..., dict[str, str]]) -> None:
    reply = {"parameters": {"incarnation": 4, "new": ["é"]}}
    script.replies(reply)
    given = c_client(script.path, "call", "org.kvmneg.Guests.Handover", f'{{"vm": "{VM}", "pid": 5}}')
    assert (codes(given), json.loads(given["reply"])) == ("", reply)
    assert codes(c_client(script.path, "quiet-call", "org.kvmneg.Guests.List")) == ""
    handover, listed = (json.loads(call.removesuffix(b"\0")) for call in script.calls)
    assert handover == {"method": "org.kvmneg.Guests.Handover", "parameters": {"vm": VM, "pid": 5}}
    assert listed == {"method": "org.kvmneg.Guests.List", "parameters": {}}
    script.replies({"error": "org.varlink.service.ExpectedMore"})
    given = c_client(script.path, "call", "org.kvmneg.Watch")
    assert (codes(given), given["name"]) == ("EREMOTEIO", "org.varlink.service.ExpectedMore")
    assert codes(c_client(script.path, "quiet-call", "org.kvmneg.Watch")) == "EREMOTEIO"


def test_it_sends_what_the_python_client_sends(
    script: Script, c_client: Callable[..., dict[str, str]], brought: str
) -> None:
    """Byte for byte, of names and values that are ASCII."""
    script.replies({"parameters": {**OFFER, **GRANT}})
    c_client(script.path, "negotiate", REQUEST)
    c_client(script.path, "begin", DIGEST, VM)
    c_client(script.path, "receive", brought, VM)
    c_client(script.path, "started", VM)
    c_client(script.path, "end", VM)
    for method, *arguments in (
        ("negotiate", json.loads(REQUEST)["request"]),
        ("begin", DIGEST, VM),
        ("guests_receive", Path(brought).read_bytes(), VM),
        ("started", VM),
        ("end", VM),
    ):
        with Client(script.path) as client:
            getattr(client, method)(*arguments)
    assert len(script.calls) == 10
    assert script.calls[:5] == script.calls[5:]


def test_a_refusal(script: Script, c_client: Callable[..., dict[str, str]]) -> None:
    parameters = {"message": "no:\x1b[2J\x9b", "hint": None, "blockers": [BLOCKER, BLOCKER | {"bit": None}]}
    script.replies({"error": "org.kvmneg.Blocked", "parameters": parameters})
    given = c_client(script.path, "negotiate", REQUEST)
    assert (codes(given), given["name"], given["hint"]) == ("EREMOTEIO", "org.kvmneg.Blocked", "")
    assert given["message"] == "no: [2J "  # nothing that moves a cursor
    assert given["blockers"] == BLOCKER_LINE + BLOCKER_LINE.replace(" bit 5", "")
    assert given["blocker_count"] == "2"
    assert json.loads(given["reply"])["parameters"]["blockers"][0] == BLOCKER
    assert codes(c_client(script.path, "quiet-negotiate", REQUEST)) == "EREMOTEIO"


@pytest.mark.parametrize(
    "parameters",
    [None, {"message": 5}, {"blockers": 5}, {"blockers": [5]}, {"parameter": "x", "hint": ["y"]}],
)
def test_a_refusal_of_another_shape_is_one_all_the_same(
    script: Script, c_client: Callable[..., dict[str, str]], parameters: Any
) -> None:
    script.replies({"error": "org.varlink.service.InvalidParameter", "parameters": parameters})
    given = c_client(script.path, "end", VM)
    assert (codes(given), given["name"]) == ("EREMOTEIO", "org.varlink.service.InvalidParameter")
    assert (given["message"], given["hint"], given["blockers"]) == ("", "", "")


# --- what is not sent


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("negotiate", "-"), "EINVAL"),
        (("negotiate", ""), "EINVAL"),
        (("negotiate", "[]"), "EINVAL"),
        (("negotiate", "{"), "EINVAL"),
        (("negotiate", '{}, "more": true'), "EINVAL"),
        (("negotiate", '{} {"a": 1}'), "EINVAL"),
        (("negotiate", """{"request": 'max'}"""), "EINVAL"),
        (("negotiate", '{"a": /* */ 1}'), "EINVAL"),
        (("negotiate", b'{"a": "\xff"}'), "EINVAL"),
        (("negotiate", '{"a":' * DEPTH_MAX + "1" + "}" * DEPTH_MAX), "EINVAL"),
        (("negotiate", json.dumps({"a": "x" * limits.CALL_BYTES})), "EMSGSIZE"),
        (("begin", DIGEST, "-"), "EINVAL"),
        (("begin", "\x01", VM), "EINVAL"),
        (("begin", DIGEST, VM, "-1"), "EINVAL"),
        (("receive", "-", VM), "EINVAL"),
        (("receive", BROUGHT, "-"), "EINVAL"),
        (("receive", BROUGHT, VM, "\x01"), "EINVAL"),
        (("receive", BROUGHT, VM, "-", "-1"), "EINVAL"),
        (("call", "-"), "EINVAL"),
        (("call", "é"), "EINVAL"),
        (("call", "org.kvmneg.Guests.Saved", "[]"), "EINVAL"),
        (("call", "x" * limits.CALL_BYTES), "EMSGSIZE"),
        (("call", "org.kvmneg.Guests.Saved", json.dumps({"a": "x" * limits.CALL_BYTES})), "EMSGSIZE"),
        (("end", "é"), "EINVAL"),
        (("end", "x" * limits.CALL_BYTES), "EMSGSIZE"),
    ],
)
def test_what_is_no_request_is_not_sent(
    script: Script,
    c_client: Callable[..., dict[str, str]],
    brought: str,
    arguments: tuple[str, ...],
    code: str,
) -> None:
    given = (brought if argument == BROUGHT else argument for argument in arguments)
    assert codes(c_client(script.path, *given)) == code
    assert script.calls == []


def test_a_call_as_long_as_the_daemon_takes(script: Script, c_client: Callable[..., dict[str, str]]) -> None:
    script.replies({})
    around = len('{"method":"org.kvmneg.End","parameters":{"vm":""}}')
    assert codes(c_client(script.path, "end", "x" * (limits.CALL_BYTES - around))) == ""
    assert len(script.calls[0]) == limits.CALL_BYTES + 1
    assert codes(c_client(script.path, "end", "x" * (limits.CALL_BYTES - around + 1))) == "EMSGSIZE"


# --- nobody there


@pytest.mark.parametrize(
    ("make", "code"),
    [("none", "ENOENT"), ("file", "ECONNREFUSED"), ("left", "ECONNREFUSED"), ("long", "EINVAL")],
)
def test_not_reachable(tmp_path: Path, c_client: Callable[..., dict[str, str]], make: str, code: str) -> None:
    path = tmp_path / ("x" * 108 if make == "long" else "socket")
    if make == "file":
        path.write_text("no socket")
    if make == "left":
        with socket.socket(socket.AF_UNIX) as left:
            left.bind(str(path))
    assert codes(c_client(path, "end", VM)) == code
    assert codes(c_client("", "end", VM)) == codes(c_client("-", "end", VM)) == "EINVAL"


def test_a_full_backlog(tmp_path: Path, c_client: Callable[..., dict[str, str]]) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as waiting:
        listener.bind(path)
        listener.listen(0)
        waiting.connect(path)
        assert codes(c_client(path, "end", VM, timeout=0.1)) == "ETIMEDOUT"
        assert codes(c_client(path, "interrupted-end", VM, timeout=0.1)) == "ETIMEDOUT"


# --- hostile servers


def nested(depth: int) -> bytes:
    """A reply of this depth: its own two objects, and arrays."""
    return b'{"parameters":{"new":' + b"[" * (depth - 2) + b"]" * (depth - 2) + b"}}\0"


HOSTILE: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "ECONNRESET"),
    "cut short": (json.dumps({"parameters": OFFER}).encode()[:-1], "ECONNRESET"),
    "without a NUL": (json.dumps({"parameters": OFFER}).encode(), "ECONNRESET"),
    "empty": (b"\0", "EBADMSG"),
    "no JSON": (b"{]\0", "EBADMSG"),
    "more after it": (b"{}{}\0", "EBADMSG"),
    "cut within": (b'{"parameters":{"digest":"sha\0', "EBADMSG"),
    "no UTF-8": (b'{"parameters":{"new":"\xc3\x28"}}\0', "EBADMSG"),
    "a comment": (b'{"parameters":{}/* */}\0', "EBADMSG"),
    "an array": (b"[]\0", "EBADMSG"),
    "null": (b"null\0", "EBADMSG"),
    "parameters of another type": (b'{"parameters":[]}\0', "EBADMSG"),
    "error of another type": (b'{"error":5}\0', "EBADMSG"),
    "error with a NUL": (b'{"error":"a\\u0000b"}\0', "EBADMSG"),
    "continues": (b'{"parameters":{},"continues":true}\0', "EBADMSG"),
    "continues of another type": (b'{"parameters":{},"continues":1}\0', "EBADMSG"),
    "too deep": (nested(DEPTH_MAX + 1), "EBADMSG"),
    "much too deep": (nested(10_000), "EBADMSG"),
    "huge": (b'{"parameters":{"new":"' + b"x" * REPLY_MAX + b'"}}\0', "EFBIG"),
    "huge, without a NUL": (b" " * (8 * REPLY_MAX), "EFBIG"),
    "many objects": (b'{"parameters":{"new":[' + b"{}," * CONTAINERS_MAX + b"{}]}}\0", "EFBIG"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("method", ["negotiate", "begin", "receive", "end"])
def test_a_reply_that_is_none(
    script: Script, c_client: Callable[..., dict[str, str]], brought: str, method: str, case: str
) -> None:
    reply, code = HOSTILE[case]
    script.replies(reply)
    receive = [brought, VM]
    arguments = {"negotiate": [REQUEST], "begin": [DIGEST, VM], "receive": receive, "end": [VM]}[method]
    given = c_client(script.path, method, *arguments)
    assert codes(given) == code
    assert set(given) == {"r", "descriptors"}  # nothing was given


@pytest.mark.parametrize(
    "changed",
    [
        *({name: wrong} for name in ("digest", "generation") for wrong in (None, [], {}, 1.5, True, "7", -1)),
        {"digest": DIGEST.upper()},
        {"digest": DIGEST[:-1]},
        {"digest": DIGEST + "0"},
        {"digest": DIGEST[:-1] + "\0"},
        {"generation": 10**4000},
        {"generation": 2**63},
        {"notGranted": {}},
        {"notGranted": ["x"]},
        {"notGranted": [None]},
        {"scope": "x"},
        {"scope": [["x"]]},
    ],
    ids=lambda changed: str(changed)[:40],
)
def test_an_offer_with_a_field_of_another_type(
    script: Script, c_client: Callable[..., dict[str, str]], changed: dict[str, Any]
) -> None:
    script.replies({"parameters": OFFER | changed})
    assert codes(c_client(script.path, "negotiate", REQUEST)) == "EBADMSG"


@pytest.mark.parametrize(
    "changed",
    [
        *({"path": wrong} for wrong in (None, 5, "", "run/x", "/a\0b", "/" + "x" * 4096)),
        {"digest": DIGEST.replace("0", "1")},
        {"digest": None},
        {"generation": -1},
        {"expiresInSeconds": "600"},
    ],
    ids=lambda changed: str(changed)[:40],
)
def test_a_grant_with_a_field_of_another_type(
    script: Script, c_client: Callable[..., dict[str, str]], changed: dict[str, Any]
) -> None:
    """A grant of another digest is none either: it would be another guest's."""
    script.replies({"parameters": GRANT | changed})
    expected = "EBADE" if changed.get("digest") else "EBADMSG"
    assert codes(c_client(script.path, "begin", DIGEST, VM)) == expected


def test_replies_at_the_limits(script: Script, c_client: Callable[..., dict[str, str]]) -> None:
    """As long, as deep, and with as many objects as is allowed."""
    script.replies(nested(DEPTH_MAX))
    assert codes(c_client(script.path, "end", VM)) == ""
    script.replies(b'{"parameters":{"new":[' + b"{}," * (CONTAINERS_MAX - 4) + b"{}]}}\0")
    assert codes(c_client(script.path, "end", VM)) == ""
    script.replies(b"{}" + b" " * (REPLY_MAX - 2) + b"\0")
    assert codes(c_client(script.path, "end", VM)) == ""
    script.replies(b"{}" + b" " * (REPLY_MAX - 1) + b"\0")
    assert codes(c_client(script.path, "end", VM)) == "EFBIG"


def test_a_silent_server(script: Script, c_client: Callable[..., dict[str, str]]) -> None:
    """It waits for the client to leave: who leaves is the client, for its time is over."""
    script.answer = lambda connection: connection.settimeout(20) or connection.recv(1)  # type: ignore[func-returns-value]
    assert codes(c_client(script.path, "end", VM, timeout=0.1)) == "ETIMEDOUT"
    assert codes(c_client(script.path, "end", VM, timeout=0)) == "ETIMEDOUT"


def test_a_slow_server_is_not_given_time_with_each_byte(
    script: Script, c_client: Callable[..., dict[str, str]]
) -> None:
    sent = 0

    def slowly(connection: socket.socket) -> None:
        nonlocal sent
        for _ in range(2000):
            connection.send(b" ")
            sent += 1
            time.sleep(0.01)

    script.answer = slowly
    assert codes(c_client(script.path, "end", VM, timeout=0.2)) == "ETIMEDOUT"
    assert 0 < sent < 2000  # it was cut off


@pytest.mark.parametrize("method", ["end", "interrupted-end"])
def test_a_reply_in_pieces(script: Script, c_client: Callable[..., dict[str, str]], method: str) -> None:
    """Also while a signal comes every 10 ms."""

    def pieces(connection: socket.socket) -> None:
        for byte in b'{"parameters":{}}\0':
            connection.send(bytes([byte]))
            time.sleep(0.005)

    script.answer = pieces
    assert codes(c_client(script.path, method, VM)) == ""


def test_a_server_that_closes_before_it_reads(
    script: Script, c_client: Callable[..., dict[str, str]]
) -> None:
    """No SIGPIPE; and what was written before the connection closed is read."""
    script.read_first = False
    assert codes(c_client(script.path, "end", "x" * 60_000)) == "ECONNRESET"
    script.replies(
        {"error": "org.kvmneg.LimitExceeded", "parameters": {"message": "limit CONNECTIONS exceeded"}}
    )
    given = c_client(script.path, "end", VM)
    assert (codes(given), given["message"]) == ("EREMOTEIO", "limit CONNECTIONS exceeded")


def test_a_server_that_does_not_read(tmp_path: Path, c_client: Callable[..., dict[str, str]]) -> None:
    """The call does not fit the socket's buffer: sending has its limit of time too."""
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        listener.bind(path)
        listener.listen(8)
        assert codes(c_client(path, "end", "x" * 60_000, timeout=0.1)) == "ETIMEDOUT"


def test_descriptors_that_come_along_are_closed(
    script: Script, c_client: Callable[..., dict[str, str]]
) -> None:
    """c_client() sees that none is left."""

    def send(connection: socket.socket) -> None:
        socket.send_fds(connection, [b"{}\0"], [0] * 20)

    script.answer = send
    assert codes(c_client(script.path, "end", VM)) == ""


# --- the library


def test_exports(tmp_path: Path, build_client: Callable[..., Path]) -> None:
    """What the header declares, each with its version, and nothing internal."""
    library = build_client(
        tmp_path / "libkvmneg-client.so",
        "-shared",
        "-fPIC",
        f"-Wl,--version-script={CLIENT / 'libkvmneg-client.map'}",
        *SOURCES,
        *LIBRARY,
    )
    listed = subprocess.run(["nm", "-D", library], capture_output=True, text=True, check=True).stdout
    exported = {line.split()[-1] for line in listed.splitlines() if " T " in line}
    assert exported == {
        f"kvmneg_{name}@@KVMNEG_CLIENT_0"
        for name in (
            "negotiate",
            "begin",
            "call",
            "receive",
            "started",
            "end",
            "offer_free",
            "refusal_free",
            "grant_free",
        )
    }


def test_the_header_is_a_binding(tmp_path: Path, build_client: Callable[..., Path], script: Script) -> None:
    """As it says: with KVMNEG_CDEF it is what cffi takes, and the library is called by it."""
    from cffi import FFI

    library = build_client(tmp_path / "client.so", "-shared", "-fPIC", *SOURCES, *LIBRARY)
    command = ["gcc", "-E", "-P", "-DKVMNEG_CDEF", "-x", "c", CLIENT / "kvmneg-client.h"]
    ffi = FFI()
    ffi.cdef(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    code = ffi.dlopen(str(library))
    assert code.KVMNEG_CLIENT_CALL_MAX == limits.CALL_BYTES
    script.replies({"parameters": {**OFFER, "notGranted": [BLOCKER]}})
    offer = ffi.new("struct kvmneg_offer **")
    r = code.kvmneg_negotiate(script.path.encode(), REQUEST.encode(), 20_000, offer, ffi.NULL)
    assert (r, ffi.string(offer[0].digest).decode()) == (0, DIGEST)
    assert ffi.string(offer[0].not_granted).decode() == BLOCKER_LINE
    assert code.kvmneg_offer_free(offer[0]) == ffi.NULL


def test_the_header_in_cpp_and_its_limits(tmp_path: Path) -> None:
    """It compiles as C++, and its limits are those of the daemon and the other client."""
    if not shutil.which("g++"):
        pytest.skip("g++ is not installed")
    source = tmp_path / "user.cc"
    source.write_text(
        '#include "kvmneg-client.h"\n'
        f"static_assert(KVMNEG_CLIENT_CALL_MAX == {limits.CALL_BYTES});\n"
        f"static_assert(KVMNEG_CLIENT_DEPTH_MAX == {limits.NESTING_DEPTH});\n"
        f"static_assert(KVMNEG_CLIENT_REPLY_MAX <= {limits.REPLY_BYTES});\n"
        "int main() { kvmneg_offer_free(nullptr); }\n"
    )
    flags = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", CLIENT, "-I", ROOT / "csrc", "-fsyntax-only")
    subprocess.run(["g++", *flags, source], check=True)
