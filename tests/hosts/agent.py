# SPDX-License-Identifier: LGPL-2.1-or-later
"""Inside an emulated host: takes jobs from a port, runs them, sends what they printed and left.

The port is a virtio-serial port, or a serial line where the emulator has no virtio. Downwards:
`job LENGTH` and a newline, then that many bytes of a gzip-compressed tar. Upwards, one message a line, whatever
else the console prints in between: `=kvmneg= KIND BASE64` with the zlib-compressed content:

    ready  where and what this is, JSON        out, err  what the job printed, as it came
    file   a tar of the job's `out` folder     end       the exit status, JSON; always the last

The tar has job.json: argv, environment, seconds, time. It may stand in the initramfs as /job.tar.gz instead:
then it is run at once, and the host powers off. Only the standard library; nothing is imported for comfort,
as every import costs a tenth of a second under emulation.
"""

import binascii
import fcntl
import json
import os
import select
import signal
import sys
import time
import zlib

JOB, OUT = "/job", "/job/out"
GIVEN = "/job.tar.gz"
CHUNK = 1 << 16
YEAR = 365 * 86400
RNDRESEEDCRNG = 0x5207  # linux/random.h


def words_of_the_kernel() -> dict[str, str]:
    """The kernel's command line: word → value."""
    with open("/proc/cmdline", encoding="ascii") as file:
        return {word.partition("=")[0]: word.partition("=")[2] for word in file.read().split()}


def busybox(*words: str, data: bytes | None = None, output: int | None = None) -> int:
    """Run an applet; `data` is its standard input, `output` a descriptor for its standard output."""
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        os.dup2(read_end, 0)
        os.close(write_end)
        if output is not None:
            os.dup2(output, 1)
        os.execv("/usr/bin/busybox", ["busybox", *words])
    os.close(read_end)
    view = memoryview(data or b"")
    while view:
        view = view[os.write(write_end, view) :]
    os.close(write_end)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


class Port:
    """The way in and out."""

    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_NOCTTY)
        if os.isatty(self.fd):
            busybox_raw(path)

    def send(self, kind: str, content: bytes) -> None:
        packed = binascii.b2a_base64(zlib.compress(content, 1), newline=False)
        line = memoryview(b"\n=kvmneg= %s %s\n" % (kind.encode(), packed))
        while line:
            line = line[os.write(self.fd, line) :]

    def _exactly(self, size: int) -> bytes:
        parts: list[bytes] = []
        while size:
            part = os.read(self.fd, min(size, 1 << 20))
            if not part:  # nobody holds the other end
                time.sleep(0.01)
                continue
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def receive(self) -> bytes:
        """The next job's archive."""
        line = b""
        while not select.select([self.fd], [], [], 0.05)[0]:
            pass  # a short timer, cancelled by the job that comes: see wake_timers()
        while not line.endswith(b"\n"):
            line += self._exactly(1)
        return self._exactly(int(line.split()[1]))


def busybox_raw(path: str) -> None:
    """A serial line as it is, without echo."""
    fd = os.open(path, os.O_RDONLY | os.O_NOCTTY)
    child = os.fork()
    if not child:
        os.dup2(fd, 0)
        os.execv("/usr/bin/busybox", ["busybox", "stty", "raw", "-echo", "115200"])
    os.close(fd)
    os.waitpid(child, 0)


def unpack(packed: bytes) -> dict[str, object]:
    """Put a job in place; what job.json says."""
    busybox("rm", "-rf", JOB)
    os.mkdir(JOB)
    busybox("tar", "-xz", "-C", JOB, "-f", "-", data=packed)
    os.makedirs(OUT, exist_ok=True)
    with open(f"{JOB}/job.json", encoding="utf-8") as file:
        job: dict[str, object] = json.load(file)
    return job


def another_life(job: dict[str, object]) -> None:
    """A host restored from a snapshot is not the one that was saved: its clock, entropy and boot id are new."""
    wake_timers()
    time.clock_settime(time.CLOCK_REALTIME, float(str(job["time"])))
    with open("/dev/urandom", "wb", buffering=0) as file:
        file.write(bytes.fromhex(str(job["entropy"])))
        fcntl.ioctl(file, RNDRESEEDCRNG)  # else what was written shows only minutes later
    boot_id = str(job.get("boot_id") or "")
    if boot_id:
        with open("/run/boot_id", "w", encoding="ascii") as text:
            text.write(boot_id + "\n")
        busybox("mount", "-o", "bind", "/run/boot_id", "/proc/sys/kernel/random/boot_id")


