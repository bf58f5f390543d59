# SPDX-License-Identifier: LGPL-2.1-or-later
"""Intel hosts under Bochs, which emulates VMX with EPT (QEMU does not): one job for each start, a minute or two.

Bochs and what makes its boot medium are unpacked beside the system. It reads a CD image: isolinux, the kernel, and
an uncompressed initramfs that holds the job; what the job says comes out of the second serial line.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
import termios
import time
import tty
from pathlib import Path
from tempfile import TemporaryDirectory

from ..packages.store import Store, Wanted
from ..packages.tree import Tree
from . import cpio, kernel, userspace
from .catalogue import Host
from .errors import HostError
from .job import Collector, Job, Listener, Result, parse

BOOT_SECONDS = 400.0
POLL_SECONDS = 0.1
SUITE = "bookworm"
_SCREEN = re.compile(rb'connected to screen "([^"]+)"')
_PLUGINS = "usr/lib/x86_64-linux-gnu/bochs/plugins"
# tsc=reliable and the like: its clocks do not agree with each other, and the kernel spends minutes to find out.
_KERNEL_LINE = (
    "console=ttyS0 panic=-1 quiet loglevel=4 tsc=reliable no_timer_check clocksource=tsc mitigations=off "
    "kvmneg.port=/dev/ttyS1"
)
# With FSRM, Linux 6.1 comes no further than its security modules on Bochs' CPUs that have it; 6.12 boots.
_LINE_OF = {"6.1": " clearcpuid=fsrm"}
_MENU = "default linux\nlabel linux\n  kernel /linux\n  initrd /initrd\n  append {line}\n"
_CONFIGURATION = """\
config_interface: textconfig
display_library: term
romimage: file={share}/BIOS-bochs-latest
vgaromimage: file={share}/VGABIOS-lgpl-latest
megs: 1024
cpu: model={model}, count=1, ips=200000000, ignore_bad_msrs=1, reset_on_triple_fault=0
clock: sync=none
ata0-master: type=cdrom, path={iso}, status=inserted
boot: cdrom
com1: enabled=1, mode=file, dev={console}
com2: enabled=1, mode=file, dev={port}
log: {log}
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"""


def trees(store: Store) -> dict[str, Tree]:
    """The unpacked tools. Raises PackageError."""
    return {
        "bochs": store.get(Wanted("bochs-term", "", SUITE)),
        "xorriso": store.get(Wanted("xorriso", "", SUITE)),
        "isolinux": store.get(Wanted("isolinux", "", SUITE, alone=True)),
        "syslinux-common": store.get(Wanted("syslinux-common", "", SUITE, alone=True)),
    }


def run(host: Host, job: Job, listener: Listener | None = None) -> Result:
    """Boot the host with the job, and wait for its end. Raises HostError, PackageError."""
    store = Store()
    tools = trees(store)
    with TemporaryDirectory(prefix="kvmneg-bochs-") as name:
        work = Path(name)
        _medium(host, job, tools, work, store)
        names = {part: work / part for part in ("iso", "console", "port", "log")}
        share = tools["bochs"].path("usr/share/bochs")
        (work / "bochsrc").write_text(_CONFIGURATION.format(share=share, model=host.cpu, **names), "ascii")
        (work / "commands").write_text("c\n", "ascii")  # Debian's build stops in its debugger first
        process = _Process(tools["bochs"], work)
        try:
            return process.result(job.seconds, listener)
        finally:
            process.close()


def version(store: Store | None = None) -> str:
    """What the emulator is, for those who record what it showed."""
    return f"Bochs {trees(store or Store())['bochs'].version}"


def _medium(host: Host, job: Job, tools: dict[str, Tree], work: Path, store: Store) -> None:
    """The CD image at `work`/iso."""
    found = kernel.get(host, store)
    disc = work / "disc"
    (disc / "isolinux").mkdir(parents=True)
    shutil.copyfile(found.image, disc / "linux")
    given = cpio.archive([cpio.Member("job.tar.gz", cpio.DATA, job.packed())])
    with open(disc / "initrd", "wb") as target:
        cpio.join(
            target, [userspace.initramfs(host.architecture).read_bytes(), found.modules("bochs"), given]
        )
    shutil.copyfile(tools["isolinux"].path("usr/lib/ISOLINUX/isolinux.bin"), disc / "isolinux/isolinux.bin")
    modules = tools["syslinux-common"].path("usr/lib/syslinux/modules/bios")
    shutil.copyfile(modules / "ldlinux.c32", disc / "isolinux/ldlinux.c32")
    (disc / "isolinux/isolinux.cfg").write_text(
        _MENU.format(line=_KERNEL_LINE + _LINE_OF.get(host.line, "")), "ascii"
    )
    command = [
        *tools["xorriso"].command("usr/bin/xorriso"),
        "-as",
        "mkisofs",
        "-quiet",
        "-o",
        str(work / "iso"),
    ]
    command += [
        "-b",
        "isolinux/isolinux.bin",
        "-c",
        "isolinux/boot.cat",
        "-no-emul-boot",
        "-boot-load-size",
        "4",
    ]
    command += ["-boot-info-table", "-J", "-R", str(disc)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError("build", f"xorriso: {done.stderr.strip()[-1000:]}")
    shutil.rmtree(disc)


class _Process:
    """A running Bochs, on a terminal of its own: it has no other way to be without a screen."""

    def __init__(self, tree: Tree, work: Path) -> None:
        self._work = work
        self._said, terminal = pty.openpty()
        self._screen = -1
        environment = {**os.environ, "TERM": "xterm", "LTDL_LIBRARY_PATH": str(tree.path(_PLUGINS))}
        environment["BXSHARE"] = str(tree.path("usr/share/bochs"))
        command = [
            *tree.command("usr/bin/bochs-bin"),
            "-q",
            "-f",
            str(work / "bochsrc"),
            "-rc",
            str(work / "commands"),
        ]
        self._process = subprocess.Popen(
            command,
            stdin=terminal,
            stdout=terminal,
            stderr=terminal,
            env=environment,
            cwd=work,
            start_new_session=True,
        )
        os.close(terminal)
        os.set_blocking(self._said, False)
        self._shown = b""

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._said)
        if self._screen >= 0:
            os.close(self._screen)

    def _drain(self) -> None:
        """Read all that it prints: Bochs stands still when nobody does.

        That is on two terminals. The debugger has the one that Bochs was given; the guest's screen, or at least its
        cursor several times a second, is on one that it makes, and whose buffer is full after some minutes.
        """
        shown = self._shown + _read(self._said)
        self._shown = shown[-4000:]
        if self._screen < 0 and (found := _SCREEN.search(shown)):
            self._screen = os.open(found[1], os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
            # not line by line, without an echo; and at once: a flush would not wake up who waits to write
            tty.setraw(self._screen, termios.TCSANOW)
        if self._screen >= 0:
            _read(self._screen)

    def console(self) -> str:
        texts = [
            path.read_text("latin-1") for name in ("log", "console") if (path := self._work / name).exists()
        ]
        return "\n".join(texts) or self._shown.decode("latin-1")

    def result(self, seconds: float, listener: Listener | None) -> Result:
        """Follow the port's file until the job has ended."""
        collector = Collector({}, listener)
        step, ends = "boot", time.monotonic() + BOOT_SECONDS
        read, rest = 0, b""
        while collector.result is None:
            self._drain()
            over = self._process.poll() is not None
            data = b""
            if (self._work / "port").exists():
                with open(self._work / "port", "rb") as file:
                    file.seek(read)
                    data = file.read()
            read += len(data)
            *lines, rest = (rest + data).split(b"\n")
            for message in filter(None, map(parse, lines)):
                if message[0] == "ready":
                    step, ends = "job", time.monotonic() + seconds
                collector.take(*message)
            if collector.result is None and (over or time.monotonic() > ends):
                why = f"Bochs ended ({self._process.returncode})" if over else "no answer in time"
                raise HostError(step, why, self.console())
            time.sleep(POLL_SECONDS)
        return collector.result._replace(console=self.console())


def _read(terminal: int) -> bytes:
    """All that is there now."""
    found = b""
    try:
        while data := os.read(terminal, 1 << 16):
            found += data
    except OSError:  # nothing more, or the other end is closed
        pass
    return found
