# SPDX-License-Identifier: LGPL-2.1-or-later
"""Measuring again in a child: what it finds is taken up, and one that hangs, dies or says too much stops nobody."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import pytest

from kvmneg import limits
from kvmneg.errors import KvmFault, KvmnegError, NoKvm, Unreachable
from kvmneg.features.report import Report
from kvmneg.service.interfaces.router import Router
from kvmneg.service.level import moves
from kvmneg.service.level.moves import Asked
from kvmneg.service.varlink.loop import Loop
from kvmneg.service.varlink.server import Later
from kvmneg.service.watching.again import Again, Measuring

from .conftest import Daemon, Host
from .test_node import ASKER, AUDIT, AVX2, PEER, V2, VM

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from kvmneg.service.node import Node

# pytest-xdist's worker has threads; a daemon has one
pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
WORD = "cpuid:0x7.0.ebx"


class Apart(Host):
    """A host whose measurement can be made in a child. `how` is done there in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.how: Callable[[], Report] | None = None
        self.marks = 0

    def mark(self) -> None:
        self.marks += 1
        self.moved = False

    def take(self) -> Report:
        if self.how is not None:
            return self.how()
        if self.error is not None:
            raise self.error
        return Report.from_json(self.document)

    def doubt(self) -> None:
        self.moved = True


class Turning(Loop):
    """A loop that turns while a test says so, on a clock that a test may set forward."""

    def __init__(self) -> None:
        self.ahead = 0.0
        super().__init__(lambda: time.monotonic() + self.ahead)

    def turn(self) -> None:
        found = [fd for fd, _ in self.epoll.poll(0.01)]
        self._run_timers()
        self._call_back(found)

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < end
            self.turn()


@pytest.fixture
def host() -> Apart:
    return Apart()


@pytest.fixture
def loop() -> Iterator[Turning]:
    found = Turning()
    yield found
    found.epoll.close()


@pytest.fixture
def apart(node: Node, host: Apart, loop: Turning) -> Iterator[Again]:
    node.again = Again(loop, node, host, os.devnull)  # a device that is there
    yield node.again
    end(node.again)


def end(again: Again) -> None:
    """No child outlives its test."""
    if again.busy:
        again._forget_child(kill=True)
    for child in again._ending:
        os.waitpid(child, 0)


def lose(host: Host) -> None:
    host.lose(WORD, AVX2)


def offers(node: Node) -> bool:
    return bool(node.report.offer.value(WORD) & AVX2)


def hang() -> Report:
    signal.pause()
    raise AssertionError("nobody sends it a signal")


def test_a_change_is_measured_in_a_child(node: Node, host: Apart, apart: Again, loop: Turning) -> None:
    told: list[bool] = []
    node.changed.append(lambda: told.append(offers(node)))
    node.refresh()
    assert not apart.busy
    lose(host)
    before = host.measured
    node.refresh()
    assert apart.busy
    loop.until(lambda: not apart.busy)
    assert told == [False]
    assert host.measured == before  # not here
    (child,) = apart._ending
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    loop.ahead += 1
    loop.turn()
    assert apart._ending == []
    with pytest.raises(ChildProcessError):
        os.waitpid(child, 0)
    node.refresh(fresh=True)
    assert not apart.busy


def test_nothing_new_is_granted_meanwhile(node: Node, host: Apart, apart: Again, loop: Turning) -> None:
    digest = node.negotiate(V2, PEER).contract.digest
    lose(host)
    with pytest.raises(Measuring):
        node.begin(digest, VM, ASKER)
    with pytest.raises(Measuring):
        moves.pin(node, "host", None, None, AUDIT)
    node.keep_up()  # asks for nothing
    assert node.store.leases.outstanding() == [] and node.generation == 0
    loop.until(lambda: not apart.busy)
    assert node.begin(digest, VM, ASKER)[0].digest == digest.removeprefix("sha256:")


