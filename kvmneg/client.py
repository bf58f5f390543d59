# SPDX-License-Identifier: LGPL-2.1-or-later
"""A blocking client of kvmnegd: what a VMM written in Python, and `kvmneg`, call it with.

    with Client() as kvmnegd:
        offer = kvmnegd.negotiate({"level": "x86-64-v2", "optional": ["avx2"]})
        granted = kvmnegd.begin(offer["digest"], vm)     # granted["path"]: the contract's binary form

Each method is its twin's in the .varlink files, with the same fields in parameters and replies. What the daemon
refuses is raised as the error class it has in kvmneg.errors; a daemon that does not answer is Unreachable.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import stat
import struct
import time

from kvmneg import errors, limits
from kvmneg.client_fence import FenceCalls, given
from kvmneg.client_guests import GuestCalls
from kvmneg.client_rollback import RollbackCalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType
    from typing import Any

DEFAULT_SOCKET = "/run/kvmneg/org.kvmneg"
DEFAULT_TIMEOUT = 30.0  # seconds for one reply: Begin and Pin measure the host before they answer
_CHUNK = 64 * 1024
_TIMEVAL = struct.Struct("ll")  # of SO_SNDTIMEO; zero waits for ever

# Exit codes (kvmneg(1)) of errors that have no class of their own.
_EXIT_CODES = {
    "org.varlink.service.InvalidParameter": errors.UsageError.exit_code,
}


class Client(FenceCalls, GuestCalls, RollbackCalls):
    """One connection, made with the first call. Not for several threads at once.

    After a failure of the connection (Unreachable) the next call makes a new one. Where a daemon was restarted between
    two calls that is made at once, unless the old one keeps a contract. No call is sent twice that it may have seen.
    """

    def __init__(
        self,
        path: str = DEFAULT_SOCKET,
        *,
        timeout: float | None = DEFAULT_TIMEOUT,
        interactive: bool = False,
    ) -> None:
        """`timeout` is in seconds for each reply; None waits for ever.

        With `interactive` polkit may ask a person whether calls are permitted that need an admin, which takes longer.
        """
        self.path = path
        self.timeout = timeout
        self.interactive = interactive
        self._socket: socket.socket | None = None
        self._holds = False  # whether a contract may be kept by this connection, which no other one replaces
        self._received = bytearray()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection. A VM's contract does not depend on it."""
        self._received.clear()
        self._holds = False
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    # --- org.kvmneg

    def get_host(self) -> dict[str, Any]:
        """host (kvmneg.report/1), generation, state, fence."""
        return self.call("org.kvmneg.GetHost")

    def negotiate(self, request: Mapping[str, Any], *, digest_only: bool = False) -> dict[str, Any]:
        """contract (kvmneg.contract/1), digest, generation, notGranted, scope. Raises Blocked, Breached, UsageError.

        With `digest_only` there is no contract: for a caller that takes its binary form from `begin`.
        """
        wanted = given(request=dict(request), digestOnly=digest_only or None)
        return self.call("org.kvmneg.Negotiate", wanted)

    def begin(
        self, digest: str, vm: str, *, hold: bool | None = None, pid: int | None = None
    ) -> dict[str, Any]:
        """digest, generation, path, expiresInSeconds, incarnation. Raises StaleOffer, NoSuchContract, Breached.

        With `hold` the contract is kept while this connection is open, with `pid` while that process lives.
        """
        return self.call("org.kvmneg.Begin", given(digest=digest, vm=vm, hold=hold, pid=pid))

    def started(self, vm: str, *, incarnation: int | None = None) -> None:
        """The VM runs. Raises UsageError where it holds no contract, NotPermitted."""
        self.call("org.kvmneg.Started", given(vm=vm, incarnation=incarnation))

    def end(self, vm: str, *, incarnation: int | None = None) -> None:
        """The VM is gone. Raises UsageError where it holds no contract, NotPermitted."""
        self.call("org.kvmneg.End", given(vm=vm, incarnation=incarnation))

    def check(
        self, request: Mapping[str, Any] | None = None, *, digest: str | None = None, vmm: str | None = None
    ) -> dict[str, Any]:
        """fits, blockers, scope: may a guest with this request, or this contract, come here? Stores nothing.

        `vmm` goes with a digest; a request names its own.
        """
        asked = None if request is None else dict(request)
        return self.call("org.kvmneg.Check", given(request=asked, digest=digest, vmm=vmm))

    def get_contract(self, digest: str) -> dict[str, Any]:
        """contract, path, state. Raises NoSuchContract."""
        return self.call("org.kvmneg.GetContract", {"digest": digest})

    def watch(self) -> Iterator[dict[str, Any]]:
        """The state now and with every change: generation, fenceDigest, state, hostDigest. Waits without a limit."""
        return self.call_more("org.kvmneg.Watch")

    # --- org.varlink.service

    def get_info(self) -> dict[str, Any]:
        """vendor, product, version, url, interfaces."""
        return self.call("org.varlink.service.GetInfo")

    def get_interface_description(self, interface: str) -> str:
        """The .varlink file of an interface of the daemon."""
        reply = self.call("org.varlink.service.GetInterfaceDescription", {"interface": interface})
        return str(reply["description"])

    # --- the protocol (UAPI.20)

    def call(self, method: str, parameters: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Call a method that replies once. Raises what the daemon refuses with, Unreachable, NotPermitted."""
        timeout = self.timeout
        if self.interactive:
            from kvmneg.client_permission import FIELD, METHODS  # rarely

            if method in METHODS:
                parameters = {FIELD: True, **(parameters or {})}
                timeout = None if timeout is None else timeout + limits.POLKIT_SECONDS
        self._send(method, parameters, more=False)
        reply, continues = self._reply(timeout)
        if continues:
            raise self._lost("it replies more than once to a call that did not ask for it")
        return reply

    def call_more(self, method: str, parameters: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
        """Call a method that may reply many times. Leaving the iteration early closes the connection."""
        self._send(method, parameters, more=True)
        continues, timeout = True, self.timeout
        try:
            while continues:
                reply, continues = self._reply(timeout)
                timeout = None  # the first is owed at once, the others come when there is something to tell
                yield reply
        finally:
            if continues:
                self.close()  # the only way to end such a call

    def _connected(self) -> socket.socket:
        if self._socket is None:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # Not settimeout: that connects without blocking, and a full backlog fails at once instead of after a while.
            seconds, part = divmod(self.timeout or 0.0, 1)
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(int(seconds), int(part * 1e6))
            )
            try:
                connection.connect(self.path)
            except OSError as error:
                connection.close()
                raise self._unreachable(error) from None
            self._socket = connection
        return self._socket

    def _send(self, method: str, parameters: Mapping[str, Any] | None, *, more: bool) -> None:
        if self._received:
            self.close()  # left by a reply that was one too many
        call: dict[str, Any] = {"method": method}
        if parameters:
            call["parameters"] = parameters
        if more:
            call["more"] = True
        encoded = json.dumps(call, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\0"
        if len(encoded) > limits.CALL_BYTES + 1:
            raise errors.LimitExceeded("CALL_BYTES", limits.CALL_BYTES, f"{method} was called with more")
        again = self._socket is not None and not self._holds
        self._holds = self._holds or bool(parameters and parameters.get("hold"))
        if not self._delivered(encoded) and again:
            self.close()  # a daemon that was restarted since the last call: it has seen nothing of this one
            self._delivered(encoded)

    def _delivered(self, call: bytes) -> bool:
        """Whether there is a reply to wait for: not where the daemon closed the connection before, without a word."""
        connection = self._connected()
        try:
            connection.settimeout(self.timeout)
            connection.sendall(call)
        except TimeoutError:
            raise self._lost(f"it took no call for {self.timeout:g} seconds") from None
        except BrokenPipeError:
            try:
                return bool(connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))  # why it did
            except BlockingIOError:
                return False  # it is about to
            except OSError:
                return True
        except OSError:
            pass  # why may be there to read
        return True

    def _reply(self, timeout: float | None) -> tuple[dict[str, Any], bool]:
        """(parameters, continues) of the next reply."""
        try:
            reply = json.loads(self._message(timeout).decode("utf-8"))
        except (ValueError, RecursionError):
            raise self._lost("its reply is not JSON") from None
        if type(reply) is not dict:
            raise self._lost("its reply is not an object")
        name, parameters = reply.get("error"), reply.get("parameters")
        parameters = {} if parameters is None else parameters
        if type(parameters) is not dict or not isinstance(name, str | None):
            raise self._lost("its reply is not one of varlink")
        if name is not None:
            raise _refusal(name, parameters)
        return parameters, reply.get("continues") is True

    def _message(self, timeout: float | None) -> bytes:
        """One message, without its NUL. Time counts for the whole of it."""
        connection, received = self._connected(), self._received
        deadline = None if timeout is None else time.monotonic() + timeout
        searched = 0
        while (end := received.find(0, searched)) < 0:
            searched = len(received)
            if searched > limits.REPLY_BYTES:
                raise self._lost(f"its reply is longer than {limits.REPLY_BYTES} bytes")
            try:
                connection.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
                data = connection.recv(_CHUNK)
            except TimeoutError:
                raise self._lost(f"no whole reply within {timeout:g} seconds") from None
            except OSError as error:
                raise self._lost(f"reading its reply failed: {error.strerror}") from None
            if not data:
                what = "in the middle of a reply" if received else "without a reply"
                raise self._lost(f"it closed the connection {what}")
            received += data
        message = bytes(received[:end])
        del received[: end + 1]
        return message

    def _lost(self, why: str) -> errors.Unreachable:
        """The connection cannot be used any more: whatever comes would be taken for another call's reply."""
        self.close()
        return errors.Unreachable(
            f"kvmnegd on {self.path} does not answer: {why}",
            hint="`systemctl status kvmneg` shows how it is",
        )

    def _unreachable(self, error: OSError) -> errors.KvmnegError:
        if error.errno in (errno.EACCES, errno.EPERM):
            return errors.NotPermitted(
                f"may not connect to {self.path}", hint="its directory or the socket itself denies this user"
            )
        why = os.strerror(error.errno) if error.errno else str(error)
        if error.errno == errno.EAGAIN:
            why = f"it took no connection for {self.timeout:g} seconds"
        start = (
            "systemctl start kvmneg.socket"
            if self.path == DEFAULT_SOCKET
            else f"kvmnegd --socket {self.path}"
        )
        hint = f"start it with `{start}`"
        if error.errno in (errno.ECONNREFUSED, errno.ENOTDIR) and not _may_be_socket(self.path):
            why, hint = "that is no socket", "name the socket that kvmnegd serves on"
        return errors.Unreachable(f"kvmnegd is not reachable on {self.path}: {why}", hint=hint)


def _may_be_socket(path: str) -> bool:
    """Whether a daemon could serve there: a plain file, or a path below one, refuses a connection as well."""
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)
    except FileNotFoundError:
        return True  # gone meanwhile
    except OSError:
        return False


