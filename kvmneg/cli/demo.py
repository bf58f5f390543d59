# SPDX-License-Identifier: LGPL-2.1-or-later
"""The main job from one end to the other, told as a terminal log: what `make run` runs.

Measure this host, start a daemon of its own, pin a fence, negotiate as a VMM would, and start the installed QEMU
paused with what came out. Where KVM cannot be used it says why, and goes through the same on a recorded report,
with that said on every screen. Nothing is kept: state and socket lie in a private directory.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid

from kvmneg.cli import BROKEN_PIPE, INTERNAL, INTERRUPTED, silence_output, sources
from kvmneg.cli.output import Screen
from kvmneg.errors import KvmFault, KvmnegError, NoKvm, Unreachable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

_START_SECONDS = 10.0
_STOP_SECONDS = 5.0
_LEVELS = ("x86-64-v4", "x86-64-v3", "x86-64-v2", "x86-64-v1")


class Failed(Exception):
    """A step did not do what it should; what it printed is on the screen."""

    def __init__(self, status: int) -> None:
        super().__init__(f"exit status {status}")
        self.status = status


class Demo:
    """One run. `report` is the recorded report's file where KVM (at `kvm`) cannot be used."""

    def __init__(self, directory: str, kvm: str, report: str | None) -> None:
        self.kvm = kvm
        self.screen = Screen()
        self.directory = directory
        self.socket = os.path.join(directory, "org.kvmneg")
        self.report = report
        self.step = 0

    def title(self, text: str) -> None:
        """The heading of a screen."""
        self.step += 1
        self.screen.line(f"\n{self.screen.bold(f'── {self.step}. {text} ')}{'─' * max(3, 88 - len(text))}")
        if self.report:
            self.screen.line(
                self.screen.warn(f"RECORDED REPORT ({os.path.basename(self.report)}), not this host")
            )

    def say(self, text: str) -> None:
        self.screen.line(text)

    def show(self, *words: str) -> None:
        """Print a command as it is about to be run."""
        import shlex

        command = shlex.join(words).replace("'&'", "&")
        self.screen.line(self.screen.good("$ ") + command)
        sys.stdout.flush()

    def run(self, *words: str, expected: Sequence[int] = (0,)) -> None:
        """Show and run `kvmneg …`; raises Failed for another exit status than expected."""
        self.show("kvmneg", *words)
        program = [*_program("kvmneg"), *words]
        # a no goes to standard error: here it belongs into the log, in its place
        status = subprocess.run(program, stderr=subprocess.STDOUT, check=False).returncode
        if status not in expected:
            raise Failed(status)


def _program(name: str) -> list[str]:
    """The installed command beside this interpreter, or its module from the source tree."""
    path = os.path.join(os.path.dirname(sys.executable), name)
    if os.access(path, os.X_OK):
        return [path]
    return [sys.executable, "-P", "-m", {"kvmneg": "kvmneg.cli", "kvmnegd": "kvmneg.service.daemon"}[name]]