def test_a_call_is_answered_when_it_is_done(node: Node, host: Apart, apart: Again, loop: Turning) -> None:
    """The reply that was kept is not given out either: the watcher saw a change, so it is a second old no more."""
    router = Router(node)
    router.attach(cast("Any", SimpleNamespace(clock=loop.clock, after=loop.after)))
    call = b'{"method":"org.kvmneg.GetHost"}\0'
    connection = cast("Any", SimpleNamespace(peer=PEER, raw=call))
    router.call(connection, "org.kvmneg.GetHost", {}, False, False)
    assert router.cached(call) is not None
    lose(host)
    apart.begin()
    assert router.cached(call) is None
    with pytest.raises(Later):
        router.call(connection, "org.kvmneg.GetHost", {}, False, False)
    done: list[int] = []
    apart.done.append(lambda: done.append(1))
    loop.until(lambda: bool(done))
    reply = router.call(connection, "org.kvmneg.GetHost", {}, False, False)
    assert reply is not None and node.report.to_json()["offer"][WORD].encode() in reply


@pytest.mark.parametrize(
    "error",
    [
        NoKvm("gone", hint="look", cause="module"),
        KvmFault("KVM_CREATE_VM", 12, "scratch"),
        KvmnegError("odd", hint="h"),
    ],
)
def test_an_error_crosses(node: Node, host: Apart, apart: Again, loop: Turning, error: KvmnegError) -> None:
    host.error, host.moved = cast("Any", error), True
    node.refresh()
    loop.until(lambda: not apart.busy)
    with pytest.raises(type(error)) as caught:
        node.report  # noqa: B018
    assert (str(caught.value), caught.value.fields) == (str(error), error.fields)
    assert node.state == "unmeasured"


def fault() -> Report:
    raise ZeroDivisionError


def killed() -> Report:
    os.kill(os.getpid(), signal.SIGSEGV)
    return hang()


def no_report() -> Report:
    return cast("Report", SimpleNamespace(to_json=lambda: {"format": "another"}))


def too_much() -> Report:
    text = "x" * (limits.REPORT_BYTES + 1)
    return cast("Report", SimpleNamespace(to_json=lambda: text))


@pytest.mark.parametrize("how", [fault, killed, no_report, too_much])
def test_a_child_that_ends_otherwise(
    node: Node, host: Apart, apart: Again, loop: Turning, how: Callable[[], Report]
) -> None:
    host.how, host.moved = how, True
    node.refresh()
    loop.until(lambda: not apart.busy)
    with pytest.raises(KvmnegError, match="internal error while this host was measured"):
        node.report  # noqa: B018
    host.how = None
    loop.ahead += limits.VOLATILE_SECONDS
    node.refresh()
    loop.until(lambda: not apart.busy)
    assert offers(node)


def test_a_child_has_nothing_of_the_daemon_s(node: Node, host: Apart, apart: Again, loop: Turning) -> None:
    """A connection or a lock in a child that hangs for good would outlive the daemon."""

    def look() -> Report:
        host.document["combo"] = {
            **host.document["combo"],
            "kernel": " ".join(sorted(os.listdir("/proc/self/fd"))),
            "cmdline": str(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL),
        }
        return Report.from_json(host.document)

    host.how, host.moved = look, True
    node.refresh()
    loop.until(lambda: not apart.busy)
    # the fourth is the directory's that is listed
    assert (node.report.combo["kernel"], node.report.combo["cmdline"]) == ("0 1 2 3 4", "True")


def test_one_that_hangs(node: Node, host: Apart, apart: Again, loop: Turning) -> None:
    node.pin("host", None, None, AUDIT)
    done: list[int] = []
    apart.done.append(lambda: done.append(1))
    host.how, host.moved = hang, True
    node.refresh()
    loop.turn()
    assert apart.busy and node.state == "pinned"
    loop.ahead += limits.MEASURE_SECONDS
    loop.until(lambda: not apart.busy)
    assert done == [1] and node.state == "unmeasured"
    with pytest.raises(NoKvm, match="did not end in 10 seconds") as caught:
        node.negotiate(V2, PEER)
    assert caught.value.fields["cause"] == "wedged"
    for _ in range(3):  # whoever asks gets the reason, and starts nothing
        node.refresh(fresh=True)
        node.measure_again()
    assert not apart.busy
    with pytest.raises(NoKvm, match="does not answer"):
        moves.pin(node, "host", None, None, AUDIT)
    os.waitid(os.P_PID, apart._child, os.WEXITED | os.WNOWAIT)
    host.how = None
    loop.ahead += limits.MEASURE_RETRY_SECONDS
    loop.until(lambda: node.state == "pinned")
    assert offers(node)


