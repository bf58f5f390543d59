# SPDX-License-Identifier: LGPL-2.1-or-later
"""kvmnegd(8): measures, opens the store, serves. Everything is put together here, nothing is decided.

The order counts: the listening socket exists first (a client that comes early waits in its backlog), then the state,
then the first measurement, then READY=1.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys

from kvmneg.errors import KvmnegError
from kvmneg.service import announcing, authorization, lifecycle, listening, options, systemd

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.errors import LimitExceeded
    from kvmneg.host.apart import Apart
    from kvmneg.service.bus.child import Bus
    from kvmneg.service.interfaces.router import Router
    from kvmneg.service.node import Measurer, Node
    from kvmneg.service.options import Options
    from kvmneg.service.varlink.peer import Peer
    from kvmneg.service.varlink.server import Server
    from kvmneg.service.watching.first import First
    from kvmneg.service.watching.proofs import Prover
    from kvmneg.service.watching.vmms import VmmLookup


def main() -> int:
    """The entry point: exit status as in kvmneg(1)."""
    gc.disable()  # until it serves: what a start makes is there to stay, and to look through it costs 3 ms
    try:
        arguments = options.parse(sys.argv[1:])
        if not arguments.check:
            serve(arguments)
    except KvmnegError as error:
        _refuse(error)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        from traceback import print_exc

        print_exc()
        return KvmnegError.exit_code
    return 0


def _refuse(error: KvmnegError) -> None:
    """Why there is no daemon; of a reload's check, why its settings stay as they were."""
    if "--check" in sys.argv:
        from kvmneg.service import journal, telling

        if journal.stderr_is_journal():
            telling.not_reloaded(str(error.fields.get("file") or ""), error)
            return
    sys.stderr.write(f"kvmnegd: {error}\n")


def serve(arguments: Options) -> None:
    """Serve until SIGTERM or SIGINT. Raises UsageError, StoreError, BadInput."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)  # until there is a loop to end
    if arguments.settings:
        arguments.settings.apply()
    lifecycle.raise_descriptor_limit()
    inherited = systemd.inherited()
    if inherited.listener:
        _serve_on(inherited.listener, listening.path_of(inherited.listener), arguments, inherited)
        return
    path = os.path.abspath(arguments.socket)
    with listening.listener(path) as listener:
        ours = listening.identity(path)
        try:
            _serve_on(listener, path, arguments, inherited)
        finally:
            # while it still listens: once it does not, another daemon may serve there
            if ours and listening.identity(path) == ours:
                listening.unlink(path)


def _serve_on(listener: socket.socket, path: str, arguments: Options, inherited: systemd.Inherited) -> None:
    from kvmneg.policy.fence_text import Fence
    from kvmneg.service.interfaces.router import Router
    from kvmneg.service.leases.contracts import ContractFiles
    from kvmneg.service.level.restoring import Copier
    from kvmneg.service.node import Node
    from kvmneg.service.varlink.server import Server
    from kvmneg.service.watching.first import First
    from kvmneg.store.opening import open_store

    with open_store(arguments.state, lambda text: Fence.parse(text).digest) as store:
        apart = _apart(path) if inherited.listener else None
        measurer, later = _measurer(arguments, apart)
        files = ContractFiles(os.path.join(os.path.dirname(path), "contracts"))
        descriptors = systemd.descriptors(inherited)
        first = None if arguments.report else First(measurer)
        node = Node(store, first or measurer, files, _print_trouble, boot=_boot(), descriptors=descriptors)
        node.apart, node.events = apart, inherited.events
        router = Router(node)
        server = Server(listener, router)
        router.attach(server)
        server.on_internal_error = _print_internal_error
        server.on_trouble = _print_trouble
        server.on_limit = _tell_limit
        server.acceptor.preferred = authorization.is_preferred
        bus = _bus(router, arguments)
        lifecycle.schedule(server, node, arguments, lambda: announcing.status(node), router)
        node.leases.start(server)
        server.after(announcing.LATER_SECONDS, lambda: _follow_strangers(server, node))
        node.changed.append(lambda: announcing.tell_systemd(node))
        announcing.follow(server, node)
        announcing.announce(node)
        server.after(announcing.LATER_SECONDS, lambda: announcing.tell_start(node))
        if first is not None:
            server.after(
                announcing.LATER_SECONDS, lambda: _watch(server, node, measurer, arguments.kvm, first)
            )
        for one in later:
            one.start(server, node)
        copier = Copier(server, node, _print_trouble)
        if bus is not None:
            bus.start(server, node)
        gc.freeze()
        gc.enable()
        server.run()
        copier.copy()


def _bus(router: Router, arguments: Options) -> Bus | None:
    """D-Bus, where it is on."""
    if arguments.bus is None:
        return None
    from kvmneg.service.bus.child import Bus

    router.bus = Bus(arguments.bus, router, router.event)
    router.bus.on_trouble = _print_trouble
    return router.bus


def _apart(path: str) -> Apart | None:
    """Who looks at what systemd keeps from this one: the unit whose socket is beside the daemon's own."""
    beside = os.path.join(os.path.dirname(path), "measure")
    if not os.path.exists(beside):
        return None
    from kvmneg.host.apart import Apart  # only with units

    found = Apart(beside)
    found.hurry()  # it starts while the store is opened and KVM is asked
    return found


def _measurer(arguments: Options, apart: Apart | None) -> tuple[Measurer, list[VmmLookup | Prover]]:
    """What measures, and what finds out more when it serves: of this host its VMM builds and what guests see.

    Of a recorded report nothing.
    """
    if arguments.report:
        from kvmneg.service.watching.recorded import RecordedMeasurer

        return RecordedMeasurer(arguments.report), []
    from kvmneg.host.measure import Measurer as HostMeasurer
    from kvmneg.service.watching.proofs import Prover
    from kvmneg.service.watching.vmms import VmmLookup

    host = HostMeasurer(arguments.kvm)
    host.networked = apart.network if apart else None
    lookup = VmmLookup(arguments.state, host)
    return lookup, [lookup, Prover(arguments.state, arguments.kvm, host)]


def _boot() -> str:
    """This boot of the host, and the pid namespace in which the daemon's numbers of processes hold."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _follow_strangers(server: Server, node: Node) -> None:
    from kvmneg.service.telling import Strangers  # as in _tell_start

    Strangers(server, node.unknown)
    node.unknown.start(server)


def _watch(server: Server, node: Node, measurer: Any, path: str, first: First) -> None:
    """The first measurement was made here, and so are those before this: no client waits for the modules."""
    from kvmneg.service.watching.again import Again
    from kvmneg.service.watching.watch import Watcher

    node.again = Again(server, node, measurer, path)
    node.again.done.append(server.unpark)
    if first.hangs():
        node.again.beside(first.hangs)
    Watcher(server, node, path).start()


def _tell_limit(error: LimitExceeded, peer: Peer) -> None:
    from kvmneg.service import telling  # rarely

    telling.limit(error, peer)


def _leave(*_: object) -> None:
    raise SystemExit(0)


def _print_internal_error(error: BaseException) -> None:
    if isinstance(error, KvmnegError):  # of a timer: nobody else is told
        _print_trouble(str(error))
        return
    from traceback import print_exception

    print_exception(error)


def _print_trouble(text: str) -> None:
    try:
        from kvmneg.service import telling  # where there is any

        telling.trouble(text)
    except (ImportError, OSError):  # no descriptor is left, not even for reading a module
        sys.stderr.write(f"kvmnegd: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
