# SPDX-License-Identifier: LGPL-2.1-or-later
"""What is left when the database is damaged: the last copy, served read-only until an admin acts.

The fence bounds offers as ever, or the level that floats. Nothing is granted and nothing is changed: leases and their
contracts are not in the copy, so that none here can say what a new one would have to agree with, and one that went
unrecorded would block no lowering. Who asks for what the copy does not know (leases, history, the records of most
combos) is told so, never that there is none.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import contextmanager

from kvmneg import limits
from kvmneg.errors import KvmnegError, StoreError
from kvmneg.store import copies, copying, schema, statedir
from kvmneg.store.faults import translated
from kvmneg.store.interface import Audit
from kvmneg.store.leases import Leases
from kvmneg.store.rolls import Rolls
from kvmneg.store.sqlite import SqliteStore
from kvmneg.store.transactions import Database

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any, NoReturn

    from kvmneg.store.interface import FenceRow, ReportRow


class _ReadOnly(Database):
    """A database in memory that holds the copy and nothing else: every change of it is refused with `fault`."""

    __slots__ = ("_why",)

    def __init__(self, copy: copies.Copy, fault: StoreError, directory: str) -> None:
        connection = sqlite3.connect(":memory:", isolation_level=None)
        try:
            schema.migrate(connection)
            pinned = Audit(copy.uid, copy.pid, copy.pinned_at, copy.reason, "")
            copying.fill(connection, copy, copy.generation, pinned)
        except BaseException:
            connection.close()
            raise
        super().__init__(connection, directory)
        self._why = fault
        self.fault = fault

    @contextmanager
    def changing(self, doing: str) -> Iterator[sqlite3.Connection]:
        raise self._why.with_traceback(None)  # else each time it is raised it would grow
        yield self.connection

    def retry(self) -> None:
        """Only an admin's word ends this fault."""


class _Lost(Leases):
    """Leases that nobody knows any more: who asks for them is told why, and no process speaks of one."""

    __slots__ = ("_why",)

    def __init__(self, database: Database, why: StoreError) -> None:
        super().__init__(database)
        self._why = why

    def _unknown(self, *_: Any, **__: Any) -> Any:
        raise self._why.with_traceback(None)

    of = holds = outstanding = holders = contract = contracts_outstanding = reported = _unknown

    def expire(self, now: float) -> list[str]:
        return []


class _LostCombos(Rolls):
    """The roll-back set is in the copy, the other combos are not: whether one was ever measured nobody knows."""

    __slots__ = ("_why",)

    def __init__(self, database: Database, why: StoreError) -> None:
        super().__init__(database)
        self._why = why

    def _unknown(self, *_: Any, **__: Any) -> Any:
        raise self._why.with_traceback(None)

    combos = find = report = before = _unknown


class RecoveredStore(SqliteStore):
    """The copy in `directory` as a store: `damage` is why there is no other.

    Raises `damage` where there is no copy, StoreError where the copy is damaged too, or the directory another's.
    """

    __slots__ = ("_restored", "copy")
    recovered = True

    def __init__(self, directory: str, damage: StoreError, verify: Callable[[str], str]) -> None:
        self._restored: SqliteStore | None = None
        lock = statedir.lock(directory)
        try:
            if not os.path.lexists(f"{directory}/{copies.NAME}"):
                raise damage
            self.copy = _checked(directory, verify)
            fault = _fault(damage, self.copy)
            with translated(directory, f"read {directory}/{copies.NAME}"):
                database = _ReadOnly(self.copy, fault, directory)
        except BaseException:
            os.close(lock)
            raise
        super().__init__(directory, verify=verify, lock=lock, database=database)
        self.leases = _Lost(database, fault)

    def close(self) -> None:
        """Let go of the directory; of the restored store too."""
        if self._restored is not None:
            self._lock = -1  # the restored store's
            self._database.connection.close()
            self._restored.close()
        super().close()

    def copy_out(self, at: str) -> bool:
        return False

    def _unknown(self, *_: object, **__: object) -> NoReturn:
        """What the copy does not know."""
        assert self.fault is not None
        raise self.fault.with_traceback(None)

    history = audit = latest_report = _unknown

    def past_fence(self, generation: int) -> FenceRow | None:
        return super().past_fence(generation) or self._unknown()

    def report(self, digest: str) -> ReportRow | None:
        return super().report(digest) or self._unknown()

    @property
    def rolls(self) -> Rolls:
        assert self.fault is not None
        return _LostCombos(self._database, self.fault)

    # Back to a store

    def known_generation(self) -> int:
        """The highest generation that the copy or a database set aside names; what cannot be read names none."""
        asides = [name for name in os.listdir(self._directory) if statedir.is_aside(name)]
        found = [_generation_of(f"{self._directory}/{name}") for name in asides]
        return max([self.copy.generation, *found])

    def restored(self, above: int, audit: Audit) -> SqliteStore:
        """A new store whose history begins with the copy's fence, at a generation above `above` and every known one.

        While lowering, both fences are above. What was set aside stays where it is. Raises StoreError, after which this
        is as it was; also where there is a database, which could only not be opened (kvmneg.store.opening).
        """
        copy = self.copy
        generation = max(above, self.known_generation()) + (2 if copy.base is not None else 1)
        reason = (
            f"restored from the copy of generation {copy.generation}, made at {copy.made_at}: {audit.reason}"
        )

        def fill(connection: sqlite3.Connection) -> None:
            copying.fill(connection, copy, generation, audit._replace(reason=reason))

        if os.path.lexists(f"{self._directory}/{statedir.DATABASE}"):
            raise StoreError("there is a database", hint="start the daemon again: it was only not readable")
        with translated(self._directory, "make a new database"):
            schema.create(self._directory, fill)
        self._restored = SqliteStore(self._directory, verify=self._verify, lock=self._lock)
        return self._restored


def _checked(directory: str, verify: Callable[[str], str]) -> copies.Copy:
    """The copy, its fence one that this build reads as it was meant."""
    copy = copies.read(directory)
    try:
        actual = copy.digest if copy.text is None else verify(copy.text)
    except (KvmnegError, ValueError) as error:
        raise StoreError(f"the fence in {directory}/{copies.NAME} cannot be read: {error}") from error
    if actual != copy.digest:
        raise StoreError(f"the fence in {directory}/{copies.NAME} is not the one that was pinned")
    return copy


def _fault(damage: StoreError, copy: copies.Copy) -> StoreError:
    what = "the fence of" if copy.text else "no fence, at"
    message = (
        f"{damage.message}; read-only until an admin acts: {what} generation {copy.generation} is served from the "
        f"copy made at {copy.made_at}, a later change is not in it; nothing is granted"
    )
    if "aside" not in damage.fields:
        hint = "make the state directory writable, and start the daemon again"
    else:
        hint = (
            "put a copy of the database back, or go on from this fence with `kvmneg fence restore --reason …`"
        )
    return StoreError(message, hint=hint, copy=copy.generation)


def _generation_of(path: str) -> int:
    """The generation that a damaged database still tells, 0 where it does not."""
    from urllib.parse import quote

    try:
        connection = sqlite3.connect(f"file:{quote(path)}?mode=ro&immutable=1", uri=True)
        try:
            row = connection.execute("SELECT MAX(generation) FROM fence_history").fetchone()
        finally:
            connection.close()
    except sqlite3.Error:
        return 0
    found = row[0]
    return found if isinstance(found, int) and 0 < found < limits.GENERATIONS else 0