def test_none_beside_one_that_hangs_still(
    node: Node, host: Apart, apart: Again, loop: Turning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that waits uninterruptibly outlives its SIGKILL: another one would wait beside it."""
    with monkeypatch.context() as kernel:
        kernel.setattr(os, "kill", lambda pid, number: None)
        host.how, host.moved = hang, True
        node.refresh()
        child = apart._child
        loop.ahead += limits.MEASURE_SECONDS
        loop.until(lambda: not apart.busy)
    host.how, marks = None, host.marks
    pauses = []
    for _ in range(7):
        pauses.append(apart._pause)
        loop.ahead += apart._pause
        loop.turn()
    assert pauses == [10.0, 20.0, 40.0, 80.0, 160.0, 320.0, limits.MEASURE_RETRY_MOST_SECONDS]
    assert host.marks == marks and not apart.busy
    os.kill(child, signal.SIGKILL)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    loop.ahead += apart._pause
    loop.until(lambda: node.last_report is not None)
    assert offers(node)


def test_what_changes_meanwhile_is_measured_too(node: Node, host: Apart, apart: Again, loop: Turning) -> None:
    done: list[int] = []
    apart.done.append(lambda: done.append(1))
    host.moved = True
    node.refresh()
    lose(host)
    node.measure_again()
    node.measure_again()
    loop.until(lambda: bool(done))
    assert host.marks == 2 and done == [1]
    assert not offers(node)


def commit(node: Node) -> dict[str, Any]:
    return moves.commit(node, None, AUDIT)


@pytest.fixture
def raising(node: Node) -> Node:
    """With a proposal that can be committed."""
    node.pin("level:x86-64-v2", None, None, AUDIT)
    moves.raise_(node, Asked("host"), None, AUDIT)
    return node


def test_a_commit_is_put_off_until_it_is_done(raising: Node, apart: Again, loop: Turning) -> None:
    """The loop turns meanwhile; the same call, made again, measures no second time."""
    before = raising.measurements
    for _ in range(3):
        with pytest.raises(Measuring):
            commit(raising)
    loop.until(lambda: not apart.busy)
    assert raising.measurements == before + 1
    assert commit(raising)["generation"] == 2
    assert raising.measurements == before + 1 and not apart.busy


def test_each_commit_has_a_measurement_of_its_own(raising: Node, apart: Again, loop: Turning) -> None:
    """One that was begun for a call whose caller has gone serves no other a while later."""
    with pytest.raises(Measuring):
        commit(raising)
    loop.until(lambda: not apart.busy)
    loop.ahead += 2
    with pytest.raises(Measuring):
        commit(raising)
    loop.until(lambda: not apart.busy)
    assert commit(raising)["generation"] == 2


def test_one_that_was_under_way_before_a_commit_is_not_enough(
    raising: Node, host: Apart, apart: Again, loop: Turning
) -> None:
    host.how = hang
    apart.begin()
    before, host.how = apart._child, None
    with pytest.raises(Measuring):
        commit(raising)
    assert apart.busy and apart._child != before
    loop.until(lambda: not apart.busy)
    assert commit(raising)["generation"] == 2


def test_a_commit_does_not_wait_for_ever(
    raising: Node, host: Apart, apart: Again, loop: Turning, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MEASURE_SECONDS", 0.05)
    host.how = hang
    with pytest.raises(Measuring):
        commit(raising)
    loop.until(lambda: not apart.busy)
    with pytest.raises(NoKvm, match=r"did not end in 0\.05 seconds"):
        commit(raising)
    assert raising.generation == 1


@pytest.mark.parametrize("what", ["process", "descriptor", "device"])
def test_without_a_child_it_is_measured_here(
    node: Node, host: Apart, apart: Again, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    def refuse(*_: object) -> Any:
        raise OSError(11, "none to be had")

    if what == "device":
        apart._path = "/nowhere/kvm"
    else:
        monkeypatch.setattr(os, {"process": "fork", "descriptor": "pipe2"}[what], refuse)
    before = sorted(os.listdir("/proc/self/fd"))
    lose(host)
    node.refresh(fresh=True)
    assert not apart.busy and not offers(node)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_a_fault_here_leaves_no_old_report(node: Node, host: Apart, apart: Again) -> None:
    apart._path = "/nowhere/kvm"
    host.how, host.moved = fault, True
    with pytest.raises(ZeroDivisionError):
        node.refresh()
    assert node.state == "unmeasured"


def test_whoever_asks_starts_one_a_second(node: Node, host: Apart, apart: Again, loop: Turning) -> None:
    host.error, host.moved = NoKvm("gone"), True
    node.refresh()
    loop.until(lambda: not apart.busy)
    marks = host.marks
    for _ in range(5):
        node.refresh(fresh=True)
        with pytest.raises(NoKvm, match="gone"):
            node.report  # noqa: B018
    assert host.marks == marks
    loop.ahead += limits.VOLATILE_SECONDS
    with pytest.raises(Measuring):
        node.refresh(fresh=True)


# -- a whole daemon

_PROGRAM = """
import os, sys
from kvmneg.features.report import Report
from kvmneg.host.software import Roots
from kvmneg.host.volatile import Volatile
from kvmneg.service import daemon

folder = sys.argv.pop(1)

class Tree:
    def __init__(self):
        self.vmms = ()
        roots = Roots(f"{folder}/sys", f"{folder}/proc", f"{folder}/dev")
        self.inputs = Volatile(f"{folder}/dev/kvm", roots, lambda path: None)
        self.mark, self.doubt, self.changed = self.inputs.mark, self.inputs.forget, self.inputs.changed
    def measure(self):
        self.mark()
        return self.take()
    def take(self):
        if not os.path.exists(f"{folder}/dev/kvm"):
            from kvmneg.errors import NoKvm
            raise NoKvm("there is no /dev/kvm")
        if os.path.exists(f"{folder}/hang"):
            os.open(f"{folder}/fifo", os.O_WRONLY)  # waits in the kernel for a reader
        return Report.loads(open(f"{folder}/report.json", "rb").read())

daemon._measurer = lambda arguments, apart: (Tree(), [])
sys.exit(daemon.main())
"""


class InTree(Daemon):
    """A daemon that measures what a tree says."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "--kvm", str(folder / "dev/kvm"))
        self.folder, self.before = folder, ""
        for name in ("dev", "sys/module/kvm/parameters", "proc"):
            (folder / name).mkdir(parents=True)
        (folder / "dev/kvm").touch()
        self.put("sys/module/kvm/parameters/ignore_msrs", "N\n")
        (folder / "report.json").write_bytes(
            (Path(__file__).parents[2] / "kvmneg/data/recorded-host.json").read_bytes()
        )
        os.mkfifo(folder / "fifo")

    def put(self, path: str, text: str) -> None:
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text, "utf-8")

    def command(self, *wrapped: str) -> list[str]:
        words = super().command(*wrapped)
        place = words.index("-m")
        return [*words[:place], "-c", f"{self.before}\n{_PROGRAM}", str(self.folder), *words[place + 2 :]]