def arm_timer() -> None:
    """Leave a timer of the wall clock behind, see wake_timers()."""
    import ctypes  # before the snapshot is taken, so that it costs nothing later

    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.timerfd_create(0, 0)  # CLOCK_REALTIME
    value = (ctypes.c_long * 4)(0, 0, int(time.time()) + YEAR, 0)  # struct itimerspec
    if fd < 0 or libc.timerfd_settime(fd, 1, ctypes.byref(value), None):  # TFD_TIMER_ABSTIME
        raise OSError(ctypes.get_errno(), "timerfd")


def wake_timers() -> None:
    """Make the kernel program its clock event anew.

    QEMU saves the physical and the virtual timer of an arm64 CPU, not those of EL2, which a kernel with VHE uses:
    a restored one waits for an event that never comes, and takes every later one to be covered by it. A wall
    clock that jumps over a timer has it look again (clock_was_set(), kernel/time/hrtimer.c), and so has the
    end of the timer that was to come first. Neither is sure: a snapshot is tried before it is used (start.py).
    """
    time.clock_settime(time.CLOCK_REALTIME, time.time() + 2 * YEAR)


def start(job: dict[str, object]) -> tuple[int, list[tuple[int, str]]]:
    """The job's process in a session of its own, and the ends of the pipes it prints to."""
    pipes = [os.pipe(), os.pipe()]
    child = os.fork()
    if not child:
        try:
            os.setsid()
            null = os.open("/dev/null", os.O_RDONLY)
            os.dup2(null, 0)
            for target, (_, write_end) in enumerate(pipes, 1):
                os.dup2(write_end, target)
            os.chdir(JOB)
            argv, added = job["argv"], job["environment"]
            assert isinstance(argv, list)
            assert isinstance(added, dict)
            os.execvpe(argv[0], argv, {**os.environ, **added})
        except OSError as error:
            os.write(2, f"{error}\n".encode())
        os._exit(127)
    for _, write_end in pipes:
        os.close(write_end)
    return child, [(pipes[0][0], "out"), (pipes[1][0], "err")]


def run(port: Port, job: dict[str, object]) -> int:
    """Run it to its end, or to its time limit; the exit status (124 past the limit, as timeout(1))."""
    child, open_pipes = start(job)
    ends = time.monotonic() + float(str(job["seconds"]))
    late = False
    while open_pipes:
        left = max(0.0, ends - time.monotonic())
        ready = select.select([fd for fd, _ in open_pipes], [], [], left)[0]
        if not ready and time.monotonic() >= ends:
            late = True
            os.killpg(child, signal.SIGKILL)
            break
        for fd, kind in list(open_pipes):
            if fd in ready:
                data = os.read(fd, CHUNK)
                if data:
                    port.send(kind, data)
                else:
                    open_pipes.remove((fd, kind))
                    os.close(fd)
    for fd, _ in open_pipes:
        os.close(fd)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return 124 if late else 128 - status if status < 0 else status


def files() -> bytes:
    """The job's `out` folder as a tar."""
    fd = os.memfd_create("out")
    busybox("tar", "-c", "-C", OUT, "-f", "-", ".", output=fd)
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, "rb") as file:
        return file.read()


def one(port: Port, packed: bytes) -> None:
    """One job, whatever becomes of it: the end is always told."""
    try:
        job = unpack(packed)
        another_life(job)
        status = run(port, job)
        if os.listdir(OUT):
            port.send("file", files())
    except Exception as error:
        port.send("err", f"the agent failed: {error!r}\n".encode())
        status = 126
    port.send("end", json.dumps({"status": status}).encode())


def main() -> None:
    port = Port(words_of_the_kernel()["kvmneg.port"])
    arm_timer()
    about = {"release": os.uname().release, "machine": os.uname().machine, "python": sys.version.split()[0]}
    port.send("ready", json.dumps(about).encode())
    if os.path.exists(GIVEN):
        with open(GIVEN, "rb") as file:
            one(port, file.read())
        return
    while True:
        one(port, port.receive())


if __name__ == "__main__":
    main()
