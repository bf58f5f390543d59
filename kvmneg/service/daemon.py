# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmnegd(8): measures, opens the store, serves. Everything is put together here, nothing is decided.

The order counts: the listening socket exists first (a client that comes early waits in its backlog), then the state,
then the first measurement, then READY=1.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from functools import partial

from kvmneg import limits
from kvmneg.errors import KvmnegError, StoreError, UsageError
from kvmneg.service import options, systemd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from kvmneg.service.node import Measurer, Node
    from kvmneg.service.options import Options
    from kvmneg.service.varlink import Server
    from kvmneg.service.vmms import VmmLookup

_EXPIRY_SECONDS = 30.0
_LOOKUP_SECONDS = 0.5
_OWN_DESCRIPTORS = 128  # SQLite's, epoll's, and those a measurement opens


def main() -> int:
    """The entry point: exit status as in kvmneg(1)."""
    try:
        serve(options.parse(sys.argv[1:]))
    except KvmnegError as error:
        sys.stderr.write(f"kvmnegd: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        from traceback import print_exc

        print_exc()
        return KvmnegError.exit_code
    return 0


def serve(arguments: Options) -> None:
    """Serve until SIGTERM or SIGINT. Raises UsageError, StoreError, BadInput."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until there is a loop to end
    _raise_descriptor_limit()
    inherited = systemd.inherited_listener()
    path = str(inherited.getsockname()) if inherited else arguments.socket
    listener = inherited or _listener(path)
    try:
        _serve_on(listener, path, arguments)
    finally:
        listener.close()
        if not inherited:
            _unlink(path)


def _serve_on(listener: socket.socket, path: str, arguments: Options) -> None:
    from kvmneg.policy.fence import Fence
    from kvmneg.service.contracts import ContractFiles
    from kvmneg.service.node import Node
    from kvmneg.service.router import Router
    from kvmneg.service.varlink import Server
    from kvmneg.store.sqlite import SqliteStore

    with SqliteStore(arguments.state, verify=lambda text: Fence.parse(text).digest) as store:
        measurer, lookup = _measurer(arguments)
        node = Node(store, measurer, ContractFiles(os.path.join(os.path.dirname(path) or ".", "contracts")))
        router = Router(node)
        server = Server(listener, router)
        router.attach(server)
        server.on_internal_error = _print_internal_error
        server.on_trouble = _print_trouble
        _schedule(server, node)
        node.changed.append(lambda: _tell_systemd(node))
        _announce(node)
        if lookup:
            # not before the calls that wait have their answers: it takes a processor for a while
            server.after(_LOOKUP_SECONDS, partial(lookup.start, server, node))
        server.run()


def _measurer(arguments: Options) -> tuple[Measurer, VmmLookup | None]:
    """What measures: this host, with a look for its VMM builds, or a recorded report."""
    if arguments.report:
        from kvmneg.service.recorded import RecordedMeasurer

        return RecordedMeasurer(arguments.report), None
    from kvmneg.host.measure import Measurer as HostMeasurer
    from kvmneg.service.vmms import VmmLookup

    measurer = HostMeasurer(arguments.kvm)
    return measurer, VmmLookup(arguments.state, measurer)


def _listener(path: str) -> socket.socket:
    """A socket that listens on `path`. Raises UsageError, StoreError."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    temporary = f"{path}.{os.getpid()}"
    try:
        _clear(path)
        if os.path.dirname(path):
            os.makedirs(os.path.dirname(path), 0o755, exist_ok=True)
        listener.bind(temporary)
        os.chmod(
            temporary, 0o666
        )  # every user's VMM may ask; who may pin is judged by the peer's credentials
        listener.listen(limits.CONNECTIONS)
        os.rename(temporary, path)  # whoever sees the path can connect to it
    except OSError as error:
        listener.close()
        _unlink(temporary)
        raise UsageError(
            f"cannot serve on {path}: {error.strerror or error}", hint="name another socket with --socket"
        ) from None
    except BaseException:
        listener.close()
        raise
    return listener


def _clear(path: str) -> None:
    """Remove a socket that nobody listens on any more; leave anything else alone. Raises StoreError, OSError."""
    if not os.path.exists(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)  # left behind by a daemon that was killed
            return
    raise StoreError(
        f"another kvmnegd serves on {path}", hint="stop it, or name another socket with --socket"
    )


def _schedule(server: Server, node: Node) -> None:
    """Signals, the watchdog, and the expiry of grants, in the server's loop."""

    def stop(*_: object) -> None:
        systemd.stopping()
        server.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    seconds = systemd.watchdog_seconds()
    if seconds:
        server.every(seconds, _watchdog)
    server.every(_EXPIRY_SECONDS, node.expire)


def _raise_descriptor_limit() -> None:
    """Room for every connection the limits allow, beside what the daemon itself needs."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = limits.CONNECTIONS + _OWN_DESCRIPTORS
    if soft < wanted and (hard == resource.RLIM_INFINITY or soft < hard):
        hardest = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hardest, hard))


def _announce(node: Node) -> None:
    systemd.ready(_status(node))
    if node.state in ("unmeasured", "breached"):
        sys.stderr.write(f"kvmnegd: {_trouble_of(node)}\n")


def _trouble_of(node: Node) -> str:
    try:
        node.report  # noqa: B018 (it raises the reason)
    except KvmnegError as error:
        return str(error)
    return "this host offers less than the pinned fence: no new contract is given; see `kvmneg fence show`"


def _status(node: Node) -> str:
    fence = f"fence {node.fence.digest[:19]}" if node.fence else "no fence"
    return f"{node.state}, generation {node.generation}, {fence}"


def _leave(*_: object) -> None:
    raise SystemExit(0)


def _watchdog() -> None:
    systemd.watchdog()


def _tell_systemd(node: Node) -> None:
    systemd.status(_status(node))


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass


def _print_internal_error(error: BaseException) -> None:
    from traceback import print_exception

    print_exception(error)


def _print_trouble(text: str) -> None:
    sys.stderr.write(f"kvmnegd: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