def watches(daemon: Daemon) -> None:
    """Until it watches, and measures in a child, which begins when the first calls have their answers."""
    assert daemon.process is not None
    folder = f"/proc/{daemon.process.pid}/fd"

    def has_inotify() -> bool:
        for name in os.listdir(folder):
            try:
                if "inotify" in os.readlink(f"{folder}/{name}"):
                    return True
            except FileNotFoundError:
                pass  # closed meanwhile
        return False

    until(has_inotify)


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def in_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[InTree]:
    daemon = InTree(tmp_path)
    yield daemon
    if daemon.process is not None:
        daemon.end(signal.SIGKILL)


def test_a_daemon_whose_measurement_hangs_answers_the_others(in_tree: InTree) -> None:
    in_tree.start()
    with in_tree.client() as first, in_tree.client() as other:
        digest = first.negotiate({"max": True})["digest"]
        watches(in_tree)
        in_tree.put("hang", "")
        in_tree.put("sys/module/kvm/parameters/ignore_msrs", "Y\n")
        got: list[object] = []

        def begin() -> None:
            try:
                got.append(first.begin(digest, VM))
            except KvmnegError as error:
                got.append(error)

        waiting = threading.Thread(target=begin)
        waiting.start()
        children = Path(f"/proc/{in_tree.process.pid}/task/{in_tree.process.pid}/children")  # type: ignore[union-attr]
        until(lambda: bool(children.read_text().split()))
        for _ in range(50):
            assert other.call("org.kvmneg.Fence.Get")["pinned"] is False
            assert other.call("org.kvmneg.Fence.History")["entries"] == []
        assert got == []  # it waits, and is granted nothing
        # the kernel lets it go on
        (in_tree.folder / "hang").unlink()
        os.close(os.open(in_tree.folder / "fifo", os.O_RDONLY | os.O_NONBLOCK))
        waiting.join(20)
        assert isinstance(got[0], dict) and got[0]["digest"] == digest


