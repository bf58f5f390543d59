# SPDX-License-Identifier: LGPL-2.1-or-later
"""What can go wrong with an emulated host: each says which step failed, and what the console last showed."""

TAIL_LINES = 40


class HostError(Exception):
    """A step failed. `step` is one of: packages, build, boot, snapshot, restore, job.

    `panicked`: the host's kernel did.
    """

    def __init__(self, step: str, message: str, console: str = "") -> None:
        self.step = step
        self.panicked = "Kernel panic" in console
        tail = "\n".join(f"  | {line}" for line in console.splitlines()[-TAIL_LINES:])
        super().__init__(f"{step}: {message}" + (f"; the console's end:\n{tail}" if tail else ""))


class NoEmulator(HostError):
    """The emulator is not installed (tools/setup.sh names its package)."""

    def __init__(self, program: str) -> None:
        super().__init__("boot", f"{program} is not installed")