def _refusal(name: str, parameters: dict[str, Any]) -> errors.KvmnegError:
    """The error of an error reply. Those of org.varlink.service carry no message: say what they mean."""
    if name.startswith("org.varlink.service."):
        value = next(iter(parameters.values()), "")
        what = {
            "InvalidParameter": f"kvmnegd refuses the parameter {value!r}",
            "MethodNotFound": f"kvmnegd has no method {value}",
            "InterfaceNotFound": f"kvmnegd has no interface {value!r}",
        }.get(name.rpartition(".")[2], name)
        error = errors.KvmnegError(
            what, hint="is kvmnegd of another version than this client?", varlink=name, **parameters
        )
    else:
        error = _of_family(name, parameters)
    error.exit_code = _EXIT_CODES.get(name, error.exit_code)
    return error


def _of_family(name: str, parameters: dict[str, Any]) -> errors.KvmnegError:
    """The daemon's class, message, hint and fields. Of a name that this version does not know, the family's first."""
    error = errors.KvmnegError.__new__(errors.BY_VARLINK_NAME.get(name, errors.KvmnegError))
    fields = dict(parameters)
    message, hint = fields.pop("message", None), fields.pop("hint", None)
    errors.KvmnegError.__init__(error, message or name, hint=hint or "", **fields)
    if isinstance(error, errors.Blocked):
        from kvmneg.features.difference import Blocker  # only of a no

        error.blockers = tuple(Blocker.from_json(row) for row in error.fields.pop("blockers", ()))
    return error