def test_a_commit_while_kvm_hangs_keeps_nobody_waiting(in_tree: InTree) -> None:
    in_tree.start()
    with in_tree.client() as admin, in_tree.client() as other:
        watches(in_tree)
        admin.fence_pin("a test", source="level:x86-64-v2")
        admin.fence_raise("a test", source="host")
        in_tree.put("hang", "")
        got: list[object] = []
        waiting = threading.Thread(target=lambda: got.append(admin.fence_commit("a test")))
        waiting.start()
        children = Path(f"/proc/{in_tree.process.pid}/task/{in_tree.process.pid}/children")  # type: ignore[union-attr]
        until(lambda: bool(children.read_text().split()))
        for _ in range(50):
            assert other.call("org.kvmneg.Fence.Get")["generation"] == 1
        assert got == []
        (in_tree.folder / "hang").unlink()
        os.close(os.open(in_tree.folder / "fifo", os.O_RDONLY | os.O_NONBLOCK))
        waiting.join(20)
        assert isinstance(got[0], dict) and got[0]["generation"] == 2


def test_a_daemon_starts_though_its_first_measurement_hangs(in_tree: InTree) -> None:
    """It serves what is stored, grants nothing, and says why; it measures again when KVM has let go of the first."""
    in_tree.start()
    with in_tree.client() as client:
        digest = client.fence_pin("a test", source="host")["digest"]
    in_tree.end(signal.SIGTERM)
    in_tree.put("hang", "")
    in_tree.before = (
        "from kvmneg import limits; limits.MEASURE_SECONDS = 0.5; limits.MEASURE_RETRY_SECONDS = 0.2"
    )
    in_tree.start()
    with in_tree.client() as client:
        fence = client.fence_get()
        assert (fence["digest"], fence["state"]) == (digest, "unmeasured")
        with pytest.raises(NoKvm, match=r"did not end in 0\.5 seconds: its KVM does not answer") as caught:
            client.negotiate({"max": True})
        assert caught.value.fields["cause"] == "wedged"
        watches(in_tree)
        time.sleep(1)  # several times MEASURE_RETRY_SECONDS
        assert in_tree.process is not None
        pid = in_tree.process.pid
        assert Path(f"/proc/{pid}/task/{pid}/children").read_text() == ""  # none beside it
        (in_tree.folder / "hang").unlink()
        os.close(os.open(in_tree.folder / "fifo", os.O_RDONLY | os.O_NONBLOCK))
        until(lambda: client.fence_get()["state"] == "pinned")
    assert in_tree.errors.read_text().count("its KVM does not answer") == 1


def test_a_daemon_with_a_first_measurement_that_hangs_can_be_stopped(in_tree: InTree) -> None:
    in_tree.before = "from kvmneg import limits; limits.MEASURE_SECONDS = 0.1"
    in_tree.put("hang", "")
    in_tree.start()
    with in_tree.client() as client:
        assert client.fence_get()["state"] == "unmeasured"
    in_tree.end(signal.SIGTERM)
    assert not os.path.exists(in_tree.socket)
    (in_tree.folder / "hang").unlink()
    in_tree.start()
    with in_tree.client() as client:
        assert client.fence_get()["state"] == "floating"


def test_a_daemon_is_restarted_beside_a_child_that_hangs(in_tree: InTree) -> None:
    in_tree.start()
    watches(in_tree)
    in_tree.put("hang", "")
    in_tree.put("sys/module/kvm/parameters/ignore_msrs", "Y\n")
    assert in_tree.process is not None
    children = Path(f"/proc/{in_tree.process.pid}/task/{in_tree.process.pid}/children")
    with in_tree.client() as client:
        got: list[object] = []

        def ask() -> None:
            try:
                got.append(client.get_host())
            except KvmnegError as error:
                got.append(type(error))

        waiting = threading.Thread(target=ask)
        waiting.start()
        until(lambda: bool(children.read_text().split()))
        (child,) = map(int, children.read_text().split())
        in_tree.end(signal.SIGKILL)
        waiting.join(20)
        assert got == [Unreachable]
    (in_tree.folder / "hang").unlink()
    in_tree.start()  # the state directory's lock and the socket's path are free
    with in_tree.client() as client:
        assert client.get_host()["state"] == "floating"
    os.kill(child, signal.SIGKILL)
