# SPDX-License-Identifier: LGPL-2.1-or-later
"""The state directory on disks that lose power, fill up, fail or go read-only.

recorder.c stands between a process and its file system: it records every write, sync and change of a name, and
fails those it is told to. `recording` builds and runs it, `model` replays what a power cut may leave.
"""
