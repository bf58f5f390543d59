# SPDX-License-Identifier: LGPL-2.1-or-later
"""A bounded memory that many users fill and none can empty for the others.

Every entry belongs to each of the users that put it in. Where there is no more room, the user who has most entries
loses the oldest of them; an entry is forgotten once it is nobody's any more.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Generic, TypeVar

    Key = TypeVar("Key")
    Value = TypeVar("Value")
else:
    Key = Value = None

    class Generic:
        """In the place of typing's, which costs a start 2 ms."""

        def __class_getitem__(cls, _: object) -> type:
            return cls


class Shares(Generic[Key, Value]):
    """Key → value, up to a number of (user, key) pairs. `values` is for reading."""

    __slots__ = ("_count", "_keys", "on_forgotten", "values")

    def __init__(self) -> None:
        self.values: dict[Key, Value] = {}
        self.on_forgotten: Callable[[Key], None] = lambda key: None
        self._keys: dict[int, dict[Key, None]] = {}  # uid → its keys, oldest first
        self._count = 0  # of all of them

    def put(self, key: Key, value: Value, uid: int, limit: int) -> None:
        """Keep a value for a user; where there are more than `limit` pairs then, others go."""
        self.values[key] = value
        own = self._keys.setdefault(uid, {})
        self._count += key not in own
        own.pop(key, None)
        own[key] = None  # its newest
        while self._count > limit:
            self._lose_one()

    def hold(self, key: Key, uid: int, limit: int) -> None:
        """Keep what is known for this user too."""
        self.put(key, self.values[key], uid, limit)

    def drop(self, key: Key) -> None:
        """Forget an entry, whose-ever it is."""
        for own in self._keys.values():
            self._count -= key in own
            own.pop(key, None)
        self._keys = {uid: own for uid, own in self._keys.items() if own}
        del self.values[key]
        self.on_forgotten(key)

    def clear(self) -> None:
        """Forget everything; nobody is told."""
        self.values.clear()
        self._keys.clear()
        self._count = 0

    def _lose_one(self) -> None:
        most = max(self._keys, key=lambda uid: len(self._keys[uid]))
        own = self._keys[most]
        key = next(iter(own))
        del own[key]
        self._count -= 1
        if not own:
            del self._keys[most]
        if not any(key in others for others in self._keys.values()):
            del self.values[key]
            self.on_forgotten(key)
