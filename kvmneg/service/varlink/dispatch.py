# SPDX-License-Identifier: LGPL-2.1-or-later
"""What the transport asks of whoever answers its calls."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from kvmneg.service.varlink.connection import Connection


class Dispatch:
    """What answers calls. Replies are whole messages with their NUL (`reply`)."""

    def cached(self, call: bytes) -> bytes | None:
        """The reply to exactly these bytes, their NUL included, where it is known and the same for every peer.

        Looked up once, when the server starts: a dictionary's `get` will do. Only replies that `call` returned for
        calls without `oneway` and `more` belong there. An end of file is asked for as b"".
        """
        raise NotImplementedError

    def call(
        self, connection: Connection, method: str, parameters: dict[str, Any], more: bool, oneway: bool
    ) -> bytes | None:
        """The reply; None where the method holds the connection (`Connection.hold`) and answers later.

        Raises KvmnegError or ServiceError, which become error replies, Later; anything else becomes org.kvmneg.Internal
        and is reported, its text is not sent. `connection.raw` has the call's bytes, the key for `cached`.
        """
        raise NotImplementedError