def main() -> int:
    """Run it all (--kvm PATH: on another device); returns 0, or the exit status of the step that failed."""
    kvm = sys.argv[sys.argv.index("--kvm") + 1] if "--kvm" in sys.argv[:-1] else sources.KVM
    directory = tempfile.mkdtemp(prefix="kvmneg-")
    daemon: subprocess.Popen[bytes] | None = None
    try:
        demo = Demo(directory, kvm, _recorded_report(kvm))
        _measure(demo)
        daemon = _start(demo)
        _pin(demo)
        offer = _negotiate(demo)
        _qemu(demo, offer)
        _stop(demo, daemon)
        demo.say(
            demo.screen.good("\nDone.")
            + " README.md tells how a VMM and an admin use it; kvmneg --help, man kvmneg."
        )
    except Failed as error:
        return error.status
    except KvmnegError as error:
        sys.stderr.write(f"kvmneg: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        silence_output()
        return BROKEN_PIPE
    except Exception:
        import traceback  # only for a bug

        traceback.print_exc()
        return INTERNAL
    finally:
        if daemon is not None:
            _end(daemon)
        shutil.rmtree(directory, ignore_errors=True)
    return 0


def _recorded_report(kvm: str) -> str | None:
    """None where KVM can be used; else says why it cannot and how to fix that, and names the recorded report."""
    from kvmneg.host.measure import measure

    try:
        measure(kvm)
    except (NoKvm, KvmFault) as error:
        screen = Screen()
        screen.line(screen.bad(f"KVM cannot be used: {error.message}"))
        screen.line(f"  how to fix it: {error.hint}" if error.hint else "")
        screen.line("  Until then, here is the same on a report that was recorded on another machine.")
        return os.path.join(os.path.dirname(os.path.dirname(__file__)), "data", "recorded-host.json")
    return None


def _measure(demo: Demo) -> None:
    demo.title("What KVM offers to guests" if demo.report else "What this host's KVM offers to guests")
    if demo.report:
        demo.run("host", "--report", demo.report)
    else:
        demo.run("host", *(() if demo.kvm == sources.KVM else ("--kvm", demo.kvm)))


def _start(demo: Demo) -> subprocess.Popen[bytes]:
    demo.title("The daemon, with state and socket in a private directory")
    words = ["--socket", demo.socket, "--state", os.path.join(demo.directory, "state")]
    words += ["--report", demo.report] if demo.report else []
    words += ["--kvm", demo.kvm] if demo.kvm != sources.KVM and not demo.report else []
    demo.show("kvmnegd", *words, "&")
    began = time.monotonic()
    # its own session: Ctrl-C ends this program, which then ends the daemon in order
    daemon = subprocess.Popen([*_program("kvmnegd"), *words], start_new_session=True)
    while not _answers(demo.socket):
        if daemon.poll() is not None:
            raise Failed(daemon.returncode or 70)
        if time.monotonic() - began > _START_SECONDS:
            _end(daemon)
            raise Failed(70)
        time.sleep(0.01)
    demo.run("--socket", demo.socket, "watch", "--count", "1")
    return daemon


def _answers(path: str) -> bool:
    """Whether the daemon answers: the socket's file is there before anybody listens."""
    from kvmneg.client import Client

    try:
        with Client(path) as client:
            return bool(client.get_info())
    except Unreachable:
        return False


def _pin(demo: Demo) -> None:
    demo.title("A fence: no contract of this host exceeds it from now on")
    demo.run(
        "--socket", demo.socket, "fence", "pin", "--from", "host", "--reason", "first light: what runs today"
    )
    demo.run("--socket", demo.socket, "fence", "history")


def _negotiate(demo: Demo) -> dict[str, Any]:
    """The highest level that host and fence allow, asked for over varlink as a VMM would; the offer."""
    import json

    from kvmneg.client import Client
    from kvmneg.errors import Blocked

    demo.title("A contract, negotiated over varlink as a VMM would")
    offer: dict[str, Any] = {}
    with Client(demo.socket) as client:
        for level in _LEVELS:
            try:
                offer = client.negotiate({"level": level})
            except Blocked:
                continue
            call = {"method": "org.kvmneg.Negotiate", "parameters": {"request": {"level": level}}}
            told = {key: "…" if isinstance(value, (dict, list)) else value for key, value in offer.items()}
            demo.say(f"the VMM:  {json.dumps(call)}")
            demo.say(f"kvmnegd:  {json.dumps({'parameters': told}, ensure_ascii=False)}\n")
            break
    if not offer:  # not even the lowest: let the command say why
        demo.run("--socket", demo.socket, "negotiate", "--level", _LEVELS[-1])
    demo.run("--socket", demo.socket, "negotiate", "--level", level)
    above = _LEVELS.index(level) - 1
    if above >= 0:
        demo.title(f"And why not {_LEVELS[above]}: every reason, never a silent drop")
        demo.run("--socket", demo.socket, "check", "--level", _LEVELS[above], expected=(1,))
    demo.title("All there is, granted to one VM")
    vm = str(uuid.uuid4())
    demo.run("--socket", demo.socket, "negotiate", "--max", "--begin", "--vm", vm)
    return offer


def _qemu(demo: Demo, offer: dict[str, Any]) -> None:
    """The arguments for the installed QEMU, and QEMU paused with them."""
    from kvmneg.cli import files
    from kvmneg.emit import qemu
    from kvmneg.host import qemu_probe

    demo.title("The QEMU arguments it leads to")
    path = qemu_probe.find()
    if path is None:
        demo.say(f"{qemu_probe.BINARY} is not installed: apt install qemu-system-x86")
        demo.run(
            "--socket", demo.socket, "contract", offer["digest"], "--emit", "qemu", "--machine", "pc-q35-7.2"
        )
        return
    demo.run("--socket", demo.socket, "contract", offer["digest"], "--emit", "qemu")
    build = qemu_probe.probe(path)
    contract = files.json_contract(offer["contract"], "the contract")
    emitted = qemu.emit(contract, build.machine, known=build.properties)
    demo.title(f"QEMU {build.version} started paused with them")
    if demo.report:
        demo.say("not done: without KVM nothing enforces these features, and they are another machine's")
        return
    demo.show(
        os.path.basename(path), *emitted.arguments, "-S", "-nodefaults", "-display", "none", "-qmp", "stdio"
    )
    status = qemu_probe.start_paused(path, emitted.arguments)
    demo.say(
        demo.screen.good("yes")
        + f": QEMU accepts every feature (enforce=on) and is paused; query-status says {status!r}"
    )


def _stop(demo: Demo, daemon: subprocess.Popen[bytes]) -> None:
    demo.title("The daemon ends")
    demo.show("kill", "-TERM", str(daemon.pid))
    status = _end(daemon)
    demo.say(f"kvmnegd ended with status {status}")
    if status:
        raise Failed(status)


def _end(daemon: subprocess.Popen[bytes]) -> int:
    """Ask the daemon to stop, insist after a while; its exit status."""
    if daemon.poll() is None:
        daemon.terminate()
        try:
            daemon.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            daemon.kill()
    return daemon.wait()


if __name__ == "__main__":
    sys.exit(main())
